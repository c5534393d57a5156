// Whatever goes wrong in a tab costs the unit in hand at most, is said, and credits nothing twice.
import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";

import { SETTINGS, assertNothingTwice, runOf, unitsOf } from "./run.mjs";
import { directory, free, ledger, openTab, startBrowser, startHost, until } from "./support.mjs";

/** How long the host is away. */
const AWAY_MS = 20_000;

let browser;
before(async () => (browser = await startBrowser({ webgpu: true })));
after(() => browser.close());

/** A host that a tab will keep busy for as long as the test lasts, on a port that it keeps. */
async function longRun(t) {
  const dir = directory();
  const runFile = join(dir, "run.toml");
  writeFileSync(runFile, runOf(100_000, 1));
  const args = ["--http", `127.0.0.1:${await free()}`];
  const start = () => startHost({ runFile, dir: join(dir, "host"), args });
  const running = { host: await start() };
  running.again = async () => (running.host = await start());
  t.after(() => running.host.stop());
  return running;
}

/** Waits until more units are accepted than before. */
async function goesOn(tab, what) {
  const { accepted } = await tab.state();
  await tab.until(`${what}, units are accepted again`, (state) => state.accepted > accepted + 1);
}

test("a host that is away for a while is found again, and so is a tab that is reloaded", async (t) => {
  const { host, again } = await longRun(t);
  const tab = await openTab(browser, host.url);
  t.after(() => tab.close());
  await tab.start({ ...SETTINGS, engine: "wasm" });
  await tab.until("a unit is accepted", (state) => state.accepted > 0);

  await host.stop();
  await tab.hears("the connection to the host is lost");
  await tab.until("it looks for the host", (state) => state.stage === "connecting");
  await sleep(AWAY_MS);
  const back = await again();
  await goesOn(tab, "after the host was away");

  const { peer, accepted } = await tab.until("a unit is in hand", (state) => state.unit !== null);
  await tab.reload();
  await tab.until("what was done is known", (state) => state.accepted >= accepted);
  await tab.start();
  await goesOn(tab, "after a reload");
  const state = await tab.state();
  assert.equal(state.peer, peer, "the identity is the same");

  const receipts = await tab.call((tab) => tab.receipts());
  const records = await ledger(back.url);
  assertNothingTwice(records);
  const units = new Map(unitsOf(records, peer).map((unit) => [unit.sequence, unit]));
  const placed = receipts.filter((receipt) => receipt.sequence !== null);
  assert.equal(new Set(placed.map((receipt) => receipt.sequence)).size, placed.length);
  for (const { sequence, unit, receipt } of placed) {
    const entry = units.get(sequence);
    assert.deepEqual([entry?.unit, entry?.receipt], [unit, receipt]);
  }
  assert.ok(state.accepted <= units.size, "no more credit than the ledger gives");
});

test("a machine that sleeps loses the unit in hand at most", async (t) => {
  const { host } = await longRun(t);
  const own = await startBrowser({ webgpu: false });
  const tab = await openTab(own, host.url);
  t.after(() => own.close());
  await tab.start({ ...SETTINGS, engine: "wasm" });
  const { peer } = await tab.until("a unit is accepted", (state) => state.accepted > 0);
  await tab.until("a unit is in hand", (state) => state.unit !== null);
  const devtools = await own.newBrowserCDPSession();
  const { processInfo } = await devtools.send("SystemInfo.getProcessInfo");
  const renderers = processInfo.filter(({ type }) => type === "renderer").map(({ id }) => id);
  assert.ok(renderers.length > 0);
  renderers.forEach((pid) => process.kill(pid, "SIGSTOP"));
  try {
    await until("the host gives its work up", async () => {
      const { volunteers } = await (await fetch(`${host.url}/api/status`)).json();
      const own = volunteers.find((v) => v.peer === peer);
      return own.leases === 0;
    });
  } finally {
    renderers.forEach((pid) => process.kill(pid, "SIGCONT"));
  }
  await goesOn(tab, "after it woke up");
  assert.equal((await tab.state()).peer, peer);
  assertNothingTwice(await ledger(host.url));
});

