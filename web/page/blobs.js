// Blobs by hash, for workers: from this browser's files, or from the host's page, and kept. Every
// one is checked; a kept one that is damaged is fetched again.
import { blob_bytes_max, hash_of } from "/pkg/manyhands_web.js";
import { Files } from "/files.js";
import { Kept } from "/kept.js";

// Bytes of an answer that is text: pages of the ledger are far smaller.
const TEXT_BYTES_MAX = 64 << 20;

/** The bytes of what the host answers, if it does; see `readAll`. */
async function fetchBytes(url, most, tell = () => {}) {
  const answer = await fetch(url, { cache: "no-store" });
  if (answer.ok) return readAll(answer, most, tell);
  const { error } = JSON.parse(new TextDecoder().decode(await readAll(answer, TEXT_BYTES_MAX, tell)));
  throw new Error(`the host does not give ${url}: ${error}`);
}

/** The text that the host answers. */
export async function fetchText(url) {
  return new TextDecoder().decode(await fetchBytes(url, TEXT_BYTES_MAX));
}

/**
 * The bytes of an answer, up to `most`; `tell` hears how many there are so far, and how many there
 * will be.
 */
async function readAll(answer, most, tell) {
  const total = Number(answer.headers.get("content-length")) || null;
  const parts = [];
  let length = 0;
  const reader = answer.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    length += value.length;
    if (Math.max(length, total) > most) {
      reader.cancel().catch(() => {});
      throw new Error(`the host gives more for ${answer.url} than the ${most} bytes that a tab takes`);
    }
    tell(length, total);
  }
  const bytes = new Uint8Array(length);
  let at = 0;
  for (const part of parts) {
    bytes.set(part, at);
    at += part.length;
  }
  return bytes;
}

export class Blobs {
  #files;

  /** `say` hears what a person should know of this browser's storage. */
  static async open(say) {
    const blobs = new Blobs();
    const kept = await Kept.open();
    const { cache_mb } = await kept.settings();
    blobs.#files = await Files.open(kept, cache_mb * 1e6, say);
    return blobs;
  }

  async get(hash, tell = () => {}) {
    const kept = await this.#files.read(hash);
    if (kept && hash_of(kept) === hash) return kept;
    const bytes = await fetchBytes(`/api/blobs/${hash}`, blob_bytes_max(), tell);
    if (hash_of(bytes) !== hash) throw new Error(`the host gives other bytes for ${hash}`);
    await this.#files.write(hash, 0, bytes, bytes.length);
    return bytes;
  }
}
