// The tab's side of volunteering: starts the workers, relays what they say, and ends them.
//
// Nothing is computed here. The network worker (volunteer.js) speaks with the host and with the
// engine workers (engine.js); each pair has a channel of its own, so that weights and results never
// pass the page. Stop ends the workers, and so is immediate.
import { Kept, DEFAULT_SETTINGS } from "/kept.js";
import { Talk } from "/talk.js";

// The network worker and the engine workers have a module each.
const WASM = { web: "/pkg/manyhands_web_bg.wasm", engine: "/pkg/manyhands_engine_bg.wasm" };
const EVENTS_MAX = 50;
// States are told at most so often.
const TELL_MS = 250;
// An adapter that takes longer to prove itself is not used.
const CHECK_MS_MAX = 120_000;
// Workers that are lost in so many minutes before the tab gives up.
const LOSSES_MAX = 8;
const LOSSES_MINUTES = 10;

let compiled;

async function compileOne(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error("the program that computes cannot be loaded; reload the page");
  return WebAssembly.compileStreaming(answer);
}

/** The modules, compiled once for all workers. */
function compile() {
  compiled ??= (async () => {
    const [web, engine] = await Promise.all([compileOne(WASM.web), compileOne(WASM.engine)]);
    return { web, engine };
  })();
  compiled.catch(() => (compiled = undefined));
  return compiled;
}

const worker = (script) => new Worker(script, { type: "module" });

/** Runs one task of the verifier in a worker of its own. */
async function verify(task, onProgress) {
  const modules = await compile();
  const verifier = worker("/verifier.js");
  try {
    return await new Promise((resolve, reject) => {
      verifier.onerror = ({ message }) => reject(new Error(message));
      verifier.onmessage = ({ data }) => {
        if ("progress" in data) onProgress?.(data.progress);
        else if ("error" in data) reject(new Error(data.error));
        else resolve(data.result);
      };
      verifier.postMessage({ modules, ...task });
    });
  } finally {
    verifier.terminate();
  }
}

