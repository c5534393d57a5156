// Small helpers for the page. What peers send is put in as text, never as markup.

export const $ = (id) => document.getElementById(id);

// An element: `h("p", { class: "quiet" }, "text", child)`. Functions are listeners; null and false
// are left out.
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((c) => c !== null && c !== undefined && c !== false));
  return element;
}

// Sets text only where it changes, so that selections and screen readers are left in peace.
export function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// Replaces what is in an element only if it differs, and keeps the focus on a link that is still
// there, so that live numbers take nothing out of anybody's hands. Not for what has listeners.
export function renew(element, ...children) {
  const fresh = h("div", {}, ...children);
  const same = fresh.childNodes.length === element.childNodes.length
    && [...fresh.childNodes].every((node, i) => node.isEqualNode(element.childNodes[i]));
  if (same) return;
  const focused = element.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
  element.replaceChildren(...fresh.childNodes);
  if (focused) element.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
}

// A table: columns are { name, number, slim (left out on a phone), title }, rows are lists of text or nodes.
export function table(caption, columns, rows, empty) {
  const align = (i) => [columns[i].number && "number", columns[i].slim && "slim"].filter(Boolean).join(" ") || null;
  // Roles are spelled out because a phone's layout takes them from the elements.
  const cell = (value, i) => h("td", { role: "cell", class: align(i), "data-name": columns[i].name }, value);
  const body = rows.length
    ? rows.map((row) => h("tr", { role: "row", class: row.kind }, row.map(cell)))
    : [h("tr", { role: "row", class: "empty" }, h("td", { role: "cell", colspan: columns.length }, empty))];
  return h("table", { role: "table" },
    h("caption", { class: "unseen" }, caption),
    h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, columns.map((c, i) => h("th", { role: "columnheader", scope: "col", class: align(i), title: c.title }, c.name)))),
    h("tbody", { role: "rowgroup" }, body));
}

// Terms and values, leaving out what is null.
export function pairs(list) {
  const shown = list.filter(([, value]) => value !== null && value !== undefined);
  return h("dl", { class: "pairs" }, shown.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

// A hash or identity in short form, whole in its title.
export function hash(text, length = 10) {
  return text ? h("code", { class: "hash", title: text }, text.slice(0, length)) : "–";
}

// Speaks a short text to screen readers, once.
export function speak(text) {
  $("spoken").textContent = text;
}

// A button that copies the text of an element; where there is no clipboard the text is selected.
export function copyButton(source) {
  const button = h("button", { class: "small", type: "button", click: async () => {
    const range = document.createRange();
    range.selectNodeContents(source);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    try {
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Press Ctrl+C";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  } }, "Copy");
  return button;
}
