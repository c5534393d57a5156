// The page: every view with live data of a real run, by mouse and by keyboard, in light and dark,
// wide and narrow, under its policy, and behind a reverse proxy.

import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, test } from "node:test";

import { RUN } from "./page-run.mjs";
import { accessible, directory, startBrowser, startHost, startVolunteer, until } from "./support.mjs";

const WIDTHS = { desktop: { width: 1280, height: 900 }, phone: { width: 390, height: 844 } };
const VIEWS = ["contribute", "run", "try", "ledger"];

let host;
let browser;

const api = async (path) => (await fetch(host.url + path)).json();

before(async () => {
  const dir = directory();
  writeFileSync(join(dir, "run.toml"), RUN);
  host = await startHost({ runFile: join(dir, "run.toml"), dir: join(dir, "host") });
  const volunteer = startVolunteer({ url: host.url, dir: join(dir, "volunteer") });
  await volunteer.ended;
  browser = await startBrowser({ webgpu: false });
});

after(async () => {
  await browser?.close();
  await host?.stop();
});

// A page that notes whatever should not happen.
async function open(view, { scheme = "light", viewport = WIDTHS.desktop, prepare } = {}) {
  const context = await browser.newContext({ colorScheme: scheme, viewport });
  const page = await context.newPage();
  const faults = [];
  page.on("pageerror", (error) => faults.push(`error: ${error.message}`));
  page.on("request", (request) => {
    const { protocol, host: to } = new URL(request.url());
    if (to !== new URL(host.url).host && !["data:", "blob:"].includes(protocol)) faults.push(`request to ${request.url()}`);
  });
  await page.addInitScript(() => {
    addEventListener("securitypolicyviolation", (event) => console.error(`policy: ${event.violatedDirective} ${event.blockedURI}`));
  });
  page.on("console", (message) => {
    if (message.text().startsWith("policy:")) faults.push(message.text());
  });
  await prepare?.(page);
  await page.goto(`${host.url}/#/${view}`);
  const close = async () => {
    await context.close();
    assert.deepEqual(faults, []);
  };
  return { page, close };
}

// A tab whose answers the test decides, for states that a good run never shows.
const scripted = (body) => async (page) => {
  await page.route("**/pkg/manyhands_web_bg.wasm", (route) => route.fulfill({ status: 200, body: "" }));
  await page.route("**/tab.js", (route) => route.fulfill({ contentType: "text/javascript", body: `
    const settings = { engine: "auto", threads: 1, duty: 0.5, only_visible: true, only_mains: true, hours: "22-7", data_cap_mb: 500, cache_mb: 256 };
    export class Tab extends EventTarget {
      calls = window.calls = [];
      state = { stage: "idle", reason: null, secure: true, run: null, peer: null, engine: null, speed: 0, unit: null, tokens_per_second: null,
        accepted: 0, computed: 0, multiply_adds: 0, first_credit_s: null, bytes_in: 0, bytes_out: 0, cached_bytes: 0, events: [] };
      constructor() { super(); window.tab = this; }
      become(change) { Object.assign(this.state, change); this.dispatchEvent(new Event("state")); }
      start(s) { this.calls.push(["start", s]); this.become({ stage: "checking" }); }
      stop() { this.calls.push(["stop"]); this.become({ stage: "stopped", unit: null }); }
      pause() { this.calls.push(["pause"]); }
      resume() { this.calls.push(["resume"]); }
      configure(s) { this.calls.push(["configure", s]); }
      async settings() { return settings; }
      async receipts() { return window.receipts ?? []; }
      ${body}
    }` }));
};

