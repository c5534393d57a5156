// https: by the host itself, and by nginx in front of it, with a certificate authority made here.
// A browser sees a secure page, and a native volunteer joins through the one port that is open.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { existsSync, mkdirSync, writeFileSync } from "node:fs";
import { connect } from "node:net";
import { join } from "node:path";
import { test } from "node:test";

import { RUN } from "./page-run.mjs";
import { Authority } from "./pki.mjs";
import { directory, free, run, startBrowser, startHost, startVolunteer, until } from "./support.mjs";

const NAME = "localhost";
// Debian keeps it where only administrators look.
const NGINX = existsSync("/usr/sbin/nginx") ? "/usr/sbin/nginx" : "nginx";

function runFile(dir) {
  const file = join(dir, "run.toml");
  writeFileSync(file, RUN);
  return file;
}

// nginx as the README sets it up, and a second manifest that names only the way through it.
async function startNginx(t, dir, port, upstream, { certificate, key }) {
  mkdirSync(join(dir, "nginx"));
  const config = join(dir, "nginx.conf");
  writeFileSync(config, `
    ${process.getuid() === 0 ? "user root;" : ""} daemon off; pid ${dir}/nginx.pid; error_log ${dir}/nginx.log;
    events {}
    http {
      access_log off;
      ${["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map((n) => `${n}_temp_path ${dir}/nginx/${n};`).join("\n")}
      map $http_upgrade $connection_upgrade { default upgrade; "" close; }
      server {
        listen 127.0.0.1:${port} ssl;
        ssl_certificate ${certificate};
        ssl_certificate_key ${key};
        location / {
          proxy_pass ${upstream};
          proxy_http_version 1.1;
          proxy_set_header Host $host;
          proxy_set_header Upgrade $http_upgrade;
          proxy_set_header Connection $connection_upgrade;
          proxy_read_timeout 1h;
        }
        location = /tunnel/api/manifest { default_type application/json; alias ${dir}/manifest.json; }
      }
    }`);
  const nginx = spawn(NGINX, ["-e", `${dir}/nginx.log`, "-c", config], { stdio: "ignore" });
  const ended = new Promise((resolve) => nginx.once("exit", resolve));
  t.after(async () => {
    nginx.kill("SIGTERM");
    await ended;
  });
}

// The page over https in a browser that trusts the authority: secure, live, and at home.
async function look(t, url, spki) {
  const browser = await startBrowser({ webgpu: false, args: [`--ignore-certificate-errors-spki-list=${spki}`] });
  t.after(() => browser.close());
  const page = await browser.newPage();
  const elsewhere = [];
  page.on("request", (request) => {
    if (!request.url().startsWith(url) && !request.url().startsWith("data:")) elsewhere.push(request.url());
  });
  const events = page.waitForResponse((response) => response.url().endsWith("/api/events"));
  await page.goto(`${url}/#/run`);
  await page.getByRole("heading", { level: 1, name: "page-test", exact: true }).waitFor();
  assert.equal((await events).status(), 200);
  assert.equal(await page.evaluate(() => isSecureContext), true);
  const hello = await page.evaluate(() => new Promise((resolve) => {
    new EventSource("/api/events").addEventListener("hello", () => resolve(true));
  }));
  assert.ok(hello, "events come through at once");
  await page.goto(`${url}/#/contribute`);
  await page.getByText(`manyhands join ${url}`).waitFor();
  assert.equal(await page.getByText("This page came over plain http").count(), 0);
  assert.deepEqual(elsewhere, []);
}

test("a host with a certificate serves https, and a volunteer joins with --ca", async (t) => {
  const dir = directory();
  const authority = new Authority(dir);
  const pki = authority.issue(NAME);
  const host = await startHost({
    runFile: runFile(dir), dir: join(dir, "host"), args: ["--tls-cert", pki.certificate, "--tls-key", pki.key],
  });
  t.after(() => host.stop());
  assert.match(host.url.trim(), /^https:\/\/localhost:\d+$/);
  const stranger = await run(["join", host.url.trim(), "--dir", join(dir, "stranger")]);
  assert.equal(stranger.code, 1);
  assert.match(stranger.err, /--ca/);
  const volunteer = startVolunteer({ url: host.url.trim(), dir: join(dir, "volunteer"), args: ["--ca", authority.ca] });
  t.after(() => volunteer.stop());
  await volunteer.ended;
  await look(t, host.url.trim(), pki.spki);
});

test("behind nginx the page is secure, and a volunteer joins through its port alone", async (t) => {
  const dir = directory();
  const authority = new Authority(dir);
  const pki = authority.issue(NAME);
  const port = await free();
  const url = `https://${NAME}:${port}`;
  const inner = await free();
  const host = await startHost({
    runFile: runFile(dir), dir: join(dir, "host"), args: ["--http", `127.0.0.1:${inner}`, "--public-url", url],
  });
  t.after(() => host.stop());
  assert.equal(host.url.trim(), url);
  // A volunteer outside sees nothing of the host but the proxy.
  const manifest = await (await fetch(`http://127.0.0.1:${inner}/api/manifest`)).json();
  const [peer] = manifest.peers;
  const through = peer.addresses.filter((address) => address.includes("/tls/"));
  assert.equal(through.length, 1);
  writeFileSync(join(dir, "manifest.json"), JSON.stringify({ ...manifest, peers: [{ ...peer, addresses: through }] }));
  await startNginx(t, dir, port, `http://127.0.0.1:${inner}`, pki);
  await until("nginx listens", () => listens(port));
  const volunteer = startVolunteer({ url: `${url}/tunnel`, dir: join(dir, "volunteer"), args: ["--ca", authority.ca] });
  t.after(() => volunteer.stop());
  await volunteer.ended;
  await until("the run is complete", async () => {
    const status = await (await fetch(`http://127.0.0.1:${inner}/api/status`)).json();
    return status.state === "done" && status.units.accepted > 0;
  });
  await look(t, url, pki.spki);
});

// Whether anybody listens there.
function listens(port) {
  return new Promise((resolve) => {
    const socket = connect(port, "127.0.0.1", () => {
      socket.destroy();
      resolve(true);
    });
    socket.on("error", () => resolve(false));
  });
}
