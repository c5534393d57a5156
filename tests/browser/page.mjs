// A page with a tab, before the host serves one by itself: web/page and target/web, and the host
// behind the same address, as a reverse proxy has it.
import { createReadStream, existsSync } from "node:fs";
import { once } from "node:events";
import { createServer, request } from "node:http";
import { connect } from "node:net";
import { extname, join, normalize } from "node:path";

import { ROOT } from "./support.mjs";

const KINDS = { ".js": "text/javascript", ".wasm": "application/wasm", ".html": "text/html" };
const CSP = "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; connect-src 'self'; style-src 'self'";

export async function servePage(url) {
  const { hostname, port } = new URL(url);
  const server = createServer((asked, answer) => {
    const path = normalize(new URL(asked.url, url).pathname);
    if (path.startsWith("/api")) {
      const passed = request({ hostname, port, path: asked.url, method: asked.method }, (got) => {
        answer.writeHead(got.statusCode, got.headers);
        got.pipe(answer);
      });
      passed.on("error", () => answer.writeHead(502).end());
      return passed.end();
    }
    const file = path.startsWith("/pkg/") ? join(ROOT, "target/web", path.slice(5)) : join(ROOT, "web/page", path);
    const headers = { "content-type": KINDS[extname(path)] ?? "text/html", "content-security-policy": CSP };
    answer.writeHead(200, headers);
    if (path === "/" || !existsSync(file)) return answer.end("<!doctype html><title>tab</title>");
    createReadStream(file).pipe(answer);
  });
  server.on("upgrade", (asked, socket) => {
    const to = connect(port, hostname);
    const lines = asked.rawHeaders.reduce((all, part, i) => all + (i % 2 ? `: ${part}\r\n` : part), "");
    to.write(`GET ${asked.url} HTTP/1.1\r\n${lines}\r\n`);
    to.pipe(socket).pipe(to);
    to.on("error", () => socket.destroy());
    socket.on("error", () => to.destroy());
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  return { url: `http://127.0.0.1:${server.address().port}`, close: () => server.close() };
}
