// A real model through other people's runtimes: GGUF and adapters in llama.cpp, safetensors in MLX.
// `make smollm2` fetches the model and both, and runs this.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";
import { getLlama } from "node-llama-cpp";

// Chances in nats that differ by less may be ranked otherwise: eleven bits of activations here,
// half precision there.
const CLOSE = 0.1;
const TOKENS = 24;
const program = process.env.MANYHANDS ?? "target/debug/manyhands";
const reference = JSON.parse(readFileSync(new URL("reference.json", import.meta.url)));
const dir = mkdtempSync(join(tmpdir(), "manyhands-export-"));
const model = join(dir, "model");
const run = join(dir, "run");
after(() => rmSync(dir, { recursive: true }));

const manyhands = (...args) => execFileSync(program, args, { encoding: "utf8", maxBuffer: 1 << 26 });
const written = (from, format, name, ...args) => {
  const out = join(dir, name);
  console.log(JSON.parse(manyhands("export", from, "--format", format, "--out", out, "--json", ...args)));
  return out;
};
const greedy = (from) =>
  reference.prompts.map(({ ids }) => {
    const args = ["--prompt-ids", ids.join(","), "--greedy", "--ignore-end", "--max-new-tokens", `${TOKENS}`];
    return JSON.parse(manyhands("sample", from, ...args, "--count", "1", "--json", "--engine", "cpu"));
  });

const llama = await getLlama({ gpu: false, build: "never", logLevel: "error" });
after(() => llama.dispose());

// For each token that was said: the likeliest one in its place, and both chances.
async function scores(path, said, lora) {
  const loaded = await llama.loadModel({ modelPath: path });
  const context = await loaded.createContext({ contextSize: 256, lora });
  const sequence = context.getSequence();
  const out = [];
  for (const { prompt_ids: prompt, tokens } of said) {
    await sequence.clearHistory();
    const places = [...prompt, ...tokens.slice(0, -1)].map((token, i) => {
      if (i < prompt.length - 1) return token;
      const filter = { tokens: [tokens[i - prompt.length + 1]], includeMax: true };
      return [token, { generateNext: { logits: { filter }, totalLogitWeight: true } }];
    });
    const results = (await sequence.controlledEvaluate(places)).slice(prompt.length - 1);
    out.push(
      results.map(({ next: { logits, totalLogitWeight } }, i) => {
        const [best, max] = [...logits].reduce((a, b) => (b[1] > a[1] ? b : a));
        const best_logprob = -Math.log(totalLogitWeight);
        return { best, best_logprob, logprob: logits.get(tokens[i]) - max + best_logprob };
      }),
    );
  }
  const texts = reference.battery.map(({ text }) => loaded.tokenize(text, true).map(Number));
  await loaded.dispose();
  return { scores: out, texts };
}

// What we say is what the other runtime says, but where it is nearly as ready to say something else.
function agree(name, said, scores) {
  let [equal, error] = [0, 0];
  said.forEach(({ tokens, logprobs }, i) => {
    assert.equal(scores[i].length, TOKENS);
    scores[i].forEach(({ best, best_logprob, logprob }, step) => {
      const where = `${name}, ${reference.prompts[i].name}, step ${step}`;
      error = Math.max(error, Math.abs(logprob - logprobs[step]));
      if (best === tokens[step]) equal += 1;
      else assert.ok(best_logprob - logprob < CLOSE, `${where}: ${tokens[step]} for ${best}, ${best_logprob} and ${logprob}`);
    });
  });
  const all = said.length * TOKENS;
  console.log(`${name}: ${equal} of ${all} tokens equal, log-probabilities within ${error.toFixed(4)}`);
  assert.ok(equal >= 0.97 * all && error < CLOSE, `${name}: ${equal} of ${all}, ${error}`);
}

// How far the log-probabilities of what one model says are in another.
const distance = (a, b) => Math.max(...a.flat().map(({ logprob }, i) => Math.abs(logprob - b.flat()[i].logprob)));

let said, trained, gguf;

test("llama.cpp says what the imported model says", async () => {
  manyhands("import", process.env.SMOLLM2, "--out", model, "--no-report", "--json");
  said = greedy(model);
  gguf = written(model, "gguf", "model.gguf");
  const got = await scores(gguf, said);
  agree("GGUF in llama.cpp", said, got.scores);
  reference.battery.forEach(({ text, ids }, i) => assert.deepEqual(got.texts[i], ids, JSON.stringify(text)));
});

test("llama.cpp says what an adapter's run says, adapter merged or beside the model", async () => {
  const file = join(dir, "run.toml");
  writeFileSync(
    file,
    `name = "x"\n[model]\nimport = "${model}"\ninstruction = "Answer with # and the result."\n[model.lora]\nrank = 8\n` +
      `[[task]]\nfamily = "chain_sum"\nlevel = 1\n[sft]\nsteps = 2\nbatch = 4\n[sft.optimizer]\nlearning_rate = 1e-3\n` +
      `[eval]\nproblems = 1\nsamples = 1\nk = [1]\n`,
  );
  manyhands("train", file, "--dir", run, "--engine", "cpu");
  trained = greedy(run);
  const merged = await scores(written(run, "gguf", "merged.gguf"), trained);
  agree("merged GGUF in llama.cpp", trained, merged.scores);
  const beside = await scores(gguf, trained, written(run, "gguf-lora", "lora.gguf"));
  agree("GGUF with an adapter in llama.cpp", trained, beside.scores);
  // The adapter is no small change that an error would hide in.
  const without = await scores(gguf, trained);
  assert.ok(distance(without.scores, merged.scores) > 10 * CLOSE, "the adapter changes little");
});

test("MLX says what both say", () => {
  const mlx = (path, said) => {
    const sequences = said.map(({ prompt_ids, tokens }) => ({ prompt: prompt_ids, tokens }));
    const texts = reference.battery.map(({ text }) => text);
    const input = JSON.stringify({ model: path, sequences, texts, chat: "What is 17 + 25? Answer with a number." });
    const env = { ...process.env, PYTHONPATH: process.env.MLX };
    const script = new URL("score.py", import.meta.url).pathname;
    return JSON.parse(execFileSync("python3", [script], { input, env, encoding: "utf8", maxBuffer: 1 << 26 }));
  };
  const plain = mlx(written(model, "safetensors", "hub"), said);
  agree("safetensors in MLX", said, plain.scores);
  reference.battery.forEach(({ text, ids }, i) => assert.deepEqual(plain.texts[i], ids, JSON.stringify(text)));
  assert.deepEqual(plain.chat, reference.prompts.find((p) => p.name === "math_chat").ids);
  agree("merged safetensors in MLX", trained, mlx(written(run, "safetensors", "merged"), trained).scores);
});
