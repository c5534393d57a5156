// Blobs by hash in the browser's own file system (OPFS), for workers. Nothing here is trusted to be
// right: whoever reads a file checks its hash. What does not fit is not kept, and the tab goes on
// from memory.

const DIRECTORY = "blobs";
// Names of the values that are kept beside the files.
const USES = "uses";

export class Files {
  #directory = null;
  #kept;
  #say;
  #bytes_max;
  // Name to {bytes, used}: `used` counts reads and writes, the oldest use goes first.
  #files = new Map();
  #clock = 0;
  #told = false;

  static async open(kept, bytes_max, say) {
    const files = new Files();
    files.#kept = kept;
    files.#say = say;
    files.#bytes_max = bytes_max;
    try {
      const root = await navigator.storage.getDirectory();
      files.#directory = await root.getDirectoryHandle(DIRECTORY, { create: true });
      const uses = (await kept.get(USES)) ?? {};
      for await (const [name, handle] of files.#directory.entries()) {
        const used = uses[name] ?? 0;
        files.#clock = Math.max(files.#clock, used);
        files.#files.set(name, { bytes: (await handle.getFile()).size, used });
      }
    } catch (error) {
      files.#directory = null;
      const why = navigator.storage
        ? `this browser's storage takes no more (${error.message})`
        : "a page over plain http keeps no files";
      say(`${why}; going on from memory`);
    }
    return files;
  }

  /** Bytes of all files. */
  get bytes() {
    let sum = 0;
    for (const { bytes } of this.#files.values()) sum += bytes;
    return sum;
  }

  set bytes_max(bytes) {
    this.#bytes_max = bytes;
  }

  async read(name) {
    if (!this.#directory || !this.#files.has(name)) return undefined;
    try {
      const handle = await this.#directory.getFileHandle(name);
      const bytes = new Uint8Array(await (await handle.getFile()).arrayBuffer());
      await this.#use(name, bytes.length);
      return bytes;
    } catch {
      this.#files.delete(name);
      return undefined;
    }
  }

  /** Writes a piece of a file that is to have `length` bytes. Whether it is kept. */
  async write(name, offset, bytes, length) {
    if (!this.#directory || length > this.#bytes_max) return false;
    try {
      await this.#makeRoom(name, length);
      const handle = await this.#directory.getFileHandle(name, { create: true });
      const file = await handle.createSyncAccessHandle();
      try {
        if (file.getSize() !== length) file.truncate(length);
        const written = file.write(bytes, { at: offset });
        file.flush();
        if (written !== bytes.length) throw new Error("the disk is full");
      } finally {
        file.close();
      }
      await this.#use(name, length);
      return true;
    } catch (error) {
      await this.#remove(name);
      if (!this.#told) {
        this.#told = true;
        this.#say(`this browser's storage takes no more (${error.message}); going on from memory`);
      }
      return false;
    }
  }

  async #use(name, bytes) {
    this.#files.set(name, { bytes, used: ++this.#clock });
    const uses = {};
    for (const [name, { used }] of this.#files) uses[name] = used;
    await this.#kept.put(USES, uses);
  }

  async #makeRoom(name, length) {
    const others = [...this.#files].filter(([other]) => other !== name);
    others.sort(([, a], [, b]) => a.used - b.used);
    let sum = others.reduce((sum, [, { bytes }]) => sum + bytes, 0);
    for (const [other, { bytes }] of others) {
      if (sum + length <= this.#bytes_max) return;
      await this.#remove(other);
      sum -= bytes;
    }
  }

  async #remove(name) {
    this.#files.delete(name);
    // What is not there, or is open elsewhere, is left.
    await this.#directory.removeEntry(name).catch(() => {});
  }
}
