// A headless Firefox, driven by WebDriver BiDi: as much of Playwright's shape as `openTab` needs.
// Playwright's own way to Firefox takes a build that Debian does not have.
import { spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";

import WebSocket from "ws";

const PROGRAM = process.env.FIREFOX ?? "/usr/bin/firefox-esr";
// WebGPU on any adapter, in workers too; and nothing of the browser's own business.
const PREFERENCES = {
  "dom.webgpu.enabled": true,
  "dom.webgpu.workers.enabled": true,
  "gfx.webgpu.ignore-blocklist": true,
  "browser.shell.checkDefaultBrowser": false,
  "browser.startup.page": 0,
  "datareporting.policy.dataSubmissionEnabled": false,
  "app.update.enabled": false,
  "network.captive-portal-service.enabled": false,
  "network.connectivity-service.enabled": false,
  "remote.active-protocols": 1,
};

export const hasFirefox = existsSync(PROGRAM);

/** Commands and their answers over one socket. */
async function connect(url) {
  const socket = new WebSocket(url);
  await once(socket, "open");
  const waiting = new Map();
  let count = 0;
  socket.on("message", (data) => {
    const { id, type, result, message } = JSON.parse(data);
    const settle = waiting.get(id);
    waiting.delete(id);
    settle?.(type === "success" ? { result } : { error: new Error(message) });
  });
  const send = async (method, params = {}) => {
    const id = ++count;
    const answer = new Promise((resolve) => waiting.set(id, resolve));
    socket.send(JSON.stringify({ id, method, params }));
    const { result, error } = await answer;
    if (error) throw error;
    return result;
  };
  return { send, close: () => socket.close() };
}

export async function startFirefox() {
  const profile = mkdtempSync(join(tmpdir(), "manyhands-firefox-"));
  const preferences = Object.entries(PREFERENCES).map(([name, value]) => `user_pref("${name}", ${value});`);
  writeFileSync(join(profile, "user.js"), preferences.join("\n"));
  const args = ["--headless", "--no-remote", "--profile", profile, "--remote-debugging-port", "0"];
  const firefox = spawn(PROGRAM, args, { stdio: ["ignore", "ignore", "pipe"], env: { ...process.env, HOME: profile } });
  process.once("exit", () => firefox.kill("SIGKILL"));
  const ended = once(firefox, "exit");
  let address;
  const lines = createInterface({ input: firefox.stderr });
  for await (const line of lines) {
    address = /WebDriver BiDi listening on (ws:\S+)/.exec(line)?.[1];
    if (address) break;
  }
  if (!address) throw new Error("Firefox has ended before it could be driven");
  firefox.stderr.resume();
  const bidi = await connect(`${address}/session`);
  const { capabilities } = await bidi.send("session.new", { capabilities: {} });

  const newPage = async (userContext) => {
    const { context } = await bidi.send("browsingContext.create", { type: "tab", userContext });
    const evaluate = async (script, argument) => {
      const value = typeof script === "string" ? script : `(${script})(${JSON.stringify(argument)})`;
      const expression = `(async () => JSON.stringify((await ${value}) ?? null))()`;
      const found = await bidi.send("script.evaluate", { expression, target: { context }, awaitPromise: true });
      if (found.type === "exception") throw new Error(found.exceptionDetails.text);
      return JSON.parse(found.result.value);
    };
    const goto = (url) => bidi.send("browsingContext.navigate", { context, url, wait: "complete" });
    return { evaluate, goto, on: () => {} };
  };
  return {
    version: capabilities.browserVersion,
    newContext: async () => {
      const { userContext } = await bidi.send("browser.createUserContext");
      return { newPage: () => newPage(userContext), close: () => bidi.send("browser.removeUserContext", { userContext }) };
    },
    close: async () => {
      await bidi.send("browser.close").catch(() => {});
      bidi.close();
      await ended;
      rmSync(profile, { recursive: true, force: true });
    },
  };
}
