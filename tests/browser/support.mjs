// What browser tests need: a host, volunteers, a browser, and a way to wait.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, mkdtempSync, readFileSync, rmSync, statSync, openSync } from "node:fs";
import { createRequire } from "node:module";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";

import { chromium } from "playwright-core";

/** The digest of the arithmetic, as the sources publish it. */
const DIGEST = /DIGEST: &str = "(\w+)"/.exec(
  readFileSync(new URL("../../core/src/conformance/suite.rs", import.meta.url), "utf8"),
)[1];

export const ROOT = fileURLToPath(new URL("../..", import.meta.url));
// Nothing here takes so long on two busy cores.
export const PATIENCE_MS = Number(process.env.PATIENCE_MS ?? 240_000);
const LOOK_MS = 100;

/** The program: what MANYHANDS names, or the newest that was built. */
function program() {
  if (process.env.MANYHANDS) return process.env.MANYHANDS;
  const built = ["debug", "release"].map((p) => join(ROOT, "target", p, "manyhands")).filter(existsSync);
  if (built.length === 0) throw new Error("build the program first: cargo build -p manyhands");
  return built.sort((a, b) => statSync(b).mtimeMs - statSync(a).mtimeMs)[0];
}

// Programs first: they write into the directories.
const programs = new Set();
const directories = new Set();
process.once("exit", () => {
  programs.forEach((child) => child.kill("SIGKILL"));
  directories.forEach((dir) => rmSync(dir, { recursive: true, force: true, maxRetries: 5 }));
});

/** A directory that goes with the process. */
export function directory() {
  const dir = mkdtempSync(join(tmpdir(), "manyhands-browser-"));
  directories.add(dir);
  return dir;
}

/** Waits until `look` gives something. */
export async function until(what, look, patience_ms = PATIENCE_MS) {
  const started = Date.now();
  for (;;) {
    const found = await look();
    if (found) return found;
    if (Date.now() - started > patience_ms) throw new Error(`waited in vain: ${what}`);
    await sleep(LOOK_MS);
  }
}

/** A free port, of those that no outgoing connection is given: it stays free until it is used. */
export async function free() {
  for (;;) {
    const server = createServer();
    const port = 20000 + Math.floor(Math.random() * 12000);
    const listening = await new Promise((resolve) => {
      server.once("listening", () => resolve(true)).once("error", () => resolve(false)).listen(port, "127.0.0.1");
    });
    if (!listening) continue;
    server.close();
    await once(server, "close");
    return port;
  }
}

function start(args, log) {
  const out = log ? openSync(log, "a") : "ignore";
  const child = spawn(program(), args, { stdio: ["ignore", out, out] });
  const ended = once(child, "exit");
  const stop = async (signal = "SIGKILL") => {
    if (child.exitCode === null && child.signalCode === null) child.kill(signal);
    await ended;
    programs.delete(child);
  };
  programs.add(child);
  return { pid: child.pid, stop, ended };
}

/** Runs the program to its end, and returns what it printed. */
export async function run(args) {
  const child = spawn(program(), args, { stdio: ["ignore", "pipe", "pipe"] });
  const read = async (stream) => {
    let text = "";
    for await (const piece of stream) text += piece;
    return text;
  };
  const [out, err, [code]] = await Promise.all([read(child.stdout), read(child.stderr), once(child, "exit")]);
  return { code, out, err };
}

/** The weights that one machine by itself comes to, trained in that directory. */
export async function trainAlone(runFile, dir) {
  const { out, err } = await run(["train", runFile, "--engine", "cpu", "--dir", dir]);
  const line = out.split("\n").find((line) => line.startsWith("weights "));
  if (!line) throw new Error(`the run did not end:\n${err}`);
  return line.slice("weights ".length).trim();
}

/** A coordination peer on a port of its own, which it keeps when it is started again. */
export async function startHost({ runFile, dir, args = [] }) {
  rmSync(join(dir, "url"), { force: true });
  const http = args.includes("--http") ? [] : ["--http", "127.0.0.1:0"];
  const log = `${dir}.log`;
  const host = start(["host", runFile, "--dir", dir, "--listen", "127.0.0.1", ...http, ...args], log);
  let over = false;
  host.ended.then(() => (over = true));
  const url = await until(`the host is up; it says ${log}`, () => {
    if (over) throw new Error(`the host ended: ${readFileSync(log, "utf8")}`);
    return existsSync(join(dir, "url")) && readFileSync(join(dir, "url"), "utf8");
  });
  // WebGPU takes a secure context, which 127.0.0.1 is too.
  return { ...host, url, dir, log };
}

/** A native volunteer. */
export function startVolunteer({ url, dir, args = [] }) {
  return start(["join", url, "--dir", dir, "--threads", "1", "--engine", "cpu", ...args], `${dir}.log`);
}

