// The tab in Firefox: the same bits from another engine for WebAssembly, and from another
// implementation of WebGPU.
import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, test } from "node:test";

import { hasFirefox, startFirefox } from "./firefox.mjs";
import { runOf, stageOf } from "./run.mjs";
import { directory, finalWeights, ledger, openTab, startHost, startVolunteer } from "./support.mjs";
import { trainTogether } from "./together.mjs";

const skip = hasFirefox ? false : "there is no Firefox; FIREFOX names one";
if (skip) console.error(`SKIPPED: the tab in Firefox, because ${skip}`);

let firefox;
before(async () => (firefox = hasFirefox && (await startFirefox())));
after(() => firefox && firefox.close());

test("a tab of Firefox by wasm, a native volunteer and a host come to the weights of one machine", { skip }, async (t) => {
  const { state } = await trainTogether(t, firefox, "wasm");
  t.diagnostic(`Firefox ${firefox.version}, ${state.engine.name}: first accepted unit after ${state.first_credit_s.toFixed(1)} s`);
});

test("WebGPU of Firefox computes the published digest, and the rollouts and gradients of a run", { skip }, async (t) => {
  const dir = directory();
  writeFileSync(join(dir, "run.toml"), runOf(1, 1));
  const host = await startHost({ runFile: join(dir, "run.toml"), dir: join(dir, "host") });
  t.after(() => host.stop());
  const volunteer = startVolunteer({ url: host.url, dir: join(dir, "native") });
  await finalWeights(host.url);
  await volunteer.stop();
  const entries = (await ledger(host.url)).flatMap(({ entry }) => (entry.Unit ? [entry.Unit] : []));
  const units = ["Rollout", "Gradient"].map((kind) => entries.findLast((unit) => stageOf(unit) === kind));
  const tab = await openTab(firefox, host.url);
  t.after(() => tab.close());
  // The engine by itself: a tab gives an adapter up that takes minutes, as this one may.
  const { report, problem, seconds, receipts } = await tab.page.evaluate(async (units) => {
    const { default: init } = await import("/pkg/manyhands_engine.js");
    await init({ module_or_path: "/pkg/manyhands_engine_bg.wasm" });
    const { default: initWeb, hash_of, unit_weights } = await import("/pkg/manyhands_web.js");
    await initWeb({ module_or_path: "/pkg/manyhands_web_bg.wasm" });
    const { open } = await import("/engines.js");
    const { load, readWhole } = await import("/run-chain.js");
    const started = performance.now();
    const { engine, report, problem } = await open("webgpu", 1);
    const seconds = (performance.now() - started) / 1000;
    if (!engine) return { report, problem };
    const chain = await readWhole();
    engine.model(chain.model());
    const get = async (hash) => new Uint8Array(await (await fetch(`/api/blobs/${hash}`)).arrayBuffer());
    const receipts = [];
    for (const name of units) {
      const unit = await get(name);
      await load(engine, chain, unit_weights(unit, chain.model()), { get });
      receipts.push(hash_of(await engine.compute(unit, () => {})));
    }
    return { report, problem, seconds, receipts };
  }, units.map(({ unit }) => unit));
  assert.equal(report?.kind, "webgpu", problem ?? report?.problem);
  assert.deepEqual([report.digest, report.pass], [tab.published, true]);
  assert.deepEqual(receipts, units.map(({ receipt }) => receipt));
  t.diagnostic(`Firefox ${firefox.version}, WebGPU: proved and measured in ${seconds.toFixed(1)} s`);
});
