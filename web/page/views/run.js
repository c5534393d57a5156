// The run: what it is doing, how well it learns, who works on it, and what it says.

import { run } from "../data.js";
import { h, hash, pairs, put, renew, table } from "../dom.js";
import { OFFENCES, PHASES, big, bytes, chance, isTab, percent, plural, time, whole } from "../words.js";
import { shared } from "./chart.js";
import { Charts } from "./charts.js";
import { Samples } from "./samples.js";

const VOLUNTEERS_SHOWN = 30;
const STATES = { running: "good", paused: "warn", done: "good", failed: "bad" };
const STANDINGS = { newcomer: "warn", trusted: "good", expelled: "bad" };
const WINDOWS = [["All", null], ["Last 200", 200], ["Last 50", 50]];

export class RunView {
  #title = h("h1", { id: "run-title" }, "The run");
  #state = h("span", { class: "badge" }, "loading");
  #bar = h("progress", { max: 1, value: 0, "aria-label": "Steps done" });
  #words = h("p", { class: "quiet" }, "Waiting for the first numbers.");
  #warnings = h("ul", { class: "notice", hidden: true });
  #figures = h("dl", { class: "figures card" });
  #charts = new Charts();
  #samples = new Samples();
  #kinds = h("div");
  #volunteers = h("div");
  #expelled = h("div");
  #panels = { audits: h("div"), units: h("div"), versions: h("div") };
  #log = h("ol", { class: "happened", tabindex: 0, "aria-label": "Newest events" });
  #windows;
  #drawing = false;

