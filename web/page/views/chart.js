// One chart: a figure with words, a plot by uPlot, and the numbers under the cursor as text.
//
// All charts share their x axis: zooming one zooms all. By mouse: drag to zoom, double click for
// all. By keyboard: arrows read points, plus and minus zoom, 0 shows all.

import uPlot from "/vendor/uplot/uPlot.esm.js";
import { h, put, speak } from "../dom.js";
import { whole } from "../words.js";

const HEIGHT = 220;
const SYNC = "run";

// The colours of the page, as a canvas needs them.
const probe = h("span", { class: "unseen", "aria-hidden": "true" });
const colours = new Map();
addEventListener("themechange", () => colours.clear());
function colour(name, alpha = 1) {
  const key = `${name} ${alpha}`;
  if (!colours.has(key)) {
    if (!probe.isConnected) document.body.append(probe);
    probe.style.color = `color-mix(in srgb, var(--${name}) ${100 * alpha}%, transparent)`;
    colours.set(key, getComputedStyle(probe).color);
  }
  return colours.get(key);
}

// What of the run the charts show: null is all of it.
class Window extends EventTarget {
  range = null;
  all = [0, 1];

  set(range) {
    const [first, last] = this.all;
    this.range = range && range[1] - range[0] < last - first ? [Math.max(first, range[0]), Math.min(last, range[1])] : null;
    this.dispatchEvent(new Event("change"));
  }

  // Zooms by a factor around a point.
  zoom(factor, centre) {
    const [from, to] = this.range ?? this.all;
    const middle = centre ?? (from + to) / 2;
    const half = Math.max(2, (to - from) * factor) / 2;
    this.set([middle - half, middle + half]);
  }
}

export const shared = new Window();

// series: { name, line, faint, dashed, low, high, points }; `low` and `high` are edges of a band of
// the series before them and are not read out.
export class Chart {
  #plot = null;
  #readout = h("p", { class: "readout" });
  #box = h("div", { class: "plot", tabindex: 0, role: "group" });
  #spec;
  #data = [[]];
  #marks = new Map();