/** A headless Chromium, with WebGPU on a software adapter or without. */
export function startBrowser({ webgpu, args = [] }) {
  const flags = ["--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking"];
  flags.push("--disable-component-update", "--disable-sync");
  flags.push(webgpu ? "--enable-unsafe-webgpu" : "--disable-features=WebGPU,WebGPUService");
  const executablePath = process.env.CHROMIUM ?? "/usr/bin/chromium";
  return chromium.launch({ executablePath, args: [...flags, ...args] });
}

/** All records of a host's ledger. */
export async function ledger(url) {
  const records = [];
  for (;;) {
    const page = await (await fetch(`${url}/api/ledger?from=${records.length}&limit=1000`)).json();
    if (page.length === 0) return records;
    records.push(...page);
  }
}

/** The weights at the end, once the run is complete. */
export async function finalWeights(url, patience_ms = PATIENCE_MS) {
  return until("the run is complete", async () => {
    const closed = (await ledger(url)).find(({ entry }) => entry.Closed);
    return closed?.entry.Closed.weights;
  }, patience_ms);
}

/** The page of the host as a person sees it. Whatever it should not do fails the test. */
export async function openPage(t, browser, url, view, context) {
  const own = context ?? (await browser.newContext());
  const page = await own.newPage();
  const faults = [];
  page.on("pageerror", (error) => faults.push(error.message));
  page.on("console", (message) => {
    if (process.env.VERBOSE) console.log(message.text());
    if (/Content Security Policy/i.test(message.text())) faults.push(message.text());
  });
  const { host } = new URL(url);
  page.on("request", (request) => new URL(request.url()).host !== host && faults.push(`request to ${request.url()}`));
  await page.goto(`${url}/#/${view}`);
  t.after(async () => {
    await (context ? page.close() : own.close());
    assert.deepEqual(faults, []);
  });
  const figure = async (name) => page.locator(".figures div", { hasText: name }).locator("dd").innerText();
  return { page, context: own, figure };
}

const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

/** Fails if axe finds something serious in what the page shows. */
export async function accessible(page, what) {
  await page.evaluate(AXE);
  const { violations, passes } = await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ["violations", "passes"] }));
  const serious = violations.filter((v) => ["serious", "critical"].includes(v.impact));
  assert.deepEqual(serious.map((v) => `${what}: ${v.id}: ${v.nodes[0].html}`), []);
  assert.ok(passes.length > 15, `${passes.length} rules were checked`);
}

/** Presses a button of Contribute, once it can be pressed. */
export const press = (page, name) => page.getByRole("button", { name, exact: true }).click();

/** What the diagnostics of the page say under a name. */
export async function diagnostics(page, name) {
  const row = page.locator(".diagnostics .pairs div", { hasText: name });
  return until(`the diagnostics tell ${name}`, async () => (await row.count()) > 0 && row.locator("dd").textContent());
}

/** Waits until programs that are there have so many more units in the ledger than they had. */
export async function unitsByOthers(url, count) {
  const done = async () => {
    const { volunteers } = await (await fetch(`${url}/api/status`)).json();
    return volunteers.filter(({ agent }) => agent.startsWith("manyhands")).reduce((sum, { units }) => sum + units, 0);
  };
  const before = await done();
  return until(`${count} units by others`, async () => (await done()) >= before + count);
}

/** A page of the host with a `Tab` in it. */
export async function openTab(browser, url, context) {
  context ??= await browser.newContext();
  const page = await context.newPage();
  page.on("console", (message) => process.env.VERBOSE && console.log(message.text()));
  page.on("pageerror", (error) => console.log(error.message));
  const load = async () => {
    await page.goto(url);
    await page.evaluate(async () => {
      const { Tab } = await import("/tab.js");
      window.tab = new Tab();
    });
  };
  await load();
  const call = (action, argument) => page.evaluate(`(${action})(window.tab, ${JSON.stringify(argument)})`);
  const state = () => call((tab) => tab.state);
  const tab = {
    page,
    context,
    call,
    state,
    start: (settings) => call((tab, settings) => tab.start(settings), settings),
    reload: load,
    close: () => context.close(),
    published: DIGEST,
    /** Waits for a state. */
    until: async (what, holds, patience_ms) => {
      let last;
      try {
        return await until(what, async () => holds((last = await state())) && last, patience_ms);
      } catch (error) {
        throw new Error(`${error.message}; the tab is ${JSON.stringify(last, null, 1)}`);
      }
    },
    /** Waits for something to be said. */
    hears: (text) => tab.until(`it says ${text}`, ({ events }) => events.some((e) => e.text.includes(text))),
  };
  return tab;
}
