// A visitor talks to the model of a run: the answers are those of the program on the same weights,
// computed in the tab.
import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, test } from "node:test";

import { runOf, SETTINGS } from "./run.mjs";
import { ROOT, accessible, directory, finalWeights, ledger, openPage, run, startBrowser, startHost, startVolunteer, trainAlone, until } from "./support.mjs";

/** A run that adapts a tiny imported model. */
const ADAPTER = runOf(3, 2).replace(/preset.*\ncontext.*\n/, 'import = "model"\n[model.lora]\nrank = 4\n');

let browser;
const runs = {};
before(async () => {
  const dir = directory();
  const tiny = join(ROOT, "tests/data/tiny/tiny.gguf");
  const imported = await run(["import", tiny, "--out", join(dir, "model"), "--no-report"]);
  assert.equal(imported.code, 0, imported.err);
  browser = await startBrowser({ webgpu: true });
  for (const [name, text] of [["scratch", runOf(2, 3)], ["imported", ADAPTER]]) {
    const runFile = join(dir, `${name}.toml`);
    writeFileSync(runFile, text);
    runs[name] = { runFile, model: join(dir, "model"), dir: join(dir, name), host: await startHost({ runFile, dir: join(dir, name) }) };
  }
});
after(async () => {
  await browser?.close();
  for (const { host } of Object.values(runs)) await host.stop();
});

/** What the program answers with the run's last weights. */
async function native({ dir, model }, prompt) {
  const args = ["sample", dir, "--model", model, "--prompt", prompt, "--greedy", "--count", "1", "--json", "--engine", "cpu"];
  const { code, out, err } = await run(args);
  assert.equal(code, 0, err);
  return JSON.parse(out);
}

async function ask(page, words) {
  await page.getByLabel("Your words").fill(words);
  await page.getByRole("button", { name: "Ask" }).click();
}

/** Addresses of blobs that the pages of a context ask for, as they do. */
function blobRequests(context) {
  const fetched = [];
  context.on("request", (request) => request.url().includes("/api/blobs/") && fetched.push(request.url()));
  return fetched;
}

/** The hash of the imported model's weights. */
async function importedWeights(url) {
  const [{ entry }] = await ledger(url);
  return entry.Open.files.find(([path]) => path.endsWith("weights"))[1];
}

const said = (page) => page.locator(".talk .assistant .said");
const settled = (page) => page.getByRole("button", { name: "Stop" }).waitFor({ state: "hidden" });

/** Asks, and returns the answer and what is said of it. */
async function answer(page, words) {
  const before = await said(page).count();
  await ask(page, words);
  await settled(page);
  const status = await page.locator("#try [role=status]").innerText();
  assert.equal(await said(page).count(), before + 1, status);
  return { text: await said(page).nth(before).innerText(), status, facts: await page.locator("#try .facts").innerText() };
}

test("a tab takes part in a run that adapts an imported model, and changes nothing", async (t) => {
  const alone = await trainAlone(runs.imported.runFile, join(directory(), "alone"));
  const visitor = await openPage(t, browser, runs.imported.host.url, "try");
  assert.match((await answer(visitor.page, "the")).facts, /^Version 0,/);
  const { page } = await openPage(t, browser, runs.imported.host.url, "contribute");
  await page.evaluate(async (settings) => {
    const { Tab } = await import("/tab.js");
    window.tab = new Tab();
    await window.tab.start({ ...settings, engine: "wasm" });
  }, SETTINGS);
  await until("the tab's first unit is accepted", () => page.evaluate(() => window.tab.state.accepted > 0));
  const volunteer = startVolunteer({ url: runs.imported.host.url, dir: join(directory(), "native") });
  assert.equal(await finalWeights(runs.imported.host.url), alone);
  await volunteer.stop();
  // The visitor has what the run adapts, and needs only what is new.
  const base = await importedWeights(runs.imported.host.url);
  await visitor.page.evaluate(async (name) => {
    const blobs = await (await navigator.storage.getDirectory()).getDirectoryHandle("blobs");
    await blobs.removeEntry(name);
  }, base);
  const fetched = blobRequests(visitor.context);
  await visitor.page.getByRole("button", { name: "Begin anew" }).click();
  const { facts } = await answer(visitor.page, "the");
  assert.ok(facts.includes(`weights ${alone.slice(0, 16)}`), facts);
  assert.ok(fetched.length > 0 && !fetched.some((url) => url.endsWith(base)), `${fetched}`);
});