test("the run shows what the API says, and every chart has its data", async () => {
  // The ledger has its last record a moment before.
  const status = await until("the run is done", async () => {
    const now = await api("/api/status");
    return now.state === "done" && now;
  });
  const { page, close } = await open("run");
  await page.getByRole("heading", { level: 1, name: "page-test", exact: true }).waitFor();
  const view = page.locator("#run");
  await view.getByText(`Step ${status.ordinal} of ${status.steps}`).waitFor();
  for (const name of ["Reward", "pass@1 and pass@k", "Token entropy", "Answer entropy", "KL to the reference", "Policy lag", "Speed", "Loss"]) {
    const chart = view.locator("figure", { has: page.getByRole("heading", { name, exact: true }) });
    await chart.locator("canvas").waitFor();
    assert.match(await chart.locator(".readout").innerText(), /Step \d+/, name);
  }
  const reward = Math.round(100 * status.last_step.reward);
  assert.match(await view.locator("figure").first().locator(".readout").innerText(), new RegExp(`step ${reward}`));
  await view.getByRole("row", { name: new RegExp(status.volunteers[0].peer.slice(0, 10)) }).waitFor();
  // The volunteer has left, and only it had said that it is a program.
  const kind = (name) => view.getByRole("row", { name }).locator("td").allInnerTexts();
  const [program, gone] = [await kind(/^The program/), await kind(/^Not here now/)];
  assert.deepEqual([program[1], program.at(-1), gone[1], gone.at(-1) !== "0"], ["0", "0", "0", true]);
  assert.match(await view.getByText("Audits so far").locator("..").innerText(), new RegExp(String(status.verification.audits)));
  await close();
});

test("sample rollouts are those of the newest mixed group, shaded as one chooses", async () => {
  const { groups } = await api("/api/samples");
  const right = (g) => g.rollouts.filter((r) => r.reward >= 1).length;
  const newest = groups.findLast((g) => right(g) > 0 && right(g) < g.rollouts.length) ?? groups.at(-1);
  assert.ok(groups.length > 0 && groups.length <= 24);
  for (const rollout of groups.flatMap((g) => g.rollouts)) assert.equal(rollout.tokens.length, rollout.entropies.length);
  const { page, close } = await open("run");
  await page.locator(".problem").waitFor();
  assert.equal(await page.locator(".problem").innerText(), newest.problem);
  const shown = await page.locator(".rollout .tokens").first().innerText();
  assert.ok(shown.startsWith(newest.rollouts[0].tokens.join("").trim().slice(0, 8)), shown);
  assert.equal(await page.locator(".rollout").count(), newest.rollouts.length);
  await page.getByRole("button", { name: "Advantage" }).click();
  const pushed = await page.locator(".tokens [data-push]").count();
  const moved = newest.rollouts.filter((r) => Math.abs(r.advantage ?? 0) > 0.2).length;
  assert.equal(pushed > 0, moved > 0);
  await page.getByRole("button", { name: "None" }).click();
  assert.equal(await page.locator(".tokens [data-push], .tokens [data-heat]").count(), 0);
  await close();
});

test("zooming one chart zooms all, by mouse and by keyboard", async () => {
  const { page, close } = await open("run");
  const plot = page.locator(".plot").last();
  await plot.locator("canvas").waitFor();
  await plot.scrollIntoViewIfNeeded();
  const box = await plot.locator(".u-over").boundingBox();
  await page.mouse.move(box.x + box.width * 0.3, box.y + 50);
  await page.mouse.down();
  await page.mouse.move(box.x + box.width * 0.6, box.y + 60, { steps: 5 });
  await page.mouse.up();
  const all = page.getByRole("button", { name: "All", exact: true });
  await until("the zoom is shown", async () => (await all.getAttribute("aria-pressed")) === "false");
  await plot.focus();
  await page.keyboard.press("0");
  assert.equal(await all.getAttribute("aria-pressed"), "true");
  await page.keyboard.press("Home");
  const first = await page.locator("#spoken").textContent();
  await page.keyboard.press("ArrowRight");
  const second = await page.locator("#spoken").textContent();
  assert.match(first, /^Step 1 .*supervised/);
  assert.match(second, /^Step 2 /);
  await page.keyboard.press("+");
  assert.equal(await all.getAttribute("aria-pressed"), "false");
  await close();
});

test("the ledger is browsed by kind and page, down to one record", async () => {
  const status = await api("/api/status");
  const { page, close } = await open("ledger");
  const rows = page.locator(".entries tbody tr");
  await page.getByRole("link", { name: String((status.ledger_records - 1).toLocaleString("en")), exact: true }).waitFor();
  assert.equal(await rows.count(), 20);
  await page.getByRole("link", { name: "Older" }).click();
  await page.getByRole("link", { name: "Newest" }).waitFor();
  await page.getByRole("link", { name: "Units" }).click();
  await until("only units are shown", async () => {
    const texts = await rows.allInnerTexts();
    return texts.length > 0 && texts.every((text) => / items? of /.test(text));
  });
  await rows.first().getByRole("link").first().click();
  const sequence = Number(new URL(page.url()).hash.split("/").at(-1));
  const [record] = await api(`/api/ledger?from=${sequence}&limit=1`);
  await page.getByText(record.entry.Unit.receipt).waitFor();
  await page.goBack();
  await page.getByRole("link", { name: "Contributors" }).click();
  await page.getByRole("row", { name: new RegExp(status.volunteers[0].peer.slice(0, 10)) }).waitFor();
  await page.goto(`${host.url}/#/ledger/0`);
  await page.getByText("The run begins.").waitFor();
  await page.getByText("The run file").click();
  await page.getByText('"name": "page-test"').waitFor();
  await close();
});

