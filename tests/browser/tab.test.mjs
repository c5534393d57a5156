// The tab in a real browser: it trains beside native volunteers, and the weights are those of one
// machine by itself.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";

import { stageOf } from "./run.mjs";
import { startBrowser } from "./support.mjs";
import { trainTogether } from "./together.mjs";

let webgpu, plain;
before(async () => {
  [webgpu, plain] = await Promise.all([startBrowser({ webgpu: true }), startBrowser({ webgpu: false })]);
});
after(() => Promise.all([webgpu.close(), plain.close()]));

test("a tab by WebGPU, a native volunteer and a host come to the weights of one machine", async (t) => {
  const { tab, units, records } = await trainTogether(t, webgpu, "webgpu");
  const chain = await tab.call((tab) => tab.verifyChain());
  assert.deepEqual([chain.ok, chain.records, chain.first_wrong], [true, records.length, null]);
  const unit = units.findLast((u) => stageOf(u) === "Gradient");
  const again = await tab.call((tab, sequence) => tab.recompute(sequence), unit.sequence);
  assert.deepEqual([again.equal, again.claimed, again.computed], [true, unit.receipt, unit.receipt]);
});

test("a tab by wasm, a native volunteer and a host come to the weights of one machine", async (t) => {
  const { tab, units } = await trainTogether(t, plain, "wasm");
  const receipts = await tab.call((tab) => tab.receipts());
  for (const { unit, sequence, receipt } of receipts.filter((r) => r.sequence !== null)) {
    const entry = units.find((u) => u.sequence === sequence);
    assert.deepEqual([entry?.unit, entry?.receipt], [unit, receipt]);
  }
});
