// Answers a visitor, in a worker of its own: the newest weights that the ledger names, on an engine
// of this machine. What is typed stays in this browser.
import { initSync, decode_bytes, encode_bytes, end_of_bytes } from "/pkg/manyhands_web.js";
import { initSync as initEngine } from "/pkg/manyhands_engine.js";
import { Blobs } from "/blobs.js";
import { open } from "/engines.js";
import { load, readWhole } from "/run-chain.js";

// The worker looks up from its work so often, and hears that it is to stop.
const LOOK_MS = 50;

let blobs, chain, engine, report, model, words, loaded;
let stopped = false;

const say = (doing) => postMessage({ doing });
const tell = (done, total) => postMessage({ done, total });

/** Between text and tokens: bytes, or what an imported model brought. */
async function wordsOf({ vocabulary }) {
  const names = JSON.parse(chain.text() ?? "null");
  if (!names) {
    const encode = (messages) => encode_bytes(messages.at(-1).content, vocabulary);
    return { chats: false, encode, text: decode_bytes, end: end_of_bytes() };
  }
  say("Fetching the model's vocabulary.");
  const { initSync: initWords, Words } = await import("/pkg/manyhands_words.js");
  initWords({ module: await WebAssembly.compileStreaming(fetch("/pkg/manyhands_words_bg.wasm")) });
  const files = ["import", "tokenizer", "template"].map((name) => names[name] && blobs.get(names[name], tell));
  const [about, tokenizer, template] = await Promise.all(files);
  if (!about || !tokenizer) throw new Error("the ledger names no tokenizer for the model");
  const found = new Words(about, tokenizer, template && new TextDecoder().decode(template), vocabulary);
  const encode = (messages) => found.encode(JSON.stringify(messages));
  return { chats: found.chats(), encode, text: (tokens) => found.text(tokens), end: found.end() };
}

/** An engine with the newest weights. */
async function prepare({ kind, workers }) {
  blobs ??= await Blobs.open(say);
  say("Reading the ledger, and checking every record.");
  chain = await readWhole(chain);
  if (!engine) {
    say("Checking that this machine computes the right bits.");
    const opened = await open(kind, workers);
    if (!opened.engine) throw new Error(opened.problem);
    ({ engine, report } = opened);
    if (!report.pass) throw new Error(`this browser does not compute the right bits: ${report.problem}`);
    engine.model(chain.model());
    model = JSON.parse(chain.model());
    words = await wordsOf(model);
  }
  const newest = JSON.parse(chain.newest());
  if (loaded?.weights !== newest.weights) {
    say("Fetching the newest weights.");
    await load(engine, chain, newest.weights, blobs, { have: loaded?.weights, tell });
    if (loaded) engine.forget(loaded.weights);
    loaded = newest;
  }
}

async function answer({ messages, greedy, seed }) {
  const { chats, encode, text, end } = words;
  const prompt = encode(messages);
  postMessage({ facts: { ...loaded, engine: report.name, problem: report.problem, chats, context: model.context } });
  const tokens = [];
  const started = performance.now();
  let first = started;
  let looked = started;
  const step = async (token) => {
    const now = performance.now();
    if (tokens.length === 0) first = now;
    tokens.push(token);
    // A character may take several tokens: the last one is whole when it is.
    postMessage({ text: text(new Uint32Array(tokens)).replace(/\uFFFD+$/, "") });
    if (now - looked > LOOK_MS) {
      await new Promise((resolve) => setTimeout(resolve));
      looked = performance.now();
    }
    return !stopped;
  };
  const ask = JSON.stringify({ greedy, seed, end });
  await engine.answer(loaded.weights, prompt, ask, step);
  const seconds = (performance.now() - first) / 1000;
  const ended = tokens.at(-1) === end;
  const tokens_per_second = tokens.length > 1 ? (tokens.length - 1) / seconds : null;
  return { tokens, text: text(new Uint32Array(tokens)), ended, stopped, prompt: prompt.length, tokens_per_second };
}

self.onmessage = async ({ data }) => {
  if (data.stop) {
    stopped = true;
    return;
  }
  try {
    if (data.modules) {
      initSync({ module: data.modules.web });
      initEngine({ module: data.modules.engine });
    }
    stopped = false;
    await prepare(data);
    postMessage({ answer: await answer(data.ask) });
  } catch (error) {
    postMessage({ error: error.message ?? `${error}` });
  }
};
