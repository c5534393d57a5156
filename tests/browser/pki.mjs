// A certificate authority of a test, by openssl.
import { execFileSync } from "node:child_process";
import { X509Certificate, createHash } from "node:crypto";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";

const KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];

export class Authority {
  constructor(dir) {
    this.dir = dir;
    this.ca = join(dir, "ca.pem");
    this.#openssl("req", "-x509", ...KEY, "-days", "2", "-subj", "/CN=test authority", "-keyout", "ca.key", "-out", "ca.pem");
  }

  #openssl(...args) {
    execFileSync("openssl", args, { cwd: this.dir, stdio: ["ignore", "pipe", "pipe"] });
  }

  /** A certificate for a name, its key, and how Chromium is told to trust just that key. */
  issue(name) {
    const [key, csr] = [join(this.dir, `${name}.key`), join(this.dir, `${name}.csr`)];
    this.#openssl("req", ...KEY, "-subj", `/CN=${name}`, "-keyout", key, "-out", csr);
    const certificate = this.sign(name, csr, "PEM");
    const { publicKey } = new X509Certificate(readFileSync(certificate));
    const spki = createHash("sha256").update(publicKey.export({ type: "spki", format: "der" })).digest("base64");
    return { certificate, key, spki };
  }

  /** Signs a request; the file of the certificate. */
  sign(name, csr, form) {
    const [extensions, certificate] = [join(this.dir, `${name}.ext`), join(this.dir, `${name}.pem`)];
    writeFileSync(extensions, `subjectAltName=DNS:${name}\n`);
    this.#openssl("x509", "-req", "-inform", form, "-in", csr, "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
      "-days", "2", "-extfile", extensions, "-out", certificate);
    return certificate;
  }
}
