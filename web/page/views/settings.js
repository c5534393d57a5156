// When and how hard this browser may work. A form that applies at once.

import { h } from "../dom.js";
import { percent } from "../words.js";

const DEFAULTS = {
  engine: "auto", threads: 1, duty: 1, only_visible: true, only_mains: true, hours: null,
  data_cap_mb: null, cache_mb: 1024,
};
const CACHE_MB_MIN = 64;
const CACHE_MB_MAX = 65536;

export class Settings {
  #form = h("form", { class: "card settings", submit: (event) => event.preventDefault(), change: () => this.#changed() });
  #output = h("output", { for: "set-duty" });
  #changedTo;

  constructor(changedTo) {
    this.#changedTo = changedTo;
    const cores = navigator.hardwareConcurrency || 1;
    const hour = (name, label) => h("select", { name, "aria-label": label },
      h("option", { value: "" }, "any"), Array.from({ length: 24 }, (_, i) => h("option", { value: i }, `${String(i).padStart(2, "0")}:00`)));
    this.#form.append(
      setting("duty", "How hard", "The share of time in which your machine computes; in between it cools down.",
        [h("input", { id: "set-duty", name: "duty", type: "range", min: 10, max: 100, step: 5, input: () => this.#tell() }), this.#output], "slider"),
      setting("visible", "Only while this page is visible", "Computing rests while another tab or window covers it.",
        [h("input", { id: "set-visible", name: "only_visible", type: "checkbox" })], "", "switch"),
      setting("mains", "Only on mains power", "Where the browser tells whether a battery is discharging.",
        [h("input", { id: "set-mains", name: "only_mains", type: "checkbox" })], "", "switch"),
      group("Hours", "In local time; from 22:00 to 07:00 works at night.",
        [hour("from", "From"), "to", hour("to", "To")]),
      setting("data", "Data cap", "Megabytes a day; empty means no cap.",
        [h("input", { id: "set-data", name: "data_cap_mb", type: "number", min: 1, max: 1000000, step: 1, placeholder: "none" }), "MB"]),
      setting("cache", "Weights kept for next time", "Megabytes in this browser; the oldest make room.",
        [h("input", { id: "set-cache", name: "cache_mb", type: "number", min: CACHE_MB_MIN, max: CACHE_MB_MAX, step: 1 }), "MB"]),
      setting("engine", "Engine", "Automatic takes WebGPU if it gives the right bits and is the faster one.",
        [h("select", { id: "set-engine", name: "engine" }, [["auto", "Automatic"], ["webgpu", "WebGPU"], ["wasm", "WebAssembly"]].map(([v, t]) => h("option", { value: v }, t)))]),
      setting("threads", "WebAssembly workers", `Up to ${cores} on this machine.`,
        [h("input", { id: "set-threads", name: "threads", type: "number", min: 1, max: cores, step: 1 })]),
    );
    this.root = this.#form;
    this.set(DEFAULTS);
    // Until what was kept is known: it would undo what is chosen before.
    this.disable();
  }

  set(settings) {
    const s = { ...DEFAULTS, ...settings };
    const f = this.#form.elements;
    const [from, to] = s.hours ? s.hours.split("-") : ["", ""];
    f.duty.value = Math.round(s.duty * 100);
    f.only_visible.checked = s.only_visible;
    f.only_mains.checked = s.only_mains;
    f.from.value = from;
    f.to.value = to;
    f.data_cap_mb.value = s.data_cap_mb ?? "";
    f.cache_mb.value = s.cache_mb;
    f.engine.value = s.engine;
    f.threads.value = s.threads;
    for (const field of f) field.disabled = false;
    this.#tell();
  }

  get() {
    const f = this.#form.elements;
    const number = (field, low, high, otherwise) => (field.value === "" ? otherwise : Math.min(high, Math.max(low, Math.round(Number(field.value)))));
    const hours = f.from.value !== "" && f.to.value !== "" && f.from.value !== f.to.value;
    return {
      engine: f.engine.value,
      threads: number(f.threads, 1, Number(f.threads.max), 1),
      duty: Number(f.duty.value) / 100,
      only_visible: f.only_visible.checked,
      only_mains: f.only_mains.checked,
      hours: hours ? `${f.from.value}-${f.to.value}` : null,
      data_cap_mb: number(f.data_cap_mb, 1, 1000000, null),
      cache_mb: number(f.cache_mb, CACHE_MB_MIN, CACHE_MB_MAX, DEFAULTS.cache_mb),
    };
  }

  disable() {
    for (const field of this.#form.elements) field.disabled = true;
  }

  #tell() {
    this.#output.textContent = percent(Number(this.#form.elements.duty.value) / 100);
  }

  #changed() {
    const settings = this.get();
    // Numbers out of range come back inside; one of two hours stays, until the other is chosen.
    for (const name of ["threads", "data_cap_mb", "cache_mb"]) this.#form.elements[name].value = settings[name] ?? "";
    this.#changedTo(settings);
  }
}

function setting(id, name, help, control, kind = "", shape = "") {
  const helpId = `set-${id}-help`;
  control[0].setAttribute("aria-describedby", helpId);
  return h("div", { class: `setting ${shape}` },
    h("label", { for: `set-${id}` }, name), h("span", { class: "help", id: helpId }, help),
    h("div", { class: `control ${kind}` }, control));
}

function group(name, help, control) {
  return h("div", { class: "setting", role: "group", "aria-label": name },
    h("span", {}, name), h("span", { class: "help" }, help), h("div", { class: "control" }, control));
}
