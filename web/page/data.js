// What the page knows of the run: the status by polling, the history once, then events as they
// come. Views listen; nothing here touches the page.
//
// Events: "status", "history" (steps or evaluations changed), "config", "samples", "log", "lost".

const POLL_MS = 2000;
const SAMPLES_PAUSE_MS = 3000;
const PAGE = 1000;
const POINTS_MAX = 10000;
const LOG_LINES_MAX = 30;

export async function read(path) {
  const answer = await fetch(path);
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error);
  return body;
}

class Run extends EventTarget {
  status = null;
  // The run file, as the first record of the ledger holds it.
  config = null;
  steps = new Map();
  evaluations = new Map();
  samples = null;
  log = [];
  lost = null;
  #samplesAt = 0;
  #samplesSoon = null;

  start() {
    this.#poll();
    this.#listen();
    this.#loadConfig();
    this.loadSamples();
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.#readStatus();
    });
  }

  #tell(name) {
    this.dispatchEvent(new Event(name));
  }

  async #poll() {
    if (!document.hidden) await this.#readStatus();
    setTimeout(() => this.#poll(), POLL_MS);
  }

  async #readStatus() {
    try {
      this.status = await read("/api/status");
      if (this.lost !== null) {
        this.lost = null;
        this.#tell("lost");
      }
      this.#tell("status");
    } catch (error) {
      this.lost = error.message;
      this.#tell("lost");
    }
  }

  async #loadConfig() {
    try {
      const [first] = await read("/api/ledger?from=0&limit=1");
      if (first?.entry?.Open) {
        this.config = JSON.parse(first.entry.Open.config);
        this.#tell("config");
        return;
      }
    } catch {
      // The status poll says that the coordination peer is away.
    }
    setTimeout(() => this.#loadConfig(), POLL_MS);
  }

  async #pages(path, add) {
    let from = 0;
    for (;;) {
      const page = await read(`${path}?from=${from}&limit=${PAGE}`);
      page.forEach(add);
      if (page.length < PAGE) return;
      from = page[page.length - 1].ordinal + 1;
    }
  }

  async #loadHistory() {
    this.steps.clear();
    this.evaluations.clear();
    await this.#pages("/api/steps", (line) => this.#keep(this.steps, line.ordinal, line));
    await this.#pages("/api/evaluations", (line) => this.#keep(this.evaluations, line.ordinal, line.report));
    this.#tell("history");
  }

  #keep(map, ordinal, value) {
    map.set(ordinal, value);
    if (map.size > POINTS_MAX) map.delete(map.keys().next().value);
  }

  async loadSamples() {
    this.#samplesSoon = null;
    this.#samplesAt = Date.now();
    try {
      this.samples = await read("/api/samples");
      this.#tell("samples");
    } catch {
      // They come with the next step.
    }
  }

  #loadSamplesSoon() {
    if (this.#samplesSoon !== null || document.hidden) return;
    const pause = Math.max(0, this.#samplesAt + SAMPLES_PAUSE_MS - Date.now());
    this.#samplesSoon = setTimeout(() => this.loadSamples(), pause);
  }

  #say(text) {
    this.log = [{ at: new Date(), text }, ...this.log].slice(0, LOG_LINES_MAX);
    this.#tell("log");
  }

  #listen() {
    const reload = () => this.#loadHistory().catch(() => {});
    const dropAfter = (map, ordinal) => {
      for (const key of [...map.keys()]) if (key > ordinal) map.delete(key);
    };
    const who = (e) => `Volunteer ${e.peer.slice(0, 10)}`;
    const handlers = {
      hello: reload,
      lagged: reload,
      step: (e) => {
        this.#keep(this.steps, e.ordinal, { ordinal: e.ordinal, tokens_per_second: e.tokens_per_second, ...e.report });
        this.#say(`Step ${e.ordinal} is done.`);
        this.#tell("history");
        this.#loadSamplesSoon();
      },
      evaluation: (e) => {
        this.#keep(this.evaluations, e.ordinal, e.evaluation.report);
        this.#say(`Evaluated on held-out problems after step ${e.ordinal}.`);
        this.#tell("history");
      },
      final: (e) => this.#say(`Everything up to step ${e.ordinal} is final.`),
      expelled: (e) => this.#say(`${who(e)} was expelled: ${e.offence.replaceAll("_", " ")}.`),
      rolled_back: (e) => {
        dropAfter(this.steps, e.ordinal);
        dropAfter(this.evaluations, e.ordinal);
        this.#say(`A false unit had entered: back to step ${e.ordinal}, and on from there.`);
        this.#tell("history");
      },
      joined: (e) => this.#say(`${who(e)} joined.`),
      left: (e) => this.#say(`${who(e)} left.`),
      state: (e) => this.#say(`The run is now ${e.state}.`),
      warning: (e) => this.#say(e.text),
    };
    // Reconnects by itself; every connection begins with `hello`.
    const source = new EventSource("/api/events");
    for (const [name, handle] of Object.entries(handlers)) {
      source.addEventListener(name, (event) => handle(JSON.parse(event.data)));
    }
  }
}

export const run = new Run();
