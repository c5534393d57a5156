// Sample rollouts: what the model was asked, what it answered, and how sure it was of each token.

import { run } from "../data.js";
import { h } from "../dom.js";
import { fixed, plural, whole } from "../words.js";

// Entropy in nats at which a token has the full tint; advantage likewise.
const ENTROPY_FULL = 1.5;
const ADVANTAGE_FULL = 1.5;
const LEVELS = 6;

const SHADES = [["entropy", "Entropy"], ["advantage", "Advantage"], ["none", "None"]];

const right = (group) => group.rollouts.filter((r) => r.reward >= 1).length;

export class Samples {
  root = h("div");
  // What the person chose; until then the first group with right and wrong answers is shown.
  #chosen = null;
  #first = 0;
  #shade = "entropy";
  // Shown groups stay while the person reads; newer ones are a button away.
  #groups = [];
  #list = h("ol", { class: "problems", "aria-label": "Problems, newest first" });
  #detail = h("div");
  #more = h("button", { class: "small", type: "button", hidden: true, click: () => this.#renew() }, "Show newer ones");
  #shades = h("div", { class: "row", role: "group", "aria-label": "Shade tokens by" }, h("span", { class: "quiet" }, "Shade tokens by"),
    SHADES.map(([name, text]) => h("button", { class: "small", type: "button", "aria-pressed": String(name === "entropy"), "data-shade": name, click: () => this.#shadeBy(name) }, text)));
  #scale = h("span", { class: "scale quiet" });
  #body = h("div", { class: "card" });

  constructor() {
    this.root.append(this.#body);
    run.addEventListener("samples", () => this.#arrived());
    this.#show();
  }

  #arrived() {
    const newest = run.samples.groups.at(-1);
    const mine = this.#groups[0];
    if (!newest) return;
    if (!mine || this.#chosen === null) this.#renew();
    else this.#more.hidden = newest.step === mine.step && newest.index === mine.index;
  }

  #renew() {
    this.#groups = [...run.samples.groups].reverse();
    this.#chosen = null;
    this.#first = Math.max(0, this.#groups.findIndex((g) => right(g) > 0 && right(g) < g.rollouts.length));
    this.#more.hidden = true;
    this.#show();
  }

  #shadeBy(name) {
    this.#shade = name;
    for (const button of this.#shades.querySelectorAll("button")) button.setAttribute("aria-pressed", String(button.dataset.shade === name));
    this.#showGroup();
  }

  #show() {
    if (this.#groups.length === 0) {
      this.#body.replaceChildren(h("p", { class: "quiet" }, "None yet. They appear when a step of reinforcement learning is done after the host was started."));
      return;
    }
    this.#list.replaceChildren(...this.#groups.map((g, i) => h("li", {},
      h("button", { type: "button", "aria-pressed": String(i === (this.#chosen ?? this.#first)), click: () => this.#choose(i) },
        h("span", { class: "mono" }, g.problem), h("span", { class: "quiet" }, `step ${whole(g.step)} · ${right(g)} right, ${g.rollouts.length - right(g)} wrong`)))));
    this.#body.replaceChildren(
      h("div", { class: "row" }, this.#shades, this.#scale, this.#more), h("br"),
      h("div", { class: "samples" }, this.#list, this.#detail));
    this.#showGroup();
  }

  #choose(i) {
    this.#chosen = i;
    [...this.#list.querySelectorAll("button")].forEach((b, j) => b.setAttribute("aria-pressed", String(i === j)));
    this.#showGroup();
  }

  #showGroup() {
    const g = this.#groups[this.#chosen ?? this.#first];
    if (!g) return;
    const words = { entropy: ["certain", "entropy", "undecided"], advantage: ["discouraged", "advantage", "encouraged"] }[this.#shade];
    this.#scale.replaceChildren(...(words ? [words[0], h("i", { class: words[1] }), words[2]] : []));
    this.#detail.replaceChildren(
      h("p", { class: "quiet" }, `Step ${whole(g.step)}, sampled by policy version ${whole(g.policy_version)}. ${plural(g.rollouts.length, "answer")} of ${whole(g.rollouts_sampled)} shown.`),
      h("div", { class: "problem mono", tabindex: 0, "aria-label": "Problem" }, g.problem),
      ...g.rollouts.map((r, i) => this.#rollout(r, i)));
  }

  #rollout(r, i) {
    const advantage = r.advantage === null ? null : `advantage ${r.advantage > 0 ? "+" : ""}${fixed(r.advantage, 2)}`;
    return h("article", { class: "rollout", "aria-label": `Answer ${i + 1}` },
      h("header", {},
        h("span", { class: `badge ${r.reward >= 1 ? "good" : r.reward > 0 ? "warn" : "bad"}` }, r.reward >= 1 ? "Right" : r.reward > 0 ? `Reward ${fixed(r.reward, 2)}` : r.ended ? "Wrong" : "Cut off"),
        h("span", { class: "quiet" }, [plural(r.length, "token"), advantage].filter(Boolean).join(" · "))),
      h("p", { class: "tokens" }, r.tokens.map((text, t) => this.#token(text, r, t)),
        r.length > r.tokens.length ? h("span", { class: "end" }, ` and ${whole(r.length - r.tokens.length)} more tokens`) : r.ended ? h("span", { class: "end" }, " end") : null));
  }

  #token(text, r, t) {
    if (text === "") return null;
    const level = (v, full) => Math.round(Math.min(1, v / full) * LEVELS);
    const span = h("span", { title: `entropy ${fixed(r.entropies[t], 2)} nats` }, text);
    let heat = 0;
    if (this.#shade === "entropy") {
      heat = level(r.entropies[t], ENTROPY_FULL);
      if (heat > 0) span.dataset.heat = heat;
    } else if (this.#shade === "advantage" && r.advantage !== null) {
      heat = level(Math.abs(r.advantage), ADVANTAGE_FULL);
      if (heat > 0) span.dataset.push = r.advantage > 0 ? "up" : "down";
    }
    span.style.setProperty("--heat", heat);
    return span;
  }
}
