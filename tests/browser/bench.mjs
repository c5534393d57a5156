// The tab against the native program, for the same two units of a real run, one worker against one
// thread:  node tests/browser/bench.mjs
// WebGPU against wgpu, both on Chromium's software driver; wasm SIMD against the native CPU engine;
// and how long a browser takes to its first accepted unit, cold and warm.
import { execFileSync } from "node:child_process";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { loadavg } from "node:os";
import { join } from "node:path";

import { initSync, Chain, unit_weights } from "../../target/web/manyhands_web.js";
import { SETTINGS, runOf, stageOf } from "./run.mjs";
import { ROOT, directory, ledger, openTab, startBrowser, startHost, startVolunteer, until } from "./support.mjs";

// The driver that Debian's Chromium uses where there is no GPU.
const SWIFTSHADER = "/usr/lib/chromium/vk_swiftshader_icd.json";
const KINDS = ["Rollout", "Gradient"];

const dir = directory();
const runFile = join(dir, "run.toml");
const text = runOf(2, 40)
  .replace('"nano"', '"micro"')
  .replace("unit_seconds = 0.2", "unit_seconds = 0.5")
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
  const blobs = await Promise.all(JSON.parse(chain.plan(weights)).at(-1).blobs.map(blob));
  const task = join(dir, KINDS[i].toLowerCase());
  mkdirSync(task);
  writeFileSync(join(task, "unit"), bytes);
  writeFileSync(join(task, "model.json"), chain.model());
  blobs.forEach((b, j) => writeFileSync(join(task, `blob-${String(j).padStart(4, "0")}`), b));
  tasks.push({ kind: KINDS[i], dir: task, weights, receipt: unit.receipt, multiply_adds: unit.multiply_adds, bytes, blobs });
}

/** What a native engine takes, on one of the Vulkan drivers. */
function native(engine, driver) {
  const args = ["run", "--quiet", "--locked", "--release", "-p", "manyhands-tests", "--example", "unit_seconds", "--", engine];
  const env = { ...process.env, ...(driver && { VK_DRIVER_FILES: driver, VK_ICD_FILENAMES: driver }) };
  return JSON.parse(execFileSync("cargo", [...args, ...tasks.map((t) => t.dir)], { cwd: ROOT, env, encoding: "utf8", stdio: ["ignore", "pipe", "inherit"] }));
}

/** The same in a page of the browser: the fastest of two executions after the first, which compiles. */
async function inBrowser(browser, url, kind) {
  const tab = await openTab(browser, url);
  const list = tasks.map((t) => ({ ...t, bytes: [...t.bytes], blobs: t.blobs.map((b) => [...b]) }));
  const units = await tab.page.evaluate(
    async ({ kind, list, model }) => {
      const { default: init, hash_of } = await import("/pkg/manyhands_web.js");
      const { default: initEngine } = await import("/pkg/manyhands_engine.js");
      const { open } = await import("/engines.js");
      await init({ module_or_path: "/pkg/manyhands_web_bg.wasm" });
      await initEngine({ module_or_path: "/pkg/manyhands_engine_bg.wasm" });
      const { engine, report, problem } = await open(kind, 1);
      if (report?.kind !== kind) throw new Error(problem ?? report.problem);
      const out = [];
      for (const task of list) {
        // A count of submissions for each.
        engine.model(model);
        engine.load(task.weights, undefined, task.blobs.map((b) => Uint8Array.from(b)));
        let seconds = Infinity;
        for (let i = 0; i < 3; i++) {
          const started = performance.now();
          const receipt = hash_of(await engine.compute(Uint8Array.from(task.bytes), () => {}));
          if (i > 0) seconds = Math.min(seconds, (performance.now() - started) / 1000);
          if (receipt !== task.receipt) throw new Error("another receipt");
        }
        out.push({ seconds, submissions: JSON.parse(engine.submissions() ?? "null") });
      }
      return { name: report.name, units: out };
    },
    { kind, list, model: chain.model() },
  );
  await tab.close();
  return units;
}

const said = ({ count, p99_ms, max_ms, longest, compiling_count, compiling_max_ms }) =>
  `${count} submissions, 99 of 100 within ${p99_ms.toFixed(0)} ms, the longest ${max_ms.toFixed(0)} ms (${longest}); ${compiling_count} more compiled, up to ${compiling_max_ms.toFixed(0)} ms`;

console.log(`load of the machine before: ${loadavg().map((l) => l.toFixed(1)).join(" ")}`);
const browser = await startBrowser({ webgpu: true });
const pairs = [
  [await inBrowser(browser, host.url, "wasm"), native("cpu")],
  [await inBrowser(browser, host.url, "webgpu"), native("wgpu", SWIFTSHADER)],
];
const lavapipe = native("wgpu");
for (const [i, { kind, multiply_adds }] of tasks.entries()) {
  console.log(`${kind} unit of ${(multiply_adds / 1e9).toFixed(2)} G multiply-adds`);
  for (const [mine, theirs] of pairs) {
    const [a, b] = [mine.units[i], theirs.units[i]];
    console.log(`  ${mine.name}: ${a.seconds.toFixed(2)} s; native ${theirs.name}: ${b.seconds.toFixed(2)} s; the tab has ${(b.seconds / a.seconds).toFixed(2)} of its speed`);
    if (a.submissions) console.log(`    in the tab ${said(a.submissions)}\n    natively ${said(b.submissions)}`);
  }
  console.log(`  for comparison, native ${lavapipe.name}: ${lavapipe.units[i].seconds.toFixed(2)} s\n    ${said(lavapipe.units[i].submissions)}`);
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
console.log(`load of the machine after: ${loadavg().map((l) => l.toFixed(1)).join(" ")}`);
