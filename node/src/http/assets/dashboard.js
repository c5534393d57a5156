// The dashboard: status by polling, history once, then events as they come.
// What peers send is put in as text, never as markup.

import { draw } from "./charts.js";

const POLL_MS = 2000;
const PAGE = 1000;
const POINTS_MAX = 10000;
const VOLUNTEERS_SHOWN = 50;
const LOG_LINES = 8;

const $ = (id) => document.getElementById(id);
const steps = new Map();
const evaluations = new Map();
let drawing = false;

async function read(path) {
  const answer = await fetch(path);
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error);
  return body;
}

// Numbers for people.

const percent = (v) => (v === null || v === undefined ? "–" : `${(100 * v).toFixed(v > 0 && v < 0.0995 ? 1 : 0)}%`);
const whole = (v) => Math.round(v).toLocaleString("en");

function big(v) {
  if (!v) return "0";
  const units = ["", " k", " M", " G", " T", " P", " E"];
  const power = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log10(Math.abs(v)) / 3)));
  const scaled = v / 1000 ** power;
  return `${scaled.toFixed(scaled < 10 && (power > 0 || scaled % 1 !== 0) ? 1 : 0)}${units[power]}`;
}

function bytes(v) {
  return `${big(v)}${v < 1000 ? " " : ""}B`;
}

function time(s) {
  if (s < 90) return `${Math.round(s)} s`;
  if (s < 5400) return `${Math.round(s / 60)} min`;
  if (s < 172800) return `${(s / 3600).toFixed(1)} h`;
  return `${Math.round(s / 86400)} days`;
}

// From 1 to below a part in a thousand a percentage says it; beyond that, "1 in N" does.
function chance(v) {
  if (v >= 0.001 || v === 0) return v === 0 ? "0" : percent(v);
  return `1 in ${big(1 / v)}`;
}

// The page.

function cell(row, text, kind) {
  const td = row.insertCell();
  td.textContent = text;
  if (kind) td.className = kind;
  return td;
}

function badge(element, text, kind) {
  element.textContent = text;
  element.className = `badge ${kind}`;
}

function list(id, pairs) {
  $(id).replaceChildren(...pairs.filter(([, value]) => value !== null).flatMap(([name, value]) => {
    const [dt, dd] = ["dt", "dd"].map((tag) => document.createElement(tag));
    dt.textContent = name;
    dd.textContent = value;
    return [dt, dd];
  }));
}

const STATES = { running: "good", paused: "warn", done: "good", failed: "bad" };
const PHASES = { sft: "supervised fine-tuning", rl: "reinforcement learning", done: "all steps done" };

function showHead(s) {
  document.title = `${s.name || "Manyhands"}: step ${s.ordinal} of ${s.steps}`;
  $("name").textContent = s.name || "Manyhands";
  $("run").textContent = s.run.slice(0, 16);
  $("run").title = `Identity of the run: ${s.run}`;
  badge($("state"), s.state, STATES[s.state] ?? "");
  $("progress").max = Math.max(1, s.steps);
  $("progress").value = s.ordinal;
  const parts = [`Step ${whole(s.ordinal)} of ${whole(s.steps)}`];
  if (s.phase) parts.push(PHASES[s.phase]);
  if (s.remaining_s !== null && s.state === "running") parts.push(`about ${time(s.remaining_s)} left`);
  if (s.since_last_step_s !== null) parts.push(`last step ${time(s.since_last_step_s)} ago`);
  $("progress-text").textContent = `${parts.join(" · ")}.`;
  $("version").textContent = `manyhands ${s.version} · up ${time(s.uptime_s)} · ${whole(s.parameters)} parameters`;
  $("join").textContent = `manyhands join ${s.join || location.origin}`;
  $("warnings").hidden = s.warnings.length === 0;
  $("warnings").replaceChildren(...s.warnings.slice(-5).map((text) => {
    const item = document.createElement("li");
    item.textContent = text;
    return item;
  }));
}

function showTiles(s) {
  const pass = s.last_evaluation?.report.overall.pass_at_k["1"];
  $("tile-reward").textContent = percent(s.last_step?.reward);
  $("tile-pass").textContent = percent(pass?.mean);
  $("tile-volunteers").textContent = whole(s.volunteers.filter((v) => v.connected).length);
  $("tile-speed").textContent = big(s.throughput.multiply_adds_per_second);
  $("tile-tokens").textContent = big(s.throughput.tokens_per_second);
}