test("a lost device is replaced, and the unit in hand begins again", async (t) => {
  const { host } = await longRun(t);
  const context = await browser.newContext();
  // The engine's devices, where the test can reach them: it opens several, and keeps the fastest.
  await context.route("**/engine.js", async (route) => {
    const answer = await route.fetch();
    const hook = `
      const ask = GPUAdapter.prototype.requestDevice;
      self.devices = [];
      GPUAdapter.prototype.requestDevice = async function (...args) {
        const device = await ask.apply(this, args);
        self.devices.push(device);
        return device;
      };`;
    await route.fulfill({ response: answer, body: (await answer.text()) + hook });
  });
  const tab = await openTab(browser, host.url, context);
  t.after(() => tab.close());
  await tab.start({ ...SETTINGS, engine: "webgpu" });
  const { peer } = await tab.until("a unit is accepted", (state) => state.accepted > 0);
  assert.equal((await tab.state()).engine.kind, "webgpu");
  await tab.until("a unit is in hand", (state) => state.unit !== null);
  const engine = tab.page.workers().find((worker) => worker.url().endsWith("/engine.js"));
  await engine.evaluate(() => self.devices.forEach((device) => device.destroy()));
  await tab.hears("an engine was lost");
  await goesOn(tab, "with a new engine");
  const state = await tab.state();
  assert.deepEqual([state.engine.kind, state.peer], ["webgpu", peer]);
  assertNothingTwice(await ledger(host.url));
});

test("weights are kept up to the cap, and make room for newer ones", async (t) => {
  const { host } = await longRun(t);
  const tab = await openTab(browser, host.url);
  t.after(() => tab.close());
  const cap = 600_000;
  await tab.start({ ...SETTINGS, engine: "wasm", cache_mb: cap / 1e6 });
  const { cached_bytes } = await tab.until("more came than is to be kept", (state) => state.weights_in > 2 * cap);
  assert.ok(cached_bytes > 0 && cached_bytes <= cap, `${cached_bytes} are kept`);
  await tab.call((tab) => tab.stop());
  const sizes = await tab.page.evaluate(async () => {
    const blobs = await (await navigator.storage.getDirectory()).getDirectoryHandle("blobs");
    const sizes = [];
    for await (const handle of blobs.values()) sizes.push((await handle.getFile()).size);
    return sizes;
  });
  const sum = sizes.reduce((a, b) => a + b, 0);
  assert.ok(sum > 0 && sum <= cap, `files of ${sizes} are kept`);
  // What is left is enough to go on with.
  await tab.start();
  await goesOn(tab, "with what was kept");
});

test("kept weights are not fetched again, unless they are damaged; a full disk is no end", async (t) => {
  const { host } = await longRun(t);
  const tab = await openTab(browser, host.url);
  t.after(() => tab.close());
  await tab.start({ ...SETTINGS, engine: "wasm" });
  await tab.until("a unit is accepted", (state) => state.accepted > 0);
  assert.ok((await tab.until("weights are kept", (s) => s.cached_bytes > 0)).cached_bytes > 10_000);
  await tab.call((tab) => tab.stop());

  const damage = async () => {
    const root = await navigator.storage.getDirectory();
    const blobs = await root.getDirectoryHandle("blobs");
    let count = 0;
    for await (const handle of blobs.values()) {
      const bytes = new Uint8Array(await (await handle.getFile()).arrayBuffer());
      bytes[bytes.length >> 1] ^= 1;
      const writing = await handle.createWritable();
      await writing.write(bytes);
      await writing.close();
      count += 1;
    }
    return count;
  };
  assert.ok((await tab.page.evaluate(damage)) > 0);
  await tab.start();
  await tab.hears("a kept file was damaged");
  await goesOn(tab, "with damaged files");
  await tab.call((tab) => tab.stop());

  const protocol = await tab.context.newCDPSession(tab.page);
  const origin = new URL(tab.page.url()).origin;
  await protocol.send("Storage.overrideQuotaForOrigin", { origin, quotaSize: 1 });
  await tab.page.evaluate(async () => {
    const root = await navigator.storage.getDirectory();
    await root.removeEntry("blobs", { recursive: true });
  });
  await tab.start();
  await tab.hears("storage takes no more");
  await goesOn(tab, "with a full disk");
  assertNothingTwice(await ledger(host.url));
});
