// The volunteer of this tab, if the program was built with it.

// Resolves to a `Tab`, or to null if this program has none.
export async function openTab() {
  const built = await fetch("/pkg/manyhands_web_bg.wasm", { method: "HEAD" });
  if (!built.ok) return null;
  const { Tab } = await import("/tab.js");
  return new Tab();
}

export const WITHOUT_TAB = "This program was built without the tab; “make build” builds both.";