test("a proof says in words that the hash is the same, or that it is not", async () => {
  const { page, close } = await open("ledger", { prepare: scripted(`
    async recompute(sequence) {
      const [record] = await (await fetch("/api/ledger?from=" + sequence + "&limit=1")).json();
      const { unit, receipt } = record.entry.Unit;
      return { unit, claimed: receipt, computed: window.other ?? receipt, equal: !window.other, seconds: 1.25, engine: "WebAssembly" };
    }
    async verifyChain(progress) {
      progress(1, 2);
      return { ok: !window.other, records: 12, versions: 3, head: "ab".repeat(32), first_wrong: window.other ? { sequence: 7, why: "the signature is another one's" } : null };
    }`) });
  await page.getByRole("button", { name: "Compute one again on my machine" }).click();
  await page.getByRole("heading", { name: "The hash is the same." }).waitFor();
  await page.getByRole("button", { name: "Verify the chain" }).click();
  await page.getByRole("heading", { name: "The chain is whole." }).waitFor();
  await page.evaluate(() => { window.other = "cd".repeat(32); });
  await page.getByRole("button", { name: "Compute one again on my machine" }).click();
  await page.getByRole("heading", { name: "The hash is another one." }).waitFor();
  await page.getByRole("button", { name: "Verify the chain" }).click();
  await page.getByText("number 7: the signature is another one's").waitFor();
  await page.evaluate(() => { window.tab.recompute = async () => { throw new Error("the graphics device was lost"); }; });
  await page.getByRole("button", { name: "Compute one again on my machine" }).click();
  await page.getByText("the graphics device was lost").waitFor();
  await close();
});

test("contribute starts, pauses, stops and shows what was given", async () => {
  const { page, close } = await open("contribute", { prepare: scripted("") });
  const calls = (name) => page.evaluate((name) => window.calls.filter((c) => c[0] === name), name);
  await page.getByText("Nothing yet. It begins with the first unit").waitFor();
  const slider = page.getByLabel("How hard");
  await until("kept settings are shown", async () => (await slider.inputValue()) === "50");
  assert.equal(await page.getByLabel("From").inputValue(), "22");
  await page.getByRole("button", { name: "Start", exact: true }).click();
  const [[, settings]] = await calls("start");
  assert.deepEqual(settings, { engine: "auto", threads: 1, duty: 0.5, only_visible: true, only_mains: true, hours: "22-7", data_cap_mb: 500, cache_mb: 256 });
  await page.evaluate(() => {
    window.receipts = [{ unit: "ab".repeat(32), receipt: "cd".repeat(32), kind: "rollout", at_ms: 1, bytes: 2048, sequence: 5 }];
    window.tab.become({
      stage: "working", accepted: 3, computed: 4, multiply_adds: 2.5e9, first_credit_s: 12, tokens_per_second: 140,
      engine: { kind: "wasm", name: "SIMD, 2 workers", workers: 2, digest: "ef".repeat(16), pass: true, problem: null },
      unit: { hash: "ab".repeat(32), kind: "gradient", policy: "12".repeat(32), done: 50, total: 200, started_ms: 0 },
      events: [{ at_ms: 2, text: "the connection to the host is lost; trying again" }],
    });
  });
  await page.getByRole("heading", { name: "Your machine is helping" }).waitFor();
  await page.getByText("Computing a gradient, policy 12121212, 50 of 200 tokens, 140 tokens/s.").waitFor();
  await page.getByText("WebAssembly (SIMD, 2 workers) passed the conformance suite.").waitFor();
  await page.getByText("2.5 G").waitFor();
  await page.getByText("the connection to the host is lost; trying again").waitFor();
  await page.getByRole("link", { name: "record 5" }).waitFor();
  await page.getByRole("button", { name: "Pause" }).click();
  await page.getByRole("heading", { name: "Paused" }).waitFor();
  await page.getByRole("button", { name: "Resume" }).click();
  await page.getByLabel("Only on mains power").uncheck();
  await page.getByLabel("Data cap").fill("");
  await page.getByLabel("Data cap").blur();
  assert.deepEqual((await calls("configure")).at(-1)[1].data_cap_mb, null);
  assert.equal((await calls("configure")).at(-1)[1].only_mains, false);
  await page.getByRole("button", { name: "Stop" }).click();
  await page.getByRole("heading", { name: "Stopped" }).waitFor();
  assert.deepEqual((await page.evaluate(() => window.calls.map((c) => c[0]))).filter((c) => c !== "configure"), ["start", "pause", "resume", "stop"]);
  await close();
});