export class Tab extends EventTarget {
  #kept = Kept.open();
  #settings = { ...DEFAULT_SETTINGS };
  #facts = { paused: false, visible: document.visibilityState === "visible", battery: false };
  #network = null;
  #engines = [];
  #talk = new Talk(compile);
  #losses = [];
  // Counts starts: what an earlier one still does is ignored.
  #turn = 0;
  #told = false;
  #state = {
    stage: "idle",
    reason: null,
    secure: window.isSecureContext,
    run: null,
    peer: null,
    engine: null,
    speed: 0,
    unit: null,
    tokens_per_second: null,
    accepted: 0,
    computed: 0,
    multiply_adds: 0,
    first_credit_s: null,
    bytes_in: 0,
    bytes_out: 0,
    // Of what came in, pieces of weights.
    weights_in: 0,
    cached_bytes: 0,
    // Of the time with work at hand, the share in which the engines computed.
    busy_share: null,
    // How long submissions to the graphics device took.
    submissions: null,
    events: [],
  };

  constructor() {
    super();
    this.#kept.then(async (kept) => this.#set(await kept.totals()));
    document.addEventListener("visibilitychange", () => {
      this.#notice({ visible: document.visibilityState === "visible" });
    });
    // Not every browser tells.
    navigator.getBattery?.().then((battery) => {
      const look = () => this.#notice({ battery: !battery.charging });
      battery.addEventListener("chargingchange", look);
      look();
    });
  }

  get state() {
    return this.#state;
  }

  /** Begins to contribute. */
  async start(settings) {
    this.#end();
    if (settings) await this.configure(settings);
    else this.#settings = await this.settings();
    this.#facts.paused = false;
    this.#losses = [];
    await this.#begin();
  }

  /** Ends it at once. The host sees the connection close, and gives to others what was held. */
  stop() {
    this.#end();
    this.#set({ stage: "stopped", reason: null, unit: null, tokens_per_second: null });
  }

  pause() {
    this.#notice({ paused: true });
  }

  resume() {
    this.#notice({ paused: false });
  }

  /** Takes settings and keeps them. Another engine or number of threads counts from the next start. */
  async configure(settings) {
    this.#settings = { ...(await this.settings()), ...settings };
    this.#network?.postMessage({ settings: this.#settings });
    await (await this.#kept).put("settings", this.#settings);
  }

  async settings() {
    return (await this.#kept).settings();
  }

  async receipts() {
    return (await this.#kept).receipts();
  }

  /** Checks every hash and signature of the ledger. */
  verifyChain(onProgress) {
    return verify({}, onProgress);
  }

  /** Computes the unit of a record of the ledger again. */
  async recompute(sequence) {
    const settings = await this.settings();
    const kind = this.#state.engine?.kind ?? settings.engine;
    return verify({ recompute: sequence, kind, workers: settings.threads });
  }

  /** Asks the model; see the class Talk. */
  async ask(ask, hear) {
    const settings = await this.settings();
    return this.#talk.ask(ask, this.#state.engine?.kind ?? settings.engine, settings.threads, hear);
  }

  /** Stops the answer. */
  hush() {
    this.#talk.stop();
  }

  #set(change) {
    this.#state = { ...this.#state, ...change };
    if (this.#told) return;
    this.#told = true;
    setTimeout(() => {
      this.#told = false;
      this.dispatchEvent(new Event("state"));
    }, TELL_MS);
  }

  #say(text) {
    const events = [...this.#state.events, { at_ms: Date.now(), text }].slice(-EVENTS_MAX);
    this.#set({ events });
  }

  #notice(facts) {
    Object.assign(this.#facts, facts);
    this.#network?.postMessage({ facts: this.#facts });
  }

  #fail(reason) {
    this.#end();
    this.#say(reason);
    this.#set({ stage: "failed", reason, unit: null, tokens_per_second: null });
  }

  #end() {
    this.#turn += 1;
    this.#network?.terminate();
    this.#network = null;
    this.#endEngines();
  }

  #endEngines() {
    this.#engines.forEach((engine) => engine.terminate());
    this.#engines = [];
  }

  async #begin() {
    const turn = ++this.#turn;
    this.#set({ stage: "checking", reason: "checking that this machine computes the right bits" });
    try {
      const modules = await compile();
      const engine = await this.#openEngines(modules.engine, this.#settings.engine);
      if (turn !== this.#turn) return;
      const page = new URL(location.href);
      const secure = page.protocol === "https:";
      const setup = { host: page.hostname, port: Number(page.port) || (secure ? 443 : 80), secure };
      this.#network = worker("/volunteer.js");
      this.#listen();
      const [ports, transfer] = this.#channels();
      const start = { module: modules.web, engine, setup, loaded_ms: performance.timeOrigin };
      this.#set({ stage: "connecting", reason: null });
      this.#network.postMessage({ start, ports, settings: this.#settings, facts: this.#facts }, transfer);
    } catch (error) {
      if (turn === this.#turn) this.#fail(error.message);
    }
  }

  /** Opens as many engines of the kind as there are to be; returns what the first one says. */
  async #openEngines(module, kind) {
    this.#endEngines();
    const turn = this.#turn;
    const first = await this.#openEngine(module, kind);
    let report = first;
    if (report.kind === "wasm" && report.pass) {
      const more = Array.from({ length: this.#settings.threads - 1 }, () => this.#openEngine(module, "wasm"));
      await Promise.all(more);
    }
    if (turn !== this.#turn) throw new Error("stopped");
    if (!report.pass) throw new Error(`this browser does not compute the right bits: ${report.problem}`);
    const workers = this.#engines.length;
    const name = workers > 1 ? `${report.name}, ${workers} workers` : report.name;
    const speed = report.speed * workers;
    const { digest, pass, problem } = report;
    this.#set({ engine: { kind: report.kind, name, workers, digest, pass, problem }, speed });
    if (problem) this.#say(problem);
    return { name: `tab, ${report.kind} (${name})`.slice(0, 120), speed };
  }

  /** Opens one engine. One that is lost before it proves itself is given up for wasm. */
  async #openEngine(module, kind) {
    const turn = this.#turn;
    const engine = worker("/engine.js");
    this.#engines.push(engine);
    try {
      return await new Promise((resolve, reject) => {
        const late = setTimeout(() => reject(new Error("it takes too long")), CHECK_MS_MAX);
        const settle = (act, value) => {
          clearTimeout(late);
          // From now on a loss is the running engine's.
          engine.onmessage = ({ data }) => data.lost && this.#lose(turn, `an engine was lost: ${data.lost}`);
          engine.onerror = ({ message }) => this.#lose(turn, `an engine was lost: ${message}`);
          act(value);
        };
        engine.onerror = ({ message }) => settle(reject, new Error(message));
        engine.onmessage = ({ data }) => {
          if (data.report) settle(resolve, data.report);
          else settle(reject, new Error(data.lost));
        };
        engine.postMessage({ module, kind, workers: this.#settings.threads });
      });
    } catch (error) {
      if (kind === "wasm" || turn !== this.#turn) throw error;
      engine.terminate();
      this.#engines = this.#engines.filter((e) => e !== engine);
      this.#say(`WebGPU is not used: ${error.message}`);
      return this.#openEngine(module, "wasm");
    }
  }

  /** A channel from the network worker to each engine. */
  #channels() {
    const channels = this.#engines.map(() => new MessageChannel());
    channels.forEach(({ port2 }, i) => this.#engines[i].postMessage({ port: port2 }, [port2]));
    const ports = channels.map(({ port1 }) => port1);
    return [ports, ports];
  }

  /** Hears the network worker, until another turn begins. */
  #listen() {
    const turn = this.#turn;
    this.#network.onmessage = ({ data }) => turn === this.#turn && this.#hear(data);
    this.#network.onerror = ({ message }) => this.#lose(turn, `the network worker ended: ${message}`, true);
  }

  #hear(data) {
    if (data.say) this.#say(data.say);
    else if (data.state) this.#set(data.state);
    else if (data.failed) this.#fail(data.failed);
    else if (data.broken) this.#lose(this.#turn, `the network worker ended: ${data.broken}`, true);
    else if (data.broken_engine) this.#lose(this.#turn, data.broken_engine);
  }

  /** A worker is lost: others take its place, unless that happens again and again. */
  async #lose(turn, why, all = false) {
    if (turn !== this.#turn) return;
    const now = Date.now();
    this.#losses = [...this.#losses.filter((at) => now - at < LOSSES_MINUTES * 60_000), now];
    if (this.#losses.length > LOSSES_MAX) return this.#fail(`${why}; that happened too often, reload the page to try again`);
    this.#say(`${why}; starting again`);
    if (all || !this.#network) {
      this.#end();
      return this.#begin();
    }
    // Further losses of the same engines are known already.
    const next = ++this.#turn;
    this.#listen();
    try {
      await this.#openEngines((await compile()).engine, this.#state.engine?.kind ?? this.#settings.engine);
      if (next !== this.#turn) return;
      const [ports, transfer] = this.#channels();
      this.#network.postMessage({ ports }, transfer);
    } catch (error) {
      if (next === this.#turn) this.#fail(error.message);
    }
  }
}
