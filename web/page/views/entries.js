// Records of the ledger in words.

import { h, hash } from "../dom.js";
import { OFFENCES, big, bytes, plural, stage, whole } from "../words.js";

// A record's entry as [name, fields].
export function entry(record) {
  const value = record.entry;
  return typeof value === "string" ? [value, {}] : Object.entries(value)[0];
}

const by = (key) => h("a", { href: `#/ledger?kind=unit&by=${key}` }, hash(key, 8));

// What a unit is for. An evaluation looks at the weights after a step, all else works towards one.
function work(path) {
  const kind = stage(path.stage);
  return kind === "evaluation" ? `an evaluation after step ${whole(path.ordinal)}` : `a ${kind} for step ${whole(path.ordinal + 1)}`;
}

// One sentence, with links.
export function sentence(record) {
  const [name, e] = entry(record);
  const words = {
    Open: () => ["The run begins."],
    Unit: () => [`${plural(e.count, "item")} of ${work(e.path)}, by `, by(e.volunteer), "."],
    Audit: () => ["A unit of ", by(e.volunteer), " was computed again by ", by(e.auditor), e.verdict === "Valid" ? ": the same hash." : ": another hash."],
    Expelled: () => ["Volunteer ", by(e.volunteer), ` was expelled for ${OFFENCES[e.offence] ?? e.offence}.`],
    Voided: () => ["A unit of ", by(e.volunteer), " was found false and counts for nothing."],
    Version: () => [e.update === 0 ? `New weights after step ${whole(e.ordinal)}.` : `New weights within step ${whole(e.ordinal + 1)}, update ${whole(e.update)}.`],
    Final: () => [`Everything up to step ${whole(e.ordinal)} is final.`],
    RolledBack: () => [`False units had entered: the run went back to step ${whole(e.ordinal)}.`],
    Follower: () => ["Coordination peer ", hash(e.coordinator), " may go on with the run."],
    Closed: () => ["The run is complete."],
    Promoted: () => ["Coordination peer ", hash(e.coordinator), " goes on with the run."],
  };
  return (words[name] ?? (() => [`${name}.`]))();
}

// The hash that an entry is about.
export function subject(record) {
  const [, e] = entry(record);
  return e.receipt ?? e.weights ?? e.unit ?? null;
}

// All fields in words, for the page of one record.
export function fields(record) {
  const [name, e] = entry(record);
  const full = (text) => (text ? h("code", { class: "hash whole" }, text) : "–");
  const common = [
    ["Position", whole(record.sequence)],
    ["When", new Date(record.time_ms).toLocaleString()],
  ];
  const own = {
    Open: () => [["Weights before the first step", full(e.weights)], ["Digest of the arithmetic", full(e.digest)], ["Coordination peer", full(e.coordinator)]],
    Unit: () => [
      ["Work", `items ${whole(e.first)} to ${whole(e.first + e.count - 1)} of ${work(e.path)}`],
      ["Unit", full(e.unit)], ["Receipt", full(e.receipt)], ["Size of the result", bytes(e.result_bytes)],
      ["Volunteer", full(e.volunteer)], ["Its signature", full(e.signature)], ["Credit", `${big(e.multiply_adds)} multiply-adds`],
    ],
    Audit: () => [["Unit", full(e.unit)], ["Volunteer", full(e.volunteer)], ["Auditor", full(e.auditor)], ["Outcome", e.verdict === "Valid" ? "the same hash" : "another hash"], ["Receipt of the auditor", full(e.receipt)]],
    Expelled: () => [["Volunteer", full(e.volunteer)], ["For", OFFENCES[e.offence] ?? e.offence], ["Shown by unit", full(e.unit)]],
    Voided: () => [["Unit", full(e.unit)], ["Volunteer", full(e.volunteer)]],
    Version: () => [["Step", whole(e.ordinal)], ["Weights", full(e.weights)], ["Changes", `${bytes(e.delta_bytes)} on top of`], ["Weights before", full(e.base)], ["Blob of the changes", full(e.delta)]],
    Closed: () => [["Final weights", full(e.weights)]],
  }[name]?.() ?? Object.entries(e).map(([k, v]) => [k, typeof v === "string" && v.length === 64 ? full(v) : String(v)]);
  return [...common, ...own, ["Hash of the record before", full(record.previous)], ["Signature", full(record.signature)]];
}
