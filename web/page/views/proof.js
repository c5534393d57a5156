// The two buttons that are the point of it all: re-hash the whole ledger, and compute a unit again,
// on the visitor's own machine.

import { run } from "../data.js";
import { h, hash } from "../dom.js";
import { WITHOUT_TAB } from "../own-tab.js";
import { fixed, whole } from "../words.js";

const took = (s) => (s < 1 ? `${Math.max(1, Math.round(1000 * s))} ms` : `${fixed(s, 1)} s`);

// What a person reads while and after a proof. One at a time.
class Outcome {
  root = h("div", { class: "outcome", role: "status" });

  busy(text) {
    const words = h("p", {}, text);
    const bar = h("progress", { "aria-label": text });
    this.root.className = "outcome busy";
    this.root.replaceChildren(words, bar);
    return (done, total) => {
      if (!total) return;
      bar.max = total;
      bar.value = done;
    };
  }

  say(kind, title, ...children) {
    this.root.className = `outcome ${kind}`;
    this.root.replaceChildren(h("h3", {}, title), ...children);
  }
}

// A button that needs the tab; without one it says why it is not there.
class TabButton {
  outcome = new Outcome();
  #tab = null;

  constructor(opening, text, work) {
    this.button = h("button", { class: "main", type: "button", disabled: true, click: () => this.press(work) }, text);
    this.root = h("div", {}, h("div", { class: "row" }, this.button), this.outcome.root);
    opening.then((tab) => {
      this.#tab = tab;
      if (tab === null) this.outcome.say("quiet", "", h("p", {}, WITHOUT_TAB));
      else this.button.disabled = false;
    }, (error) => this.outcome.say("wrong", "This does not work now", h("p", {}, `${error.message}. Reload the page to try again.`)));
  }

  async press(work) {
    this.button.disabled = true;
    try {
      await work(this.#tab, this.outcome);
    } catch (error) {
      this.outcome.say("wrong", "It could not be computed", h("p", {}, error.message ?? String(error)));
    }
    this.button.disabled = false;
  }
}

export function verifyChain(opening) {
  return new TabButton(opening, "Verify the chain", async (tab, outcome) => {
    const progress = outcome.busy("Hashing every record and checking every signature, on your machine.");
    const found = await tab.verifyChain((done, total) => progress(done, total ?? run.status?.ledger_records));
    if (found.ok) {
      outcome.say("right", "The chain is whole.",
        h("p", {}, `All ${whole(found.records)} records hang together, from the first to `, hash(found.head, 12), `, and every signature is right. ${whole(found.versions)} versions of the weights are named.`),
        h("p", { class: "quiet" }, "Anyone who sees the same last hash has the same history."));
    } else {
      outcome.say("wrong", "The chain is broken.",
        h("p", {}, `The first record that does not fit is number ${whole(found.first_wrong.sequence)}: ${found.first_wrong.why}. What comes after it proves nothing; whoever runs this host should explain it.`));
    }
  }).root;
}

// `sequence` says which unit, when it is pressed; it may have to look one up first.
export function recompute(opening, text, sequence) {
  return new TabButton(opening, text, async (tab, outcome) => {
    outcome.busy("Fetching the weights and the inputs of the unit, then computing it on your machine.");
    const at = await sequence();
    if (at === null) {
      outcome.say("quiet", "There is no unit yet", h("p", {}, "The first one enters the ledger when a volunteer has computed it and an audit has passed."));
      return;
    }
    const found = await tab.recompute(at);
    const where = h("a", { href: `#/ledger/${at}` }, `record ${whole(at)}`);
    const compare = h("dl", { class: "compare" },
      h("div", {}, h("dt", {}, "In the ledger"), h("dd", {}, h("code", {}, found.claimed))),
      h("div", {}, h("dt", {}, "Computed here"), h("dd", {}, h("code", {}, found.computed))));
    if (found.equal) {
      outcome.say("right", "The hash is the same.", compare,
        h("p", {}, "Your machine did the work of ", where, ` again, in ${took(found.seconds)} with ${found.engine}, and got the same bytes. Nobody had to be trusted.`));
    } else {
      outcome.say("wrong", "The hash is another one.", compare,
        h("p", {}, "Your machine got other bytes than ", where, " says. One of the two computed wrongly; the other engine under Settings can tell whether it is yours."));
    }
  }).root;
}