test("a program without the tab says so, and how to get it", async () => {
  const { page, close } = await open("contribute", {
    prepare: (page) => page.route("**/pkg/**", (route) => route.fulfill({ status: 404, body: "" })),
  });
  await page.locator("#contribute").getByText("This program was built without the tab").waitFor();
  assert.ok(await page.getByRole("button", { name: "Start", exact: true }).isDisabled());
  await close();
});

test("the keyboard reaches everything in order, and the focus can be seen", async () => {
  const { page, close } = await open("contribute", { prepare: scripted("") });
  await until("the tab is there", () => page.getByRole("button", { name: "Start", exact: true }).isEnabled());
  const focused = () => page.evaluate(() => {
    const { outlineStyle, outlineWidth } = getComputedStyle(document.activeElement);
    return { name: document.activeElement.textContent.trim() || document.activeElement.id, ring: outlineStyle !== "none" && outlineWidth !== "0px" };
  });
  const names = [];
  for (let i = 0; i < 8; i += 1) {
    await page.keyboard.press("Tab");
    const { name, ring } = await focused();
    assert.ok(ring, `${name} shows no focus`);
    names.push(name);
  }
  assert.deepEqual(names, ["Skip to the content", "Manyhands", "Contribute", "The run", "Try it", "The ledger", "auto", "Start"]);
  await page.keyboard.press("Enter");
  await page.getByRole("heading", { name: "Checking your machine" }).waitFor();
  await page.keyboard.press("Tab");
  assert.equal((await focused()).name, "Stop");
  for (let i = 0; i < 5; i += 1) await page.keyboard.press("Shift+Tab");
  assert.equal((await focused()).name, "The run");
  await page.keyboard.press("Enter");
  await page.getByRole("heading", { level: 1, name: "page-test", exact: true }).waitFor();
  assert.equal((await page.evaluate(() => document.activeElement.id)), "view");
  assert.match(await page.title(), /^The run/);
  await close();
});

test("the chosen colours stay", async () => {
  const { page, close } = await open("contribute", { scheme: "light" });
  const dark = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  const before = await dark();
  const button = page.getByRole("button", { name: /^Colours/ });
  await button.click();
  await button.click();
  assert.notEqual(await dark(), before);
  await page.reload();
  assert.notEqual(await dark(), before);
  await close();
});

test("a host that goes away is told, and comes back by itself", async () => {
  const { page, close } = await open("run");
  await page.getByRole("heading", { level: 1, name: "page-test", exact: true }).waitFor();
  await page.route("**/api/status", (route) => route.abort());
  await page.getByText("The coordination peer does not answer.").waitFor();
  await page.unroute("**/api/status");
  await page.getByText("The coordination peer does not answer.").waitFor({ state: "hidden" });
  await close();
});

for (const [width, viewport] of Object.entries(WIDTHS)) {
  for (const scheme of ["light", "dark"]) {
    test(`axe finds nothing serious: ${width}, ${scheme}`, async () => {
      for (const view of [...VIEWS, "ledger/1", "ledger?kind=contributors"]) {
        const { page, close } = await open(view, { scheme, viewport });
        await until("the view has its data", async () => /page-test/.test(await page.title()));
        if (view === "run") await page.locator(".rollout").first().waitFor();
        if (view === "ledger") await page.locator(".entries td").first().waitFor();
        await accessible(page, view);
        const overflow = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
        assert.ok(overflow <= 0, `${view} is ${overflow} pixels too wide`);
        await close();
      }
    });
  }
}