  constructor(spec) {
    this.#spec = spec;
    this.root = h("figure", { class: "card chart" },
      h("figcaption", {}, h("h3", {}, spec.title), h("p", { class: "quiet" }, spec.words)),
      this.#box, this.#readout);
    this.#box.addEventListener("keydown", (event) => this.#key(event));
    shared.addEventListener("change", () => this.#applyWindow());
    addEventListener("themechange", () => this.#plot?.redraw(false));
    new ResizeObserver(() => this.#resize()).observe(this.#box);
    this.update([[]], new Map());
  }

  // data: x values, then the values of each series; marks: x -> what happened there.
  update(data, marks = new Map()) {
    this.#data = data;
    this.#marks = marks;
    const empty = data[0].length === 0 || data.slice(1).every((values) => values.every((v) => v === null));
    if (empty) {
      this.#plot?.destroy();
      this.#plot = null;
      this.#box.replaceChildren(h("p", { class: "waits" }, this.#spec.empty));
      this.#box.setAttribute("aria-label", `${this.#spec.title}. ${this.#spec.empty}`);
      put(this.#readout, "");
      return;
    }
    if (!this.#plot) this.#build();
    else this.#plot.setData(data, false);
    this.#applyWindow();
    this.#read(null);
    this.#box.setAttribute("aria-label", `${this.#spec.title}, chart. Newest: ${this.#readout.textContent}. Arrow keys read points, plus and minus zoom, 0 shows all.`);
  }

  #build() {
    this.#box.replaceChildren();
    const { series, format, bands } = this.#spec;
    const axis = { stroke: () => colour("soft"), font: "12px Hanken Grotesk, sans-serif", grid: { stroke: () => colour("line"), width: 1 }, ticks: { show: false } };
    const of = (s) => {
      const band = s.low || s.high;
      return {
        label: s.name, scale: "y", spanGaps: true,
        stroke: () => (band ? "transparent" : colour(s.line, s.faint ? 0.32 : 1)),
        width: s.faint ? 1 : 2, dash: s.dashed ? [5, 5] : undefined,
        points: { show: s.points ?? false, size: 7, width: 0, fill: () => colour(s.line) },
      };
    };
    this.#plot = new uPlot({
      width: this.#box.clientWidth || 320, height: HEIGHT, padding: [10, 8, 0, 0],
      legend: { show: false },
      scales: { x: { time: false }, y: { range: this.#spec.range ?? ((_, low, high) => padded(low, high)) } },
      axes: [
        { ...axis, size: 28, incrs: [1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000, 1000000], values: (_, values) => values.map((v) => (v >= 0 ? whole(v) : "")) },
        { ...axis, size: 52, values: (_, values) => values.map(this.#spec.axis ?? format) },
      ],
      series: [{ label: "step" }, ...series.map(of)],
      bands: (bands ?? []).map((b) => ({ series: [b.high, b.low], fill: () => colour(b.line, 0.16) })),
      cursor: { sync: { key: SYNC, setSeries: false }, drag: { x: true, y: false, setScale: false }, points: { size: 8 }, y: false },
      select: { show: true },
      hooks: {
        setCursor: [(u) => this.#read(u.cursor.idx)],
        setSelect: [(u) => {
          if (u.select.width < 8) return;
          shared.set([u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")]);
          u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
        }],
        draw: [(u) => this.#drawMarks(u)],
        ready: [(u) => u.over.addEventListener("dblclick", () => shared.set(null))],
      },
    }, this.#data, this.#box);
  }

  #resize() {
    const width = this.#box.clientWidth;
    if (this.#plot && width > 0 && width !== this.#plot.width) this.#plot.setSize({ width, height: HEIGHT });
  }

  #applyWindow() {
    if (!this.#plot) return;
    const [min, max] = shared.range ?? shared.all;
    this.#plot.setScale("x", { min, max: Math.max(max, min + 1) });
  }

  #drawMarks(u) {
    const { ctx, bbox } = u;
    ctx.save();
    ctx.strokeStyle = colour("line-2");
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash([3 * devicePixelRatio, 4 * devicePixelRatio]);
    for (const x of this.#marks.keys()) {
      const left = u.valToPos(x, "x", true);
      if (left < bbox.left || left > bbox.left + bbox.width) continue;
      ctx.beginPath();
      ctx.moveTo(left, bbox.top);
      ctx.lineTo(left, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }

  // The values at a point as text; at the newest one when there is no cursor.
  #read(index) {
    const [xs, ...values] = this.#data;
    const { series, format } = this.#spec;
    const at = (i, list) => {
      // Series have gaps: the nearest value at or before the point.
      for (let j = i; j >= 0; j -= 1) if (list[j] !== null && list[j] !== undefined) return list[j];
      return null;
    };
    const i = index ?? xs.length - 1;
    const parts = series.map((s, j) => {
      if (s.low || s.high || s.silent) return null;
      const v = at(i, values[j]);
      if (v === null) return null;
      const band = s.band ? s.band.map((b) => at(i, values[b])) : null;
      const between = band && band[0] !== null ? ` (${format(band[0])} to ${format(band[1])})` : "";
      return h("span", {}, h("i", { class: `key ${s.line}${s.faint ? " faint" : ""}` }), `${s.name} ${format(v)}${between}`);
    }).filter(Boolean);
    const mark = this.#marks.get(xs[i]);
    this.#readout.replaceChildren(h("span", { class: "at" }, `Step ${whole(xs[i])}`), ...parts.flatMap((p) => [" ", p]), mark ? ` · ${mark}` : "");
  }

  #key(event) {
    const u = this.#plot;
    if (!u || event.ctrlKey || event.altKey || event.metaKey) return;
    const xs = this.#data[0];
    const now = u.cursor.idx ?? xs.length - 1;
    const move = (to) => {
      const i = Math.min(xs.length - 1, Math.max(0, to));
      u.setCursor({ left: u.valToPos(xs[i], "x"), top: 0 });
      this.#read(i);
      speak(this.#readout.textContent);
    };
    const keys = {
      ArrowLeft: () => move(now - 1),
      ArrowRight: () => move(now + 1),
      Home: () => move(0),
      End: () => move(xs.length - 1),
      "+": () => shared.zoom(0.5, xs[now]),
      "=": () => shared.zoom(0.5, xs[now]),
      "-": () => shared.zoom(2, xs[now]),
      0: () => shared.set(null),
    };
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  }
}

function padded(low, high) {
  if (low === null || high === null) return [0, 1];
  const pad = (high - low || Math.abs(high) || 1) * 0.08;
  return [low >= 0 ? Math.max(0, low - pad) : low - pad, high + pad];
}
