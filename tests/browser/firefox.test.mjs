// The tab in Firefox: the same bits from another engine for WebAssembly, and from another
// implementation of WebGPU.
import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, test } from "node:test";

import { hasFirefox, startFirefox } from "./firefox.mjs";
import { runOf } from "./run.mjs";
import { directory, openTab, startHost } from "./support.mjs";
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

test("WebGPU of Firefox computes the published digest", { skip }, async (t) => {
  const dir = directory();
  writeFileSync(join(dir, "run.toml"), runOf(1, 1));
  const host = await startHost({ runFile: join(dir, "run.toml"), dir: join(dir, "host") });
  t.after(() => host.stop());
  const tab = await openTab(firefox, host.url);
  t.after(() => tab.close());
  // The engine by itself: a tab gives an adapter up that takes minutes, as this one may.
  const { report, problem, seconds } = await tab.page.evaluate(async () => {
    const { default: init } = await import("/pkg/manyhands_engine.js");
    await init({ module_or_path: "/pkg/manyhands_engine_bg.wasm" });
    const { open } = await import("/engines.js");
    const started = performance.now();
    const { report, problem } = await open("webgpu", 1);
    return { report, problem, seconds: (performance.now() - started) / 1000 };
  });
  assert.equal(report?.kind, "webgpu", problem ?? report?.problem);
  assert.deepEqual([report.digest, report.pass], [tab.published, true]);
  t.diagnostic(`Firefox ${firefox.version}, WebGPU: proved and measured in ${seconds.toFixed(1)} s`);
});
