// Line charts in SVG: one series, an optional band, values under the pointer. No dependencies.

const NAMESPACE = "http://www.w3.org/2000/svg";
const MARGIN = { top: 16, right: 14, bottom: 22, left: 42 };
// More points than pixels say nothing more; each drawn point is the mean of its neighbours.
const POINTS_MAX = 400;
const SMOOTH = 0.15;

function element(parent, name, attributes, text) {
  const node = document.createElementNS(NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

// Round numbers between low and high, about `count` of them.
export function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= raw);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

// Means of neighbours, so that at most POINTS_MAX points are left.
export function thin(points) {
  const size = Math.ceil(points.length / POINTS_MAX);
  if (size <= 1) return points;
  const mean = (part, key) => part.reduce((sum, p) => sum + p[key], 0) / part.length;
  const thinned = [];
  for (let i = 0; i < points.length; i += size) {
    const part = points.slice(i, i + size);
    const point = { x: part[part.length - 1].x, y: mean(part, "y") };
    if (part[0].low !== undefined) Object.assign(point, { low: mean(part, "low"), high: mean(part, "high") });
    thinned.push(point);
  }
  return thinned;
}

function smoothed(points) {
  let mean = points[0].y;
  return points.map((p) => ({ ...p, y: (mean += SMOOTH * (p.y - mean)) }));
}

function path(points, at) {
  return points.map((p, i) => `${i ? "L" : "M"}${at(p).map((v) => v.toFixed(1)).join(" ")}`).join("");
}

// Draws points {x, y, low?, high?} in order of x. options: smooth, share (y is 0 to 1), format, empty.
export function draw(svg, all, options) {
  svg.replaceChildren();
  const width = svg.clientWidth || 560;
  const height = svg.clientHeight || 190;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const raw = all.filter((p) => Number.isFinite(p.y));
  if (raw.length === 0) {
    element(svg, "text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, options.empty);
    return;
  }
  const points = thin(raw);
  const right = Math.max(points[points.length - 1].x, points[0].x + 1);
  const xs = [points[0].x, right];
  const ys = range(points, options.share);
  const x = (v) => MARGIN.left + ((v - xs[0]) / (xs[1] - xs[0])) * (width - MARGIN.left - MARGIN.right);
  const y = (v) => height - MARGIN.bottom - ((v - ys[0]) / (ys[1] - ys[0])) * (height - MARGIN.top - MARGIN.bottom);
  axes(svg, { xs, ys, x, y, width, height, format: options.format });
  if (points[0].low !== undefined) {
    const upper = path(points, (p) => [x(p.x), y(p.high)]);
    const lower = path([...points].reverse(), (p) => [x(p.x), y(p.low)]).replace("M", "L");
    element(svg, "path", { class: "band", d: `${upper}${lower}Z` });
  }
  const at = (p) => [x(p.x), y(p.y)];
  const smooth = options.smooth && points.length > 12;
  if (smooth) element(svg, "path", { class: "faint", d: path(points, at) });
  element(svg, "path", { class: "line", d: path(smooth ? smoothed(points) : points, at) });
  readout(svg, points, { x, y, width, format: options.format, dots: !smooth });
}

function range(points, share) {
  let low = Math.min(...points.map((p) => p.low ?? p.y));
  let high = Math.max(...points.map((p) => p.high ?? p.y));
  if (share) low = 0;
  const pad = (high - low || Math.abs(high) || 1) * 0.08;
  if (share) return [0, Math.min(1, Math.max(high + pad, 0.1))];
  return [low - pad, high + pad];
}

function axes(svg, { xs, ys, x, y, width, height, format }) {
  for (const tick of ticks(ys[0], ys[1], 5)) {
    element(svg, "line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(tick), y2: y(tick) });
    element(svg, "text", { x: MARGIN.left - 6, y: y(tick) + 4, "text-anchor": "end" }, format(tick));
  }
  const whole = ticks(xs[0], xs[1], Math.max(2, Math.floor(width / 110))).filter(Number.isInteger);
  for (const tick of whole) {
    element(svg, "text", { x: x(tick), y: height - 6, "text-anchor": "middle" }, String(tick));
  }
}

// The newest value, or the one under the pointer.
function readout(svg, points, { x, y, width, format, dots }) {
  if (dots && points.length <= 40) {
    for (const p of points) element(svg, "circle", { class: "dot", cx: x(p.x), cy: y(p.y), r: 2.5 });
  }
  const mark = element(svg, "circle", { class: "dot", r: 4 });
  const label = element(svg, "text", { class: "readout", y: 11, x: width - MARGIN.right, "text-anchor": "end" });
  const show = (p) => {
    mark.setAttribute("cx", x(p.x));
    mark.setAttribute("cy", y(p.y));
    const interval = p.low === undefined ? "" : ` (${format(p.low)} to ${format(p.high)})`;
    label.textContent = `step ${p.x}: ${format(p.y)}${interval}`;
  };
  const newest = points[points.length - 1];
  show(newest);
  svg.onpointermove = (event) => {
    const left = event.clientX - svg.getBoundingClientRect().left;
    show(points.reduce((best, p) => (Math.abs(x(p.x) - left) < Math.abs(x(best.x) - left) ? p : best)));
  };
  svg.onpointerleave = () => show(newest);
}
