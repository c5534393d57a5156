// The tab against the native program, for the same two units of a real run, one worker against one
// thread:  node tests/browser/bench.mjs
// WebGPU (SwiftShader in a browser without a GPU) against wgpu (lavapipe), wasm SIMD against the
// native CPU engine; and how long a browser takes to its first accepted unit, cold and warm.
import { execFileSync } from "node:child_process";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";

import { initSync, Chain, unit_weights } from "../../target/web/manyhands_web.js";
import { SETTINGS, runOf, stageOf } from "./run.mjs";
import { ROOT, directory, ledger, openTab, startBrowser, startHost, startVolunteer, until } from "./support.mjs";

const KINDS = ["Rollout", "Gradient"];

const dir = directory();
const runFile = join(dir, "run.toml");
const text = runOf(2, 40)
  .replace('"nano"', '"micro"')
  .replace("unit_seconds = 0.2", "unit_seconds = 1.0")
  .replace("prompts = 4\ngroup_size = 4", "prompts = 16\ngroup_size = 8");
writeFileSync(runFile, text);
const host = await startHost({ runFile, dir: join(dir, "host") });
const volunteer = startVolunteer({ url: host.url, dir: join(dir, "native") });
const units = await until("a rollout and a gradient of reinforcement learning are in the ledger", async () => {
  const entries = (await ledger(host.url)).flatMap(({ entry }) => (entry.Unit ? [entry.Unit] : []));
  const last = KINDS.map((kind) => entries.filter((u) => stageOf(u) === kind && u.path.ordinal > 2));
  return last.every((found) => found.length > 0) && last.map((found) => found.reduce((a, b) => (a.multiply_adds > b.multiply_adds ? a : b)));
});
await volunteer.stop();

// What makes the units: their bytes, and the blobs of their weights.
const blob = async (hash) => new Uint8Array(await (await fetch(`${host.url}/api/blobs/${hash}`)).arrayBuffer());
initSync({ module: readFileSync(join(ROOT, "target/web/manyhands_web_bg.wasm")) });
const chain = new Chain();
while (chain.push(await (await fetch(`${host.url}/api/ledger?from=${chain.records()}&limit=1000`)).text()) > 0);
const tasks = [];
for (const [i, unit] of units.entries()) {
  const bytes = await blob(unit.unit);
  const weights = unit_weights(bytes, chain.model());
  const blobs = await Promise.all(chain.plan(weights).map(blob));
  const task = join(dir, KINDS[i].toLowerCase());
  mkdirSync(task);
  writeFileSync(join(task, "unit"), bytes);
  writeFileSync(join(task, "model.json"), chain.model());
  blobs.forEach((b, j) => writeFileSync(join(task, `blob-${String(j).padStart(4, "0")}`), b));
  tasks.push({ kind: KINDS[i], dir: task, weights, receipt: unit.receipt, multiply_adds: unit.multiply_adds, bytes, blobs });
}

const native = JSON.parse(
  execFileSync("cargo", ["run", "--quiet", "--release", "-p", "manyhands-tests", "--example", "unit_seconds", "--", ...tasks.map((t) => t.dir)], {
    cwd: ROOT,
    encoding: "utf8",
    stdio: ["ignore", "pipe", "inherit"],
  }),
);

/** Seconds of the second of two executions in a page of the browser. */
async function inBrowser(browser, url, kind) {
  const tab = await openTab(browser, url);
  const list = tasks.map((t) => ({ ...t, bytes: [...t.bytes], blobs: t.blobs.map((b) => [...b]) }));
  const seconds = await tab.page.evaluate(
    async ({ kind, list, model }) => {
      const { default: init, hash_of } = await import("/pkg/manyhands_web.js");
      const { default: initEngine } = await import("/pkg/manyhands_engine.js");
      const { open } = await import("/engines.js");
      await init({ module_or_path: "/pkg/manyhands_web_bg.wasm" });
      await initEngine({ module_or_path: "/pkg/manyhands_engine_bg.wasm" });
      const { engine, report, problem } = await open(kind, 1);
      if (report?.kind !== kind) throw new Error(problem ?? report.problem);
      engine.model(model);
      const out = [];
      for (const task of list) {
        engine.load(task.weights, undefined, task.blobs.map((b) => Uint8Array.from(b)));
        let seconds;
        for (let i = 0; i < 2; i++) {
          const started = performance.now();
          const receipt = hash_of(await engine.compute(Uint8Array.from(task.bytes), () => {}));
          seconds = (performance.now() - started) / 1000;
          if (receipt !== task.receipt) throw new Error("another receipt");
        }
        out.push(seconds);
      }
      return out;
    },
    { kind, list, model: chain.model() },
  );
  await tab.close();
  return seconds;
}

const browser = await startBrowser({ webgpu: true });
const tab = {};
for (const kind of ["webgpu", "wasm"]) tab[kind] = await inBrowser(browser, host.url, kind);
for (const [i, { kind, multiply_adds }] of tasks.entries()) {
  console.log(`${kind} unit of ${(multiply_adds / 1e9).toFixed(2)} G multiply-adds`);
  for (const [mine, theirs] of [["webgpu", "wgpu"], ["wasm", "cpu"]]) {
    const [a, b] = [tab[mine][i], native[theirs][i]];
    console.log(`  ${mine.padEnd(6)} ${a.toFixed(2)} s, native ${native.names[theirs]} ${b.toFixed(2)} s: ${(b / a).toFixed(2)} of its speed`);
  }
}

for (const engine of ["wasm", "webgpu"]) {
  const context = await browser.newContext();
  for (const cache of ["cold", "warm"]) {
    const tab = await openTab(browser, host.url, context);
    await tab.start({ ...SETTINGS, engine });
    const { first_credit_s } = await tab.until("a unit is accepted", (state) => state.first_credit_s !== null);
    console.log(`first accepted unit, ${engine}, ${cache} cache: ${first_credit_s.toFixed(1)} s after page load`);
    await tab.page.close();
  }
  await context.close();
}
await browser.close();
await host.stop();