for (const [name, engine, prompt] of [
  ["scratch", "wasm", "spell backward: abc = "],
  ["scratch", "webgpu", "3 + 4 ="],
  ["imported", "wasm", "the cat\nand the 2019 naïve 🙂 dog"],
  ["imported", "webgpu", "hi"],
]) {
  test(`a ${name} model answers by ${engine} as the program does`, async (t) => {
    const { host } = runs[name];
    if (name === "scratch") {
      const volunteer = startVolunteer({ url: host.url, dir: join(directory(), "native") });
      await finalWeights(host.url);
      await volunteer.stop();
    }
    const weights = await finalWeights(host.url);
    const expected = await native(runs[name], prompt);
    const { page } = await openPage(t, browser, host.url, "contribute");
    await page.getByLabel("Engine").selectOption(engine);
    await page.getByRole("link", { name: "Try it" }).click();
    await page.getByText("Nothing has been asked yet.").waitFor();
    const { text, status, facts } = await answer(page, prompt);
    assert.equal(text.trim(), expected.text.trim());
    assert.match(status, new RegExp(`^${expected.tokens.length} tokens?\\b`));
    assert.match(facts, engine === "wasm" ? /computed here with wasm/ : /computed here with [^:.]*swiftshader/i);
    assert.ok(facts.includes(`weights ${weights.slice(0, 16)}`), facts);
    assert.match(facts, name === "imported" ? /hears the whole conversation/ : /each question stands alone/);
  });
}

test("words that do not fit are refused, and a second question hears the first", async (t) => {
  const { host } = runs.imported;
  await finalWeights(host.url);
  const { page } = await openPage(t, browser, host.url, "try");
  await ask(page, "an ".repeat(2000));
  const tooLong = page.getByText("more than the model's context of 512 tokens; begin anew, or say less");
  await tooLong.waitFor();
  await page.getByRole("button", { name: "Begin anew" }).click();
  const first = await answer(page, "the first");
  // This model never ends by itself: its answer fills the context.
  await ask(page, "the first");
  await tooLong.waitFor();
  await page.getByRole("button", { name: "Begin anew" }).click();
  assert.equal(await said(page).count(), 0);
  assert.equal((await answer(page, "the first")).text, first.text);
});

test("what is being prepared is given up when it is told to, and said while it goes on", async (t) => {
  const { page, context } = await openPage(t, browser, runs.imported.host.url, "try");
  let release;
  const held = new Promise((resolve) => (release = resolve));
  await context.route("**/manyhands_engine_bg.wasm", async (route) => {
    await held;
    await route.continue();
  });
  const amounts = page.evaluate(() => new Promise((resolve) => {
    const amount = document.querySelector("#try .download span");
    new MutationObserver(() => resolve(amount.textContent)).observe(amount, { childList: true, characterData: true, subtree: true });
  }));
  await ask(page, "the");
  await page.getByRole("button", { name: "Stop" }).click();
  await page.getByText("Stopped.").waitFor();
  release();
  assert.equal(await page.getByLabel("Your words").inputValue(), "the");
  await answer(page, "the");
  assert.match(await amounts, /^[\d.]+ \w?B of [\d.]+ \w?B$/);
  for (const colorScheme of ["light", "dark"]) {
    await page.emulateMedia({ colorScheme });
    await accessible(page, `a conversation, ${colorScheme}`);
  }
});

test("a host that gives more than a tab takes is named", async (t) => {
  const { page, context } = await openPage(t, browser, runs.imported.host.url, "try");
  await context.route("**/api/ledger?*", (route) => route.fulfill({ body: " ".repeat((64 << 20) + 1) }));
  await ask(page, "the");
  await page.getByText(/There is no answer: the host gives more for .*\/api\/ledger.* than the 67108864 bytes/).waitFor();
});

test("an answer stops when it is told to", async (t) => {
  const { page } = await openPage(t, browser, runs.imported.host.url, "contribute");
  // Slow enough to be stopped.
  await page.getByLabel("Engine").selectOption("webgpu");
  await page.getByRole("link", { name: "Try it" }).click();
  await ask(page, "the");
  await said(page).waitFor();
  assert.ok(await page.getByRole("button", { name: "Begin anew", includeHidden: true }).isDisabled());
  await page.getByRole("button", { name: "Stop" }).click();
  await page.getByText(/tokens?.*, stopped\./).waitFor();
});

test("a visitor who comes again fetches no weights, unless what was kept is damaged", async (t) => {
  const { host } = runs.imported;
  const { page, context } = await openPage(t, browser, host.url, "try");
  const fetched = blobRequests(context);
  const first = await answer(page, "the");
  assert.ok(fetched.length >= 4, `${fetched.length}`);
  const again = async () => {
    fetched.length = 0;
    await page.reload();
    return answer(page, "the");
  };
  assert.equal((await again()).text, first.text);
  assert.deepEqual(fetched, []);
  const base = await importedWeights(host.url);
  await page.evaluate(async (name) => {
    const blobs = await (await navigator.storage.getDirectory()).getDirectoryHandle("blobs");
    const file = await blobs.getFileHandle(name);
    const bytes = new Uint8Array(await (await file.getFile()).arrayBuffer());
    bytes[bytes.length >> 1] ^= 1;
    const out = await file.createWritable();
    await out.write(bytes);
    await out.close();
  }, base);
  assert.equal((await again()).text, first.text);
  assert.deepEqual(fetched, [`${host.url.replace(/\/$/, "")}/api/blobs/${base}`]);
});