const STANDINGS = { newcomer: "warn", trusted: "good", expelled: "bad" };

function showVolunteers(s) {
  const order = (v) => [v.connected ? 0 : 1, -(v.credit + v.provisional_credit)];
  const sorted = [...s.volunteers].sort((a, b) => order(a)[0] - order(b)[0] || order(a)[1] - order(b)[1]);
  const body = document.createElement("tbody");
  body.id = "volunteers";
  for (const v of sorted.slice(0, VOLUNTEERS_SHOWN)) {
    const row = body.insertRow();
    if (!v.connected) row.className = "gone";
    cell(row, v.peer.slice(0, 12), "hash").title = v.peer;
    const mark = document.createElement("span");
    badge(mark, v.standing, STANDINGS[v.standing] ?? "");
    if (v.expelled_for) mark.title = v.expelled_for.replaceAll("_", " ");
    cell(row, "").append(mark);
    cell(row, [v.engine, v.agent].filter(Boolean).join(" · "), "agent").title = "In its own words";
    cell(row, whole(v.units), "number");
    cell(row, whole(v.audited), "number");
    cell(row, big(v.credit), "number");
    cell(row, big(v.provisional_credit), "number");
    cell(row, v.speed > 0 ? `${big(v.speed)}/s` : "–", "number");
    cell(row, v.connected ? (v.leases > 0 ? `working on ${v.leases}` : "connected") : `${time(v.last_seen_s)} ago`);
  }
  if (sorted.length === 0) {
    const only = body.insertRow().insertCell();
    only.colSpan = 9;
    only.className = "quiet";
    only.textContent = "Nobody yet. The command above makes your machine the first.";
  }
  $("volunteers").replaceWith(body);
  const hidden = sorted.length - VOLUNTEERS_SHOWN;
  $("volunteers-more").textContent = hidden > 0 ? `And ${whole(hidden)} more at /api/status.` : "";
}

function showPanels(s) {
  const v = s.verification;
  list("verification", [
    ["Work computed again", percent(v.audited_work_fraction)],
    ["Cost on top of useful work", percent(v.overhead_fraction)],
    ["Checks so far", `${whole(v.audits)}, ${whole(v.audits_failed)} failed`],
    ["Least chance that a unit is checked", percent(v.audit_probability_min)],
    [`Chance that a cheat survives ${whole(v.survival_units)} units`, v.survival_units ? chance(v.survival_probability) : null],
    ["Expelled, units taken out again", `${whole(v.expelled)}, ${whole(v.voided)}`],
  ]);
  list("versions", [
    ["Newest", `after step ${whole(s.versions.newest_ordinal)}`],
    ["Final up to", `step ${whole(s.versions.final_ordinal)}`],
    ["Provisional", whole(s.versions.provisional)],
    ["Taken back", s.versions.rolled_back === 1 ? "once" : `${whole(s.versions.rolled_back)} times`],
    ["Hash of the weights", s.weights ? `${s.weights.slice(0, 16)}, ${bytes(s.weights_bytes)}` : "–"],
    ["Ledger", `${whole(s.ledger_records)} records`],
  ]);
  list("units", [
    ["Waiting", whole(s.units.waiting)],
    ["With volunteers", whole(s.units.leased)],
    ["Held until checked", whole(s.units.awaiting_audit)],
    ["Accepted", `${whole(s.units.accepted)}, ${s.throughput.units_per_minute.toFixed(1)} a minute`],
    ["Handed out again, or twice", `${whole(s.units.reissued)}, ${whole(s.units.backup)}`],
    ["Found wrong", whole(s.units.invalid)],
    ["Computed here for want of volunteers", s.units.local ? whole(s.units.local) : null],
  ]);
}

function showCharts() {
  drawing = false;
  const inOrder = (map) => [...map.values()].sort((a, b) => a.x - b.x);
  const points = inOrder(steps);
  const rewards = points.filter((p) => p.reward !== undefined).map((p) => ({ x: p.x, y: p.reward }));
  const learning = rewards.length > 0;
  $("chart-a-title").textContent = learning ? "Reward" : "Loss";
  $("chart-a-words").textContent = learning
    ? "Share of sampled answers that are right, on training problems, by step."
    : "Mean loss a token while the model imitates examples, by step.";
  const empty = "Begins with the first step.";
  const losses = points.map((p) => ({ x: p.x, y: p.loss }));
  if (learning) draw($("chart-a"), rewards, { smooth: true, share: true, format: percent, empty });
  else draw($("chart-a"), losses, { smooth: true, format: (v) => v.toPrecision(3), empty });
  draw($("chart-b"), inOrder(evaluations), { share: true, format: percent, empty: "Begins with the first evaluation." });
}

