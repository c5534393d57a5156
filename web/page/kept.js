// What this browser keeps of its owner's volunteering: identity, settings, totals and receipts, in
// IndexedDB. Where there is none (private windows of some browsers), it lasts as long as the page.

const NAME = "manyhands";
const VERSION = 1;
// Receipts kept; the oldest give way.
const RECEIPTS_MAX = 10_000;

export const DEFAULT_SETTINGS = {
  engine: "auto",
  threads: Math.max(1, Math.floor((navigator.hardwareConcurrency || 2) / 2)),
  duty: 1,
  only_visible: true,
  only_mains: true,
  hours: null,
  data_cap_mb: null,
  cache_mb: 1024,
};

const answer = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

const done = (transaction) =>
  new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = () => reject(transaction.error);
  });

function openDatabase() {
  const request = indexedDB.open(NAME, VERSION);
  request.onupgradeneeded = () => {
    request.result.createObjectStore("values");
    const receipts = request.result.createObjectStore("receipts", { autoIncrement: true });
    receipts.createIndex("unit", "unit");
  };
  return answer(request);
}

/** Values in the memory of the page, for browsers that keep nothing. */
class Memory {
  values = new Map();
  receipts = [];
}

export class Kept {
  #database;
  #memory = new Memory();

  static async open() {
    const kept = new Kept();
    try {
      kept.#database = await openDatabase();
    } catch {
      kept.#database = null;
    }
    return kept;
  }

  /** Whether it outlasts the page. */
  get lasts() {
    return this.#database !== null;
  }

  async get(key) {
    if (!this.#database) return this.#memory.values.get(key);
    return answer(this.#database.transaction("values").objectStore("values").get(key));
  }

  async put(key, value) {
    if (!this.#database) return void this.#memory.values.set(key, value);
    const transaction = this.#database.transaction("values", "readwrite");
    transaction.objectStore("values").put(value, key);
    // A full disk loses a setting, not the work.
    await done(transaction).catch(() => {});
  }

  /** The identity's seed, drawn on first use. Two tabs that begin at once agree on one. */
  async seed() {
    const drawn = crypto.getRandomValues(new Uint8Array(32));
    if (!this.#database) {
      if (!this.#memory.values.has("seed")) this.#memory.values.set("seed", drawn);
      return this.#memory.values.get("seed");
    }
    const transaction = this.#database.transaction("values", "readwrite");
    const values = transaction.objectStore("values");
    const kept = await answer(values.get("seed"));
    if (!kept) values.put(drawn, "seed");
    await done(transaction);
    return kept ?? drawn;
  }

  async settings() {
    return { ...DEFAULT_SETTINGS, ...(await this.get("settings")) };
  }

  async totals() {
    return { accepted: 0, computed: 0, multiply_adds: 0, ...(await this.get("totals")) };
  }

  /** Keeps a receipt whose place in the ledger is not known yet. */
  async keepReceipt(receipt) {
    const entry = { ...receipt, sequence: null };
    await this.#change((totals) => (totals.computed += 1), async (receipts) => {
      receipts.add(entry);
      const count = await answer(receipts.count());
      if (count > RECEIPTS_MAX) receipts.delete(await answer(receipts.getKey(IDBKeyRange.lowerBound(0))));
    }, (list) => {
      list.push(entry);
      if (list.length > RECEIPTS_MAX) list.shift();
    });
  }

  /** The ledger has the unit. Whether that was news: a unit is credited once. */
  async accepted(unit, sequence) {
    let news = null;
    await this.#change((totals) => {
      if (!news) return;
      totals.accepted += 1;
      totals.multiply_adds += news.multiply_adds;
    }, async (receipts) => {
      const cursorOf = receipts.index("unit").openCursor(IDBKeyRange.only(unit), "prev");
      const cursor = await answer(cursorOf);
      if (cursor && cursor.value.sequence === null) {
        news = { ...cursor.value, sequence };
        cursor.update(news);
      }
    }, (list) => {
      const found = list.findLast((r) => r.unit === unit && r.sequence === null);
      if (found) {
        found.sequence = sequence;
        news = found;
      }
    });
    return news !== null;
  }

  /** Newest first. */
  async receipts(limit = 1000) {
    if (!this.#database) return this.#memory.receipts.slice(-limit).reverse();
    const receipts = this.#database.transaction("receipts").objectStore("receipts");
    const found = [];
    const request = receipts.openCursor(null, "prev");
    return new Promise((resolve, reject) => {
      request.onerror = () => reject(request.error);
      request.onsuccess = () => {
        const cursor = request.result;
        if (!cursor || found.length >= limit) return resolve(found);
        found.push(cursor.value);
        cursor.continue();
      };
    });
  }

  /** Changes receipts and totals in one step, or not at all. */
  async #change(add, inDatabase, inMemory) {
    if (!this.#database) {
      inMemory(this.#memory.receipts);
      const totals = await this.totals();
      add(totals);
      this.#memory.values.set("totals", totals);
      return;
    }
    try {
      const transaction = this.#database.transaction(["receipts", "values"], "readwrite");
      const ended = done(transaction);
      ended.catch(() => {});
      await inDatabase(transaction.objectStore("receipts"));
      const values = transaction.objectStore("values");
      const totals = { accepted: 0, computed: 0, multiply_adds: 0, ...(await answer(values.get("totals"))) };
      add(totals);
      values.put(totals, "totals");
      await ended;
    } catch {
      // The disk is full. What is there can still be read.
      await this.#goOnFromMemory();
      await this.#change(add, inDatabase, inMemory);
    }
  }

  async #goOnFromMemory() {
    if (!this.#database) return;
    const [receipts, settings, totals, seed] = await Promise.all([
      this.receipts(), this.get("settings"), this.totals(), this.get("seed"),
    ]);
    this.#memory.receipts = receipts.reverse();
    this.#memory.values = new Map(Object.entries({ settings, totals, seed }));
    this.#database = null;
  }
}
