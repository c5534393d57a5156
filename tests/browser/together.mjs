// A tab, a native volunteer and a host train together, and come to the weights of one machine.
import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { join } from "node:path";

import { SETTINGS, assertNothingTwice, auditsOf, runOf, stageOf, unitsOf } from "./run.mjs";
import { directory, finalWeights, ledger, openTab, startHost, startVolunteer, trainAlone, until } from "./support.mjs";

/** A file of the run and the weights that one machine comes to. */
async function prepare() {
  const dir = directory();
  const runFile = join(dir, "run.toml");
  // All units are audited, so that those of both kinds are.
  writeFileSync(runFile, runOf(2, 6, 1000));
  return { dir, runFile, alone: await trainAlone(runFile, join(dir, "alone")) };
}

/** The tab begins alone, until it has done some of everything; all that it did is audited. */
export async function trainTogether(t, browser, kind) {
  const { dir, runFile, alone } = await prepare();
  const host = await startHost({ runFile, dir: join(dir, "host") });
  t.after(() => host.stop());
  const tab = await openTab(browser, host.url);
  t.after(() => tab.close());
  await tab.start({ ...SETTINGS, engine: kind });
  const { peer } = await tab.until("a unit is accepted", (state) => state.accepted > 0);
  await until("the tab has a rollout and a gradient in the ledger", async () => {
    const stages = new Set(unitsOf(await ledger(host.url), peer).map(stageOf));
    return stages.has("Rollout") && stages.has("Gradient");
  });
  const volunteer = startVolunteer({ url: host.url, dir: join(dir, "native") });
  t.after(() => volunteer.stop());
  assert.equal(await finalWeights(host.url), alone);

  const state = await tab.state();
  assert.equal(state.engine.kind, kind, state.engine.problem);
  assert.equal(state.engine.digest, tab.published);
  assert.ok(state.engine.pass && state.speed > 0 && state.first_credit_s > 0);
  const records = await ledger(host.url);
  assertNothingTwice(records);
  const units = unitsOf(records, state.peer);
  const stages = new Set(units.map(stageOf));
  assert.ok(stages.has("Rollout") && stages.has("Gradient"), `only ${[...stages]}`);
  const audits = auditsOf(records, state.peer);
  const audited = new Set(audits.filter((a) => a.verdict === "Valid").map((a) => a.unit));
  for (const stage of ["Rollout", "Gradient"]) {
    assert.ok(units.some((u) => stageOf(u) === stage && audited.has(u.unit)), `no audited ${stage}`);
  }
  const natives = records.filter(({ entry }) => entry.Unit && entry.Unit.volunteer !== state.peer);
  assert.ok(natives.length > 0, "the native volunteer did nothing");
  return { host, tab, records, units, state };
}
