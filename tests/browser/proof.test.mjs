// The ledger's two buttons, on the real page with the real engines: a visitor hashes and computes
// again what a native volunteer did, and finds what was changed on the way.
import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, test } from "node:test";

import { runOf } from "./run.mjs";
import { directory, finalWeights, ledger, openPage, startBrowser, startHost, startVolunteer } from "./support.mjs";

let browser, host, records;
before(async () => {
  const dir = directory();
  const runFile = join(dir, "run.toml");
  writeFileSync(runFile, runOf(2, 3));
  browser = await startBrowser({ webgpu: true });
  host = await startHost({ runFile, dir: join(dir, "host") });
  const volunteer = startVolunteer({ url: host.url, dir: join(dir, "native") });
  await finalWeights(host.url);
  await volunteer.stop();
  records = await ledger(host.url);
});
after(async () => {
  await browser?.close();
  await host?.stop();
});

const verify = (page) => page.getByRole("button", { name: "Verify the chain" }).click();
const compute = (page) => page.getByRole("button", { name: "Compute one again on my machine" }).click();

test("the page verifies the whole chain, and says how much it was", async (t) => {
  const { page } = await openPage(t, browser, host.url, "ledger");
  await verify(page);
  await page.getByRole("heading", { name: "The chain is whole." }).waitFor();
  const words = await page.locator(".outcome.right").innerText();
  assert.match(words, new RegExp(`All ${records.length.toLocaleString("en")} records hang together`));
  const weights = new Set(records.flatMap(({ entry }) => entry.Open?.weights ?? entry.Version?.weights ?? []));
  assert.match(words, new RegExp(`${weights.size} versions of the weights`));
});

for (const [engine, name] of [["webgpu", "WebGPU"], ["wasm", "WebAssembly"]]) {
  test(`the page computes a unit of somebody else again by ${name}, and gets the hash of the ledger`, async (t) => {
    const { page } = await openPage(t, browser, host.url, "contribute");
    await page.getByLabel("Engine").selectOption(engine);
    await page.getByRole("link", { name: "The ledger" }).click();
    await compute(page);
    await page.getByRole("heading", { name: "The hash is the same." }).waitFor();
    const outcome = page.locator(".outcome.right");
    const [claimed, computed] = await outcome.locator("dd code").allInnerTexts();
    const at = Number((await outcome.getByRole("link").getAttribute("href")).split("/").at(-1));
    assert.deepEqual([claimed, computed], [records[at].entry.Unit.receipt, records[at].entry.Unit.receipt]);
    assert.match(await outcome.innerText(), engine === "wasm" ? /with wasm/ : /swiftshader/i);
  });
}

/** The other digit. */
const flip = (hex) => (hex[0] === "0" ? "1" : "0") + hex.slice(1);
const last = (name) => records.findLast(({ entry }) => entry[name]).sequence;

test("one byte that was changed on the way is found, and the record is named", async (t) => {
  const { page } = await openPage(t, browser, host.url, "ledger");
  let change;
  await page.route("**/api/ledger?*", async (route) => {
    const answer = await route.fetch();
    const shown = await answer.json();
    shown.forEach((record) => change?.(record));
    await route.fulfill({ response: answer, json: shown });
  });
  for (const [sequence, spoil] of [
    [last("Unit"), (record) => (record.entry.Unit.receipt = flip(record.entry.Unit.receipt))],
    [last("Version"), (record) => (record.entry.Version.weights = flip(record.entry.Version.weights))],
    [1, (record) => (record.signature = flip(record.signature))],
    [2, (record) => (record.time_ms += 1)],
    [records.length - 1, (record) => (record.previous = flip(record.previous))],
  ]) {
    change = (record) => record.sequence === sequence && spoil(record);
    await verify(page);
    await page.getByText(`The first record that does not fit is number ${sequence.toLocaleString("en")}:`).waitFor();
    await compute(page);
    await page.getByText("It could not be computed").waitFor();
    await page.getByText("the ledger is broken").waitFor();
    // The next round's words must be its own.
    change = null;
    await verify(page);
    await page.getByRole("heading", { name: "The chain is whole." }).waitFor();
  }
});

test("inputs of a unit that were changed on the way are not computed with", async (t) => {
  const { page } = await openPage(t, browser, host.url, "ledger");
  await page.route("**/api/blobs/*", async (route) => {
    const answer = await route.fetch();
    const body = await answer.body();
    body[body.length >> 1] ^= 1;
    await route.fulfill({ response: answer, body });
  });
  await compute(page);
  await page.getByText("the host gives other bytes for").waitFor();
});