function drawSoon() {
  if (!drawing) requestAnimationFrame(showCharts);
  drawing = true;
}

// Data.

function keep(map, ordinal, point) {
  map.set(ordinal, { x: ordinal, ...point });
  if (map.size > POINTS_MAX) map.delete(map.keys().next().value);
}

function addStep(ordinal, report) {
  keep(steps, ordinal, { loss: report.loss, reward: report.reward });
}

function addEvaluation(ordinal, report) {
  const pass = report.overall.pass_at_k["1"];
  if (pass) keep(evaluations, ordinal, { y: pass.mean, low: pass.low, high: pass.high });
}

async function history(path, add) {
  let from = 0;
  for (;;) {
    const page = await read(`${path}?from=${from}&limit=${PAGE}`);
    page.forEach(add);
    if (page.length < PAGE) return;
    from = page[page.length - 1].ordinal + 1;
  }
}

async function loadHistory() {
  steps.clear();
  evaluations.clear();
  await history("/api/steps", (line) => addStep(line.ordinal, line));
  await history("/api/evaluations", (line) => addEvaluation(line.ordinal, line.report));
  drawSoon();
}

async function poll() {
  try {
    if (!document.hidden) {
      const s = await read("/api/status");
      for (const show of [showHead, showTiles, showVolunteers, showPanels]) show(s);
      $("lost").hidden = true;
    }
  } catch (error) {
    $("lost").hidden = false;
    $("lost").textContent = `The coordination peer does not answer (${error.message}). These numbers are old; asking again.`;
  }
  setTimeout(poll, POLL_MS);
}

function log(text) {
  const item = document.createElement("li");
  const when = document.createElement("time");
  when.textContent = new Date().toLocaleTimeString();
  item.append(when, text);
  const lines = [...$("log").children].filter((line) => line.className !== "quiet");
  $("log").replaceChildren(item, ...lines.slice(0, LOG_LINES - 1));
}

function dropAfter(map, ordinal) {
  for (const key of [...map.keys()]) if (key > ordinal) map.delete(key);
}

const HANDLERS = {
  hello: () => loadHistory().catch(() => {}),
  lagged: () => loadHistory().catch(() => {}),
  step: (e) => { addStep(e.ordinal, e.report); log(`Step ${e.ordinal} is done.`); drawSoon(); },
  evaluation: (e) => { addEvaluation(e.ordinal, e.evaluation.report); log(`Evaluated after step ${e.ordinal}.`); drawSoon(); },
  final: (e) => log(`Everything up to step ${e.ordinal} is final.`),
  expelled: (e) => log(`Volunteer ${e.peer.slice(0, 12)} was expelled: ${e.offence.replaceAll("_", " ")}.`),
  rolled_back: (e) => {
    dropAfter(steps, e.ordinal);
    dropAfter(evaluations, e.ordinal);
    log(`A false unit had entered: back to step ${e.ordinal}, and on from there.`);
    drawSoon();
  },
  joined: (e) => log(`Volunteer ${e.peer.slice(0, 12)} joined.`),
  left: (e) => log(`Volunteer ${e.peer.slice(0, 12)} left.`),
  state: (e) => log(`The run is now ${e.state}.`),
  warning: (e) => log(e.text),
};

function listen() {
  // Reconnects by itself; every connection begins with `hello`.
  const source = new EventSource("/api/events");
  for (const [name, handle] of Object.entries(HANDLERS)) {
    source.addEventListener(name, (event) => handle(JSON.parse(event.data)));
  }
}

$("copy").addEventListener("click", async () => {
  const range = document.createRange();
  range.selectNodeContents($("join"));
  getSelection().removeAllRanges();
  getSelection().addRange(range);
  try {
    // Only secure pages have a clipboard; elsewhere the text is selected.
    await navigator.clipboard.writeText($("join").textContent);
    $("copy").textContent = "Copied";
  } catch {
    $("copy").textContent = "Press Ctrl+C";
  }
  setTimeout(() => ($("copy").textContent = "Copy"), 2000);
});

addEventListener("resize", drawSoon);
showCharts();
poll();
listen();
loadHistory().catch(() => {});
