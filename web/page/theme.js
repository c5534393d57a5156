// Light or dark, before the first paint: the person's choice if there is one, else the system's.
// A classic script, because modules run too late for that.
{
  const KEY = "manyhands-theme";
  const NAMES = ["auto", "light", "dark"];
  const kept = () => {
    try {
      return localStorage.getItem(KEY);
    } catch {
      return null; // Storage may be forbidden; the choice then lasts as long as the page.
    }
  };
  const apply = (name) => {
    document.documentElement.dataset.theme = name;
  };
  apply(NAMES.includes(kept()) ? kept() : "auto");

  addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const show = () => {
      const name = document.documentElement.dataset.theme;
      document.getElementById("theme-name").textContent = name;
      button.setAttribute("aria-label", `Colours: ${name}`);
    };
    button.addEventListener("click", () => {
      const now = NAMES.indexOf(document.documentElement.dataset.theme);
      const next = NAMES[(now + 1) % NAMES.length];
      apply(next);
      try {
        localStorage.setItem(KEY, next);
      } catch {
        // As above.
      }
      show();
      dispatchEvent(new Event("themechange"));
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      dispatchEvent(new Event("themechange"));
    });
    show();
  });
}
