// A run for the tests, and what its ledger says.
import assert from "node:assert/strict";

/** A run of two phases, small enough for seconds; so many units of a newcomer are audited. */
export const runOf = (sft, rl, audits = 3) => `
name = "browser"
seed = 4
[model]
preset = "nano"
context = 64
[[task]]
family = "count_bits"
level = 1
[[task]]
family = "spell_backward"
level = 1
[sft]
steps = ${sft}
batch = 16
[sft.optimizer]
learning_rate = 3e-3
[rl]
steps = ${rl}
prompts = 4
group_size = 4
max_new_tokens = 12
updates = 2
policy_lag = 1
[rl.learn.optimizer]
learning_rate = 1e-3
[eval]
problems = 8
samples = 2
k = [1, 2]
[checkpoint]
every = 5
[swarm]
unit_seconds = 0.2
newcomer_audits = ${audits}
silence_seconds = 5.0
`;

export const SETTINGS = { only_visible: false, only_mains: false, threads: 2 };

export const unitsOf = (records, peer) => {
  const units = records.filter(({ entry }) => entry.Unit?.volunteer === peer);
  return units.map(({ sequence, entry }) => ({ sequence, ...entry.Unit }));
};
export const stageOf = (unit) => (typeof unit.path.stage === "string" ? unit.path.stage : Object.keys(unit.path.stage)[0]);
export const auditsOf = (records, peer) => records.filter(({ entry }) => entry.Audit?.volunteer === peer).map(({ entry }) => entry.Audit);

/** No part of any job stands twice in the ledger. */
export function assertNothingTwice(records) {
  const voided = new Set(records.filter(({ entry }) => entry.Voided).map(({ entry }) => entry.Voided.unit));
  const places = records.flatMap(({ entry }) => {
    return entry.Unit && !voided.has(entry.Unit.unit) ? [JSON.stringify([entry.Unit.path, entry.Unit.first])] : [];
  });
  assert.equal(new Set(places).size, places.length, "a unit is credited twice");
}
