// Contribute: one button, what this machine is doing, what it gave, and when it may work.

import { run } from "../data.js";
import { copyButton, h, hash, put, table } from "../dom.js";
import { WITHOUT_TAB } from "../own-tab.js";
import { bytes, big, time, whole } from "../words.js";
import { Diagnostics } from "./diagnostics.js";
import { Settings } from "./settings.js";

const RING = 2 * Math.PI * 88;
const RECEIPTS_SHOWN = 12;
const EVENTS_SHOWN = 8;
// Receipts are read again when the number of units has changed, or after this long.
const RECEIPTS_EVERY_MS = 5000;

const KINDS = { rollout: "a rollout", check: "a check of somebody's rollout", score: "a score", gradient: "a gradient" };

const STAGES = {
  idle: ["Ready when you are", "Your machine first proves that it computes the right bits, then takes small pieces of work. There is nothing to install and no account."],
  checking: ["Checking your machine", "It runs the conformance suite: a few hundred small calculations whose exact result is known."],
  connecting: ["Finding the run", "Connecting to the coordination peer that served this page."],
  waiting: ["Waiting for work", "Your machine is ready. The next piece comes when a step needs one."],
  working: ["Your machine is helping", "Each piece is announced by its hash before its bytes are sent. Leave whenever you like: at most the piece in hand is lost."],
  resting: ["Resting", ""],
  stopped: ["Stopped", "Everything that was accepted is yours and stays in the ledger."],
  failed: ["It does not work here", ""],
};

const RUNNING = new Set(["checking", "connecting", "waiting", "working", "resting"]);

export class Contribute {
  #tab = null;
  #paused = false;
  #receiptsAt = 0;
  #receiptsOf = -1;
  #circle;
  #button = h("button", { type: "button", disabled: true, click: () => this.#press() }, "Start");
  #stop = h("button", { class: "plain", type: "button", hidden: true, click: () => this.#halt() }, "Stop");
  #dial;
  #heading = h("h2", {}, STAGES.idle[0]);
  #reason = h("p", { class: "words" }, "Loading the part that computes.");
  #doing = h("p", { class: "doing" });
  #engine = h("p", { class: "engine-line", hidden: true });
  #given = h("div");
  #receipts = h("div", { class: "receipts" });
  #events = h("div");
  #notice = h("div");
  #join = h("code", { tabindex: 0, "aria-label": "Command to join with the program" });
  #title = h("h1", { id: "contribute-title" }, "Lend a hand");
  #lead = h("p", { class: "lead" });
  #settings;
  #diagnostics = new Diagnostics();

