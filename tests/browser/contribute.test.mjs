// Contribute on the real page with the real engines: its buttons, what outlasts a reload, a warm
// start, and a page that did not come over https.
import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, test } from "node:test";

import { runOf } from "./run.mjs";
import {
  diagnostics, directory, ledger, openPage, press, startBrowser, startHost, startVolunteer, unitsByOthers, until,
} from "./support.mjs";

let browser;
before(async () => (browser = await startBrowser({ webgpu: true })));
after(() => browser.close());

/** A host whose run lasts as long as the test. */
async function longRun(t, text = runOf(100_000, 1), args = []) {
  const dir = directory();
  const runFile = join(dir, "run.toml");
  writeFileSync(runFile, text);
  const host = await startHost({ runFile, dir: join(dir, "host"), args });
  t.after(() => host.stop());
  const volunteer = () => {
    const native = startVolunteer({ url: host.url, dir: join(dir, "native") });
    t.after(() => native.stop());
  };
  return { host, volunteer };
}

const accepted = async (figure) => Number((await figure("units accepted")).replaceAll(",", ""));
const computed = async (page) => {
  const words = await page.getByText("computed in all.").innerText();
  return Number(/([\d,]+) computed in all/.exec(words)[1].replaceAll(",", ""));
};

test("start, pause, resume and stop do what they say, and what was given outlasts a reload", async (t) => {
  const { host, volunteer } = await longRun(t);
  const { page, figure } = await openPage(t, browser, host.url, "contribute");
  await page.getByLabel("Engine").selectOption("wasm");
  await press(page, "Start");
  await page.getByRole("heading", { name: "Your machine is helping" }).waitFor();
  await until("a unit is accepted", async () => (await figure("units accepted")) !== "0");
  await page.getByText("WebAssembly").getByText("passed the conformance suite").waitFor();
  volunteer();
  await unitsByOthers(host.url, 1);

  // The unit in hand is finished, and no other begins while somebody else does ten.
  const pause = async () => {
    await press(page, "Pause");
    await page.getByRole("heading", { name: "Paused" }).waitFor();
    await page.locator('.dial[data-state="resting"]').waitFor();
    await page.locator(".doing").waitFor({ state: "hidden" });
    // Its receipt is kept a moment later.
    await unitsByOthers(host.url, 1);
    return computed(page);
  };
  const paused = await pause();
  await unitsByOthers(host.url, 10);
  assert.equal(await computed(page), paused);
  await press(page, "Resume");
  await until("it goes on", async () => (await computed(page)) > paused);

  // Nothing is left that could compute.
  await page.locator(".doing").waitFor();
  await press(page, "Stop");
  await page.getByRole("heading", { name: "Stopped" }).waitFor();
  await page.locator(".doing").waitFor({ state: "hidden" });
  await until("the workers have ended", () => page.workers().length === 0);
  const stopped = await computed(page);
  await until("the host knows that it left", async () => {
    const { volunteers } = await (await fetch(`${host.url}/api/status`)).json();
    return !volunteers.some(({ agent }) => agent.startsWith("tab"));
  });
  await unitsByOthers(host.url, 10);
  assert.equal(await computed(page), stopped);

  await press(page, "Start");
  await until("it goes on", async () => (await computed(page)) > stopped);
  const done = await pause();
  const given = await accepted(figure);
  const hashes = () => page.locator(".receipts td:nth-child(4) code").evaluateAll((all) => all.map((code) => code.title));
  const receipts = await hashes();
  await page.reload();
  await until("what was given is known", async () => (await accepted(figure).catch(() => -1)) >= given);
  assert.equal(await computed(page), done);
  await until("the receipts are shown", async () => (await hashes()).length === receipts.length);
  assert.deepEqual(await hashes(), receipts);
  const link = page.locator(".receipts").getByRole("link").first();
  const sequence = Number((await link.getAttribute("href")).split("/").at(-1));
  const { unit, receipt } = (await ledger(host.url))[sequence].entry.Unit;
  await link.click();
  for (const hash of [unit, receipt]) await page.locator("#ledger").getByText(hash).waitFor();
});

for (const [name, engines] of [["WebGPU", ["webgpu", "webgpu"]], ["WebAssembly", ["wasm", "wasm"]], ["one much slower than the one before", ["wasm", "webgpu"]]]) {
  test(`the first accepted unit comes soon, and of weights a warm start fetches nothing, by ${name}`, async (t) => {
    // One step has more units than the test will see: the weights stay what they are.
    const { host } = await longRun(t, runOf(100_000, 1).replace("batch = 16", "batch = 4096"));
    const context = await browser.newContext();
    t.after(() => context.close());
    for (const [i, engine] of engines.entries()) {
      const { page, figure } = await openPage(t, browser, host.url, "contribute", context);
      await page.getByLabel("Engine").selectOption(engine);
      await press(page, "Start");
      const seconds = await until("the first credit of this visit is shown", () =>
        figure("to the first credit of this visit").catch(() => null)).catch(async (error) => {
        throw new Error(`${error.message}: ${await page.locator("#contribute").innerText()}`);
      });
      const words = await page.locator(".events").innerText();
      const told = Number(/the first unit of this visit was accepted after ([\d.]+) s/.exec(words)[1]);
      // The one is rounded to seconds, the other to tenths.
      assert.ok(Math.abs(Number(seconds.replace(" s", "")) - told) < 0.56, `${seconds}, ${told}`);
      const [, fetched] = /of which weights (.+)/.exec(await diagnostics(page, "Received"));
      t.diagnostic(`first accepted unit by ${engine}: after ${told} s with ${fetched} of weights`);
      assert.equal(fetched === "0 B", i > 0);
      assert.notEqual(await diagnostics(page, "Weights kept"), "0 B");
      await page.close();
    }
  });
}

test("over plain http the page says what WebGPU needs, and computes by WebAssembly", async (t) => {
  const { host } = await longRun(t);
  const far = await startBrowser({ webgpu: true, args: ["--host-resolver-rules=MAP run.test 127.0.0.1"] });
  const { page, figure } = await openPage(t, far, host.url.replace("127.0.0.1", "run.test"), "contribute");
  t.after(() => far.close());
  assert.equal(await page.evaluate(() => isSecureContext), false);
  await page.getByText("Browsers keep WebGPU to secure pages").waitFor();
  await press(page, "Start");
  await until("a unit is accepted", async () => (await figure("units accepted").catch(() => "0")) !== "0");
  await page.getByText("WebAssembly").getByText("a page over plain http has no WebGPU").waitFor();
});