  constructor(root) {
    this.root = root;
    this.#windows = h("div", { class: "row", role: "group", "aria-label": "Steps shown in all charts" },
      WINDOWS.map(([text, count]) => h("button", { class: "small", type: "button", "aria-pressed": "false", click: () => shared.set(count && [shared.all[1] - count, shared.all[1]]) }, text)));
    root.append(
      h("div", { class: "title-row" }, this.#title, this.#state),
      h("div", { class: "progress" }, this.#bar, this.#words),
      this.#warnings,
      h("section", { class: "block", "aria-label": "The run now" }, this.#figures),
      section("How it learns", "Drag over a chart to zoom into all of them, double-click to see everything again. With the keyboard: arrows read points, plus and minus zoom, 0 shows all.",
        this.#windows, h("br"), h("div", { class: "charts" }, this.#charts.figures)),
      section("What it says", "Answers of the model from the newest steps, with the exact statistics that training uses.", this.#samples.root),
      section("Who works on it", "Credit is work that was verified. What a volunteer says of itself is in its own words.", this.#kinds, this.#volunteers, this.#expelled),
      section("How it is checked", "Every result can be computed again: equal hashes, or somebody is wrong.",
        h("div", { class: "panels" },
          card("Audits", this.#panels.audits), card("Units of work", this.#panels.units), card("Versions", this.#panels.versions), card("What just happened", this.#log))),
    );
    run.addEventListener("status", () => this.#showStatus());
    for (const name of ["history", "config"]) run.addEventListener(name, () => this.#drawSoon());
    run.addEventListener("log", () => this.#showLog());
    shared.addEventListener("change", () => this.#showWindow());
    this.#showLog();
    this.#showWindow();
    this.#drawSoon();
  }

  show() {
    this.#showStatus();
    this.#drawSoon();
  }

  // Charts are drawn at most once a frame, and only while they can be seen.
  #drawSoon() {
    if (this.#drawing || this.root.hidden) return;
    this.#drawing = true;
    requestAnimationFrame(() => {
      this.#drawing = false;
      this.#charts.update(run);
    });
  }

  #showWindow() {
    const shown = shared.range && Math.round(shared.range[1] - shared.range[0]);
    [...this.#windows.children].forEach((button, i) => button.setAttribute("aria-pressed", String(WINDOWS[i][1] === shown)));
  }

  #showStatus() {
    const s = run.status;
    if (!s || this.root.hidden) return;
    put(this.#title, s.name);
    put(this.#state, s.state);
    this.#state.className = `badge ${STATES[s.state] ?? ""}`;
    this.#bar.max = Math.max(1, s.steps);
    this.#bar.value = s.ordinal;
    const parts = [`Step ${whole(s.ordinal)} of ${whole(s.steps)}`];
    if (s.phase) parts.push(PHASES[s.phase]);
    if (s.remaining_s !== null && s.state === "running") parts.push(`about ${time(s.remaining_s)} left`);
    if (s.since_last_step_s !== null) parts.push(`last step ${time(s.since_last_step_s)} ago`);
    put(this.#words, `${parts.join(" · ")}.`);
    this.#warnings.hidden = s.warnings.length === 0;
    renew(this.#warnings, ...s.warnings.slice(-5).map((text) => h("li", {}, text)));
    const pass = s.last_evaluation?.report.overall.pass_at_k["1"];
    renew(this.#figures, ...[
      ["reward, last step", percent(s.last_step?.reward)],
      ["pass@1 on held-out problems", percent(pass?.mean)],
      ["volunteers connected", whole(s.volunteers.filter((v) => v.connected).length)],
      ["tokens a second", big(s.throughput.tokens_per_second)],
      ["multiply-adds a second", big(s.throughput.multiply_adds_per_second)],
      ["units in flight", whole(s.units.leased)],
    ].map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
    this.#showVolunteers(s);
    this.#showPanels(s);
  }

  #showVolunteers(s) {
    // Who is not here says nothing of what it runs.
    const kinds = [["In a tab", isTab], ["The program", (v) => v.agent && !isTab(v)], ["Not here now", (v) => !v.agent]]
      .map(([name, test]) => [name, s.volunteers.filter(test)]);
    const count = (list, test) => whole(list.filter(test).length);
    renew(this.#kinds, table("Volunteers by kind and state",
      [{ name: "Kind" }, { name: "Connected", number: true }, { name: "Working", number: true }, { name: "Newcomers", number: true }, { name: "Trusted", number: true }, { name: "Expelled", number: true }, { name: "Credit", number: true, title: "Multiply-adds of accepted work" }],
      kinds.map(([name, list]) => [name, count(list, (v) => v.connected), count(list, (v) => v.leases > 0),
        count(list, (v) => v.standing === "newcomer"), count(list, (v) => v.standing === "trusted"), count(list, (v) => v.standing === "expelled"),
        big(list.reduce((sum, v) => sum + v.credit + v.provisional_credit, 0))])));
    const order = (v) => [v.connected ? 0 : 1, -(v.credit + v.provisional_credit)];
    const sorted = [...s.volunteers].sort((a, b) => order(a)[0] - order(b)[0] || order(a)[1] - order(b)[1]);
    const columns = [
      { name: "Volunteer" }, { name: "Standing" }, { name: "Runs", title: "In its own words" }, { name: "Units", number: true }, { name: "Audited", number: true },
      { name: "Credit", number: true, title: "Multiply-adds of accepted work" }, { name: "Speed", number: true, title: "Multiply-adds a second" }, { name: "State" },
    ];
    const rows = sorted.slice(0, VOLUNTEERS_SHOWN).map((v) => Object.assign([
      h("a", { href: `#/ledger?kind=unit&by=${v.peer}` }, hash(v.peer)),
      h("span", { class: `badge ${STANDINGS[v.standing] ?? ""}` }, v.standing),
      [v.engine, v.agent].filter(Boolean).join(" · ") || "–",
      whole(v.units), whole(v.audited), big(v.credit + v.provisional_credit), v.speed > 0 ? `${big(v.speed)}/s` : "–",
      v.connected ? (v.leases > 0 ? `working on ${v.leases}` : "connected") : `seen ${time(v.last_seen_s)} ago`,
    ], { kind: v.connected ? null : "gone" }));
    renew(this.#volunteers, h("div", { class: "block" }), table("Volunteers", columns, rows, "Nobody yet. Press Start under Contribute, and this machine is the first."),
      sorted.length > VOLUNTEERS_SHOWN ? h("p", { class: "quiet" }, `And ${whole(sorted.length - VOLUNTEERS_SHOWN)} more at /api/status.`) : "");
    const out = s.volunteers.filter((v) => v.standing === "expelled");
    renew(this.#expelled, ...(out.length === 0 ? [] : [h("ul", { class: "notice" }, out.map((v) => h("li", {}, "Volunteer ", hash(v.peer), ` was expelled for ${OFFENCES[v.expelled_for] ?? "an offence"}, after ${plural(v.units, "accepted unit")}.`)))]));
  }

  #showPanels(s) {
    const v = s.verification;
    renew(this.#panels.audits, pairs([
      ["Audits so far", whole(v.audits)],
      ["Found wrong", whole(v.audits_failed)],
      ["Done by other volunteers", whole(v.audits_by_volunteers)],
      ["Work computed again", percent(v.audited_work_fraction)],
      ["Least chance of an audit", percent(v.audit_probability_min)],
      [`Chance that a cheat survives ${whole(v.survival_units)} units`, v.survival_units ? chance(v.survival_probability) : null],
      ["Expelled", whole(v.expelled)],
    ]));
    renew(this.#panels.units, pairs([
      ["With volunteers", whole(s.units.leased)],
      ["Held until audited", whole(s.units.awaiting_audit)],
      ["Accepted", whole(s.units.accepted)],
      ["Accepted a minute", s.throughput.units_per_minute.toFixed(1)],
      ["Handed out again", whole(s.units.reissued)],
      ["Handed out twice", whole(s.units.backup)],
      ["Computed by the host", s.units.local ? whole(s.units.local) : null],
    ]));
    renew(this.#panels.versions, pairs([
      ["Newest", `step ${whole(s.versions.newest_ordinal)}`],
      ["Final up to", `step ${whole(s.versions.final_ordinal)}`],
      ["Provisional", whole(s.versions.provisional)],
      ["Taken back", whole(s.versions.rolled_back)],
      ["Weights", hash(s.weights, 12)],
      ["Ledger", h("a", { href: "#/ledger" }, plural(s.ledger_records, "record"))],
      ["Sent to volunteers", bytes(s.bytes.blobs_out ?? 0)],
    ]));
  }

  #showLog() {
    this.#log.replaceChildren(...(run.log.length === 0
      ? [h("li", { class: "quiet" }, "Nothing since this page was opened.")]
      : run.log.map((line) => h("li", {}, h("time", { datetime: line.at.toISOString() }, line.at.toLocaleTimeString()), line.text))));
  }
}

const card = (title, body) => h("div", { class: "card" }, h("h3", {}, title), body);

function section(title, words, ...children) {
  return h("section", { class: "block" }, h("header", {}, h("h2", {}, title), h("p", { class: "words" }, words)), ...children);
}
