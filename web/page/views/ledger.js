// The ledger: prove it, browse it, look at one record.

import { read, run } from "../data.js";
import { h, hash, pairs, put, renew, table } from "../dom.js";
import { big, plural, stage, whole } from "../words.js";
import { entry, fields, sentence, subject } from "./entries.js";
import { recompute, verifyChain } from "./proof.js";

const PAGE = 20;
const KINDS = [["", "Everything"], ["version", "Versions"], ["unit", "Units"], ["audit", "Audits"], ["contributors", "Contributors"], ["expelled", "Expulsions"]];

export class Ledger {
  #opening;
  #title = h("h1", { id: "ledger-title" }, "The ledger");
  #list = h("div");
  #one = h("div");
  #filters = h("nav", { class: "row filters", "aria-label": "Kinds of records" });
  #heading = h("h2", { tabindex: -1 }, "Records");
  #count = h("p", { class: "words" });
  #body = h("div", { class: "entries" });
  #pager = h("nav", { class: "row pager", "aria-label": "Pages" });
  // Raised by every navigation, so that a late answer does not overwrite a newer page.
  #asked = 0;
  #contributors = false;

  constructor(root, opening) {
    this.root = root;
    this.#opening = opening;
    const proof = (title, words, body) => h("section", { class: "card" }, h("h2", {}, title), h("p", { class: "words" }, words), body);
    this.#list.append(
      this.#title,
      h("p", { class: "lead" }, "Every piece of accepted work, every audit and every version of the weights, in order. Each record holds the hash of the one before and the coordination peer’s signature, so nothing can be changed afterwards without being seen."),
      h("div", { class: "proofs" },
        proof("Compute a unit again", "Take a unit that somebody else computed, do the same work on your machine, and compare the hashes.",
          recompute(opening, "Compute one again on my machine", () => this.#anyUnit())),
        proof("Verify the chain", "Hash all records again and check all signatures. Nothing is taken on trust, not even from this host.", verifyChain(opening))),
      h("section", { class: "block" }, h("header", {}, this.#heading, this.#count), this.#filters, this.#body, this.#pager));
    root.append(this.#list, this.#one);
    run.addEventListener("status", () => {
      if (root.hidden) return;
      this.#showCount();
      if (this.#contributors) this.#showContributors();
    });
  }

  show(path, query) {
    const sequence = /^\d+$/.test(path[0] ?? "") ? Number(path[0]) : null;
    this.#asked += 1;
    this.#list.hidden = sequence !== null;
    this.#one.hidden = sequence === null;
    this.root.setAttribute("aria-labelledby", sequence === null ? "ledger-title" : "record-title");
    if (sequence !== null) this.#showRecord(sequence, this.#asked);
    else this.#browse(query, this.#asked);
  }

  // A random unit among the newest, and the kind of work varies with it.
  async #anyUnit() {
    const { records } = await read(`/api/records?kind=unit&limit=100`);
    return records.length === 0 ? null : records[Math.floor(Math.random() * records.length)].sequence;
  }

  #showCount() {
    const s = run.status;
    if (s) put(this.#count, `${plural(s.ledger_records, "record")} so far.`);
  }

  async #browse(query, asked) {
    const kind = query.get("kind") ?? "";
    const by = query.get("by");
    this.#contributors = kind === "contributors";
    this.#filters.replaceChildren(...KINDS.map(([name, text]) => h("a", { class: "pill", href: name ? `#/ledger?kind=${name}` : "#/ledger", "aria-current": name === kind && !by ? "true" : null }, text)));
    if (by) this.#filters.append(h("span", { class: "quiet" }, "by ", hash(by), " ", h("a", { href: "#/ledger?kind=unit" }, "show all")));
    this.#showCount();
    if (this.#contributors) {
      this.#pager.replaceChildren();
      this.#showContributors();
      return;
    }
    const asking = new URLSearchParams({ limit: PAGE });
    for (const name of ["kind", "by", "before"]) if (query.get(name)) asking.set(name, query.get(name));
    try {
      const page = await read(`/api/records?${asking}`);
      if (asked !== this.#asked) return;
      this.#showPage(page, query);
    } catch (error) {
      if (asked !== this.#asked) return;
      this.#pager.replaceChildren();
      this.#body.replaceChildren(h("p", { class: "notice" }, `The ledger cannot be read: ${error.message}`));
    }
  }

  #showPage(page, query) {
    const kind = query.get("kind") ?? "";
    const rows = page.records.map((r) => [
      h("a", { href: `#/ledger/${r.sequence}` }, whole(r.sequence)),
      new Date(r.time_ms).toLocaleString([], { dateStyle: "short", timeStyle: "medium" }),
      h("span", {}, sentence(r)),
      hash(subject(r)),
    ]);
    const waits = { unit: "No unit yet. The first enters when it was computed and audited.", audit: "No audit yet.", version: "No version yet. The first comes with the first step.", expelled: "Nobody was expelled." };
    const empty = page.next === null ? waits[kind] ?? "No record here." : "None among these; older ones may be.";
    this.#body.replaceChildren(h("div", { class: "compact" }, table("Records, newest first", [{ name: "Record" }, { name: "When" }, { name: "What happened" }, { name: "Hash" }], rows, empty)));
    const link = (text, change) => {
      const to = new URLSearchParams(query);
      change(to);
      return h("a", { class: "pill", href: `#/ledger${to.size ? `?${to}` : ""}` }, text);
    };
    this.#pager.replaceChildren(
      query.get("before") ? link("Newest", (to) => to.delete("before")) : h("span"),
      page.next === null ? h("span") : link("Older", (to) => to.set("before", page.next)));
  }

  #showContributors() {
    const list = [...(run.status?.volunteers ?? [])].sort((a, b) => b.credit + b.provisional_credit - a.credit - a.provisional_credit);
    const rows = list.map((v) => [
      h("a", { href: `#/ledger?kind=unit&by=${v.peer}` }, hash(v.peer)),
      h("span", { class: `badge ${{ trusted: "good", expelled: "bad" }[v.standing] ?? "warn"}` }, v.standing),
      whole(v.units), whole(v.audited), big(v.credit), big(v.provisional_credit),
    ]);
    renew(this.#body, table("Contributors, most work first", [
      { name: "Contributor" }, { name: "Standing" }, { name: "Units", number: true }, { name: "Audited", number: true },
      { name: "Credit", number: true, title: "Multiply-adds whose version is final" }, { name: "Provisional", number: true, title: "Multiply-adds whose version may still be taken back" },
    ], rows, "Nobody yet. The first unit makes the first contributor."));
  }

  async #showRecord(sequence, asked) {
    const back = h("p", {}, h("a", { href: "#/ledger" }, "← The ledger"));
    const title = h("h1", { id: "record-title" }, `Record ${whole(sequence)}`);
    this.#one.replaceChildren(back, h("br"), title);
    let record;
    try {
      [record] = await read(`/api/ledger?from=${sequence}&limit=1`);
    } catch (error) {
      this.#one.append(h("p", { class: "notice" }, `The ledger cannot be read: ${error.message}`));
      return;
    }
    if (asked !== this.#asked) return;
    if (!record) {
      this.#one.append(h("p", { class: "lead" }, "There is no such record yet."));
      return;
    }
    const [name, e] = entry(record);
    this.#one.append(h("p", { class: "lead" }, sentence(record)));
    if (name === "Unit") {
      this.#one.append(h("section", { class: "card record" }, h("h2", {}, "Compute it again"),
        h("p", { class: "words" }, `The same weights, the same inputs, the same ${stage(e.path.stage)}: your machine must get the same receipt.`), h("br"),
        recompute(this.#opening, "Compute this unit again on my machine", async () => sequence)));
    }
    const card = h("section", { class: "card record", "aria-label": "Fields" }, pairs(fields(record)));
    if (name === "Open") card.append(h("details", {}, h("summary", {}, "The run file"), h("pre", { tabindex: 0 }, JSON.stringify(JSON.parse(e.config), null, 2))));
    this.#one.append(card);
    const neighbours = h("nav", { class: "row pager", "aria-label": "Neighbours" },
      sequence > 0 ? h("a", { class: "pill", href: `#/ledger/${sequence - 1}` }, "Record before") : h("span"),
      h("a", { class: "pill", href: `#/ledger/${sequence + 1}` }, "Record after"));
    this.#one.append(neighbours);
  }
}
