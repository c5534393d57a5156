// A certificate by ACME: a small authority that speaks RFC 8555 and checks the challenge of
// RFC 8737 stands in for Let's Encrypt.

import assert from "node:assert/strict";
import { createHash, createPublicKey, verify } from "node:crypto";
import { once } from "node:events";
import { readFileSync, writeFileSync } from "node:fs";
import { createServer, get } from "node:https";
import { join } from "node:path";
import { test } from "node:test";
import { connect } from "node:tls";

import { RUN } from "./page-run.mjs";
import { Authority } from "./pki.mjs";
import { directory, free, startHost, until } from "./support.mjs";

const NAME = "run.example.org";
const TOKEN = "a-token-that-nobody-guesses";
const decode = (text) => Buffer.from(text, "base64url");

// The members of a key that its thumbprint is made of, in the order of RFC 7638.
const thumbprint = ({ crv, kty, x, y }) => createHash("sha256").update(JSON.stringify({ crv, kty, x, y })).digest("base64url");

// Serves one order for NAME; `port` is where the challenge is looked for.
async function startAcme(t, authority, port) {
  const own = authority.issue("localhost");
  const seen = { challenged: false, orders: 0 };
  let account = null;
  let status = "pending";
  let certificate = null;
  const server = createServer({ key: readFileSync(own.key), cert: readFileSync(own.certificate) }, async (request, response) => {
    const base = `https://localhost:${server.address().port}`;
    const say = (code, body, headers = {}) => {
      response.writeHead(code, { "replay-nonce": "nonce", "content-type": "application/json", ...headers });
      response.end(typeof body === "string" ? body : JSON.stringify(body));
    };
    const order = () => ({ status, authorizations: [`${base}/authz`], finalize: `${base}/finalize`, ...(certificate ? { certificate: `${base}/certificate` } : {}) });
    if (request.url === "/directory") return say(200, { newNonce: `${base}/nonce`, newAccount: `${base}/account`, newOrder: `${base}/order` });
    if (request.url === "/nonce") return say(200, "");
    let text = "";
    for await (const piece of request) text += piece;
    const jws = JSON.parse(text);
    const header = JSON.parse(decode(jws.protected));
    if (request.url === "/account") account = header.jwk;
    const key = { key: createPublicKey({ key: account, format: "jwk" }), dsaEncoding: "ieee-p1363" };
    const signed = verify("sha256", Buffer.from(`${jws.protected}.${jws.payload}`), key, decode(jws.signature));
    if (!signed) return say(400, { type: "malformed" });
    switch (request.url) {
      case "/account":
        return say(201, { status: "valid" }, { location: `${base}/account/1` });
      case "/order":
        seen.orders += 1;
        return say(201, order(), { location: `${base}/order/1` });
      case "/order/1":
        return say(200, order());
      case "/authz":
        return say(200, {
          status: status === "pending" ? "pending" : "valid", identifier: { type: "dns", value: NAME },
          challenges: [{ type: "tls-alpn-01", url: `${base}/challenge`, token: TOKEN, status: "pending" }],
        });
      case "/challenge":
        seen.challenged = await challenge(port, `${TOKEN}.${thumbprint(account)}`);
        if (seen.challenged) status = "ready";
        return say(200, { type: "tls-alpn-01", url: `${base}/challenge`, token: TOKEN, status: "processing" });
      case "/finalize": {
        const csr = join(authority.dir, "acme.csr");
        writeFileSync(csr, decode(JSON.parse(decode(jws.payload)).csr));
        certificate = readFileSync(authority.sign(NAME, csr, "DER"), "utf8");
        status = "valid";
        return say(200, order());
      }
      case "/certificate":
        return say(200, certificate, { "content-type": "application/pem-certificate-chain" });
      default:
        return say(404, {});
    }
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  t.after(() => server.close());
  return { seen, url: `https://localhost:${server.address().port}/directory` };
}

// Whether the host shows the certificate that proves control of its name.
async function challenge(port, keyAuthorization) {
  const socket = connect({ port, host: "127.0.0.1", servername: NAME, ALPNProtocols: ["acme-tls/1"], rejectUnauthorized: false });
  await once(socket, "secureConnect");
  const { raw } = socket.getPeerCertificate();
  const alpn = socket.alpnProtocol;
  socket.destroy();
  const digest = createHash("sha256").update(keyAuthorization).digest();
  return alpn === "acme-tls/1" && raw.includes(Buffer.concat([Buffer.from([0x04, 0x20]), digest]));
}

// Status of a request over https that trusts the authority only; null if there is no certificate.
function ask(port, ca) {
  return new Promise((resolve) => {
    const options = { port, host: "127.0.0.1", servername: NAME, headers: { host: NAME }, path: "/api/status", ca: readFileSync(ca), agent: false };
    get(options, (response) => {
      response.resume();
      resolve(response.statusCode);
    }).on("error", () => resolve(null));
  });
}

test("a host with --domain obtains its certificate, and keeps it for the next start", async (t) => {
  const dir = directory();
  const runFile = join(dir, "run.toml");
  writeFileSync(runFile, RUN);
  const authority = new Authority(dir);
  const port = await free();
  const acme = await startAcme(t, authority, port);
  const args = ["--http", `127.0.0.1:${port}`, "--domain", NAME, "--acme-directory", acme.url, "--acme-ca", authority.ca];
  const host = await startHost({ runFile, dir: join(dir, "host"), args });
  t.after(() => host.stop());
  assert.equal(host.url.trim(), `https://${NAME}:${port}`);
  await until("the host has a certificate", async () => (await ask(port, authority.ca)) === 200, 60_000);
  assert.deepEqual(acme.seen, { challenged: true, orders: 1 });
  await host.stop();
  const again = await startHost({ runFile, dir: join(dir, "host"), args });
  t.after(() => again.stop());
  await until("it is served again", async () => (await ask(port, authority.ca)) === 200, 60_000);
  assert.equal(acme.seen.orders, 1);
});