  constructor(root, opening) {
    this.root = root;
    const svg = "http://www.w3.org/2000/svg";
    const ring = document.createElementNS(svg, "svg");
    ring.setAttribute("viewBox", "0 0 188 188");
    ring.setAttribute("aria-hidden", "true");
    const circle = (name) => {
      const c = document.createElementNS(svg, "circle");
      for (const [k, v] of [["class", name], ["cx", 94], ["cy", 94], ["r", 88]]) c.setAttribute(k, v);
      ring.append(c);
      return c;
    };
    circle("track");
    this.#circle = circle("done");
    this.#circle.style.strokeDasharray = RING;
    this.#circle.style.strokeDashoffset = RING;
    this.#dial = h("div", { class: "dial" }, ring, this.#button);
    this.#settings = new Settings((changed) => this.#tab?.configure(changed));
    // Only the heading and the reason are announced: numbers would chatter.
    const live = h("div", { role: "status" }, this.#heading, this.#reason);
    root.append(
      this.#title, this.#lead, this.#notice,
      h("div", { class: "card stage" }, this.#dial,
        h("div", { class: "now" }, live, this.#doing, this.#engine, h("div", { class: "row" }, this.#stop))),
      section("What you gave", "Work counts once it was accepted, and it is yours for good: the ledger names it.", this.#given),
      section("Receipts", "Each result has a hash, announced before its bytes. Follow one into the ledger.", this.#receipts),
      section("Settings", "Changes apply at once and are kept in this browser.", this.#settings.root),
      section("What happened here", null, this.#events, this.#diagnostics.root),
      h("section", { class: "block" }, h("div", { class: "card program" },
        h("div", {}, h("h2", {}, "More than a tab"),
          h("p", { class: "words" }, "The program uses all of a machine, and works without a browser.")),
        h("div", { class: "command" }, this.#join, copyButton(this.#join)))),
    );
    this.#showRun();
    this.#showGiven(null);
    this.#showReceipts([]);
    this.#showEvents([]);
    this.#warn();
    run.addEventListener("status", () => this.#showRun());
    opening.then((tab) => this.#adopt(tab), (error) => this.#without(`The part that computes cannot be loaded: ${error.message}. Reload the page to try again.`));
  }

  show() {}

  async #adopt(tab) {
    if (tab === null) return this.#without(WITHOUT_TAB);
    this.#tab = tab;
    tab.addEventListener("state", () => this.#show());
    this.#settings.set(await tab.settings());
    this.#button.disabled = false;
    this.#show();
    this.#readReceipts();
  }

  #without(text) {
    put(this.#heading, STAGES.failed[0]);
    put(this.#reason, text);
    this.#settings.disable();
  }

  #press() {
    const { stage } = this.#tab.state;
    if (!RUNNING.has(stage)) {
      this.#paused = false;
      this.#tab.start(this.#settings.get());
    } else if (this.#paused) {
      this.#paused = false;
      this.#tab.resume();
    } else {
      this.#paused = true;
      this.#tab.pause();
    }
    this.#show();
  }

  #halt() {
    this.#paused = false;
    this.#tab.stop();
    this.#button.focus();
    this.#show();
  }

  #show() {
    const s = this.#tab.state;
    const running = RUNNING.has(s.stage);
    const [heading, words] = STAGES[s.stage];
    put(this.#heading, this.#paused && running ? "Paused" : heading);
    put(this.#reason, this.#paused && running ? "Your machine rests until you press Resume." : s.reason ?? words);
    put(this.#button, !running ? "Start" : this.#paused ? "Resume" : "Pause");
    this.#stop.hidden = !running;
    this.#dial.dataset.state = s.stage;
    this.#showUnit(s);
    this.#showEngine(s);
    this.#showGiven(s);
    this.#showEvents(s.events);
    this.#diagnostics.show(s);
    if (s.computed !== this.#receiptsOf || Date.now() - this.#receiptsAt > RECEIPTS_EVERY_MS) {
      this.#receiptsOf = s.computed;
      this.#readReceipts();
    }
  }

  #showUnit(s) {
    const unit = s.unit;
    const share = unit && unit.total > 0 ? Math.min(1, unit.done / unit.total) : 0;
    this.#circle.style.strokeDashoffset = RING * (1 - share);
    this.#doing.hidden = !unit;
    if (!unit) return;
    this.#doing.replaceChildren(
      `Computing ${KINDS[unit.kind] ?? unit.kind}, policy `, hash(unit.policy, 8),
      `, ${whole(unit.done)} of ${whole(unit.total)} tokens`,
      s.tokens_per_second ? `, ${big(s.tokens_per_second)} tokens/s.` : ".");
  }

  #showEngine(s) {
    const e = s.engine;
    this.#engine.hidden = !e;
    if (!e) return;
    const kind = e.kind === "webgpu" ? "WebGPU" : "WebAssembly";
    const { name } = e;
    const mark = h("span", { class: `badge ${e.pass ? "good" : "bad"}` }, e.pass ? "Exact" : "Wrong bits");
    const words = e.pass
      ? `${kind}${name ? ` (${name})` : ""} passed the conformance suite.`
      : `${kind}${name ? ` (${name})` : ""} failed the conformance suite.`;
    this.#engine.replaceChildren(mark, h("span", {}, words, e.problem ? ` ${e.problem}` : "", e.digest ? [" Digest ", hash(e.digest, 8), "."] : ""));
  }

  #showGiven(s) {
    if (!s || (s.computed === 0 && s.accepted === 0 && !RUNNING.has(s.stage))) {
      this.#given.replaceChildren(h("p", { class: "quiet" }, "Nothing yet. It begins with the first unit that the run accepts after you press Start."));
      return;
    }
    const own = run.status?.volunteers.find((v) => v.peer === s.peer);
    const rows = [
      ["units accepted", whole(s.accepted)],
      ["multiply-adds of accepted work", big(s.multiply_adds)],
      ["of your units audited and found right", own ? whole(own.audited) : null],
      ["to the first credit of this visit", s.first_credit_s === null ? null : time(s.first_credit_s)],
    ].filter(([, value]) => value !== null);
    const list = h("dl", { class: "figures" }, rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
    const standing = own ? { newcomer: "Newcomer: every unit is audited before it counts.", trusted: "Trusted: a random part of your units is audited.", expelled: "Expelled." }[own.standing] : null;
    this.#given.replaceChildren(list, h("p", { class: "quiet" },
      [standing, `${whole(s.computed)} computed in all.`, `${bytes(s.bytes_in)} received, ${bytes(s.bytes_out)} sent, ${bytes(s.cached_bytes)} of weights kept for next time.`].filter(Boolean).join(" ")));
    this.#given.lastChild.style.marginTop = "18px";
  }

  async #readReceipts() {
    this.#receiptsAt = Date.now();
    this.#showReceipts(await this.#tab.receipts());
  }

  #showReceipts(list) {
    const rows = list.slice(0, RECEIPTS_SHOWN).map((r) => [
      new Date(r.at_ms).toLocaleTimeString(),
      r.kind,
      hash(r.unit),
      hash(r.receipt),
      bytes(r.bytes),
      r.sequence === null ? "waits for its audit" : h("a", { href: `#/ledger/${r.sequence}` }, `record ${whole(r.sequence)}`),
    ]);
    const columns = [{ name: "When" }, { name: "Kind" }, { name: "Unit", slim: true }, { name: "Receipt" }, { name: "Size", number: true, slim: true }, { name: "In the ledger" }];
    this.#receipts.replaceChildren(table("Your newest receipts", columns, rows, "No receipt yet. The first comes with the first unit that your machine computes."));
    if (list.length > RECEIPTS_SHOWN) this.#receipts.append(h("p", { class: "quiet" }, `And ${whole(list.length - RECEIPTS_SHOWN)} older ones in this browser.`));
  }

  #showEvents(events) {
    if (events.length === 0) {
      this.#events.replaceChildren(h("p", { class: "quiet" }, "Nothing yet. What your tab does, and what goes wrong, is told here."));
      return;
    }
    const newest = [...events].sort((a, b) => b.at_ms - a.at_ms).slice(0, EVENTS_SHOWN);
    this.#events.replaceChildren(h("ol", { class: "events" }, newest.map((e) =>
      h("li", {}, h("time", { datetime: new Date(e.at_ms).toISOString() }, new Date(e.at_ms).toLocaleTimeString()), h("span", {}, e.text)))));
  }

  #showRun() {
    const s = run.status;
    put(this.#title, s?.name ? `Lend a hand to “${s.name}”` : "Lend a hand");
    const size = s ? `a model of ${big(s.parameters)} parameters` : "a small model";
    put(this.#lead, `Together, many machines teach ${size} to reason. Yours computes small pieces, and a hash proves each one, so nobody has to trust anybody.`);
    put(this.#join, `manyhands join ${s?.join || location.origin}`);
  }

  #warn() {
    if (isSecureContext) return;
    this.#notice.replaceChildren(h("p", { class: "notice block" },
      h("strong", {}, "This page came over plain http. "),
      "Browsers keep WebGPU to secure pages, so your tab will compute with WebAssembly: the same bits, more slowly. For https the operator starts the host with --tls-cert and --tls-key, with --domain, or behind a reverse proxy."));
  }
}

function section(title, words, ...children) {
  const head = h("header", {}, h("h2", {}, title), words ? h("p", { class: "words" }, words) : null);
  return h("section", { class: "block" }, head, ...children);
}
