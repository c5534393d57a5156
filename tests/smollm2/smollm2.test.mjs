// A real model through the program: what its import costs, its tokens, its words.
// `make smollm2` fetches the model and runs this.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";

const program = process.env.MANYHANDS ?? "target/debug/manyhands";
const model = process.env.SMOLLM2;
const reference = JSON.parse(readFileSync(new URL("reference.json", import.meta.url)));
const dir = mkdtempSync(join(tmpdir(), "manyhands-smollm2-"));
after(() => rmSync(dir, { recursive: true }));

const run = (...args) => execFileSync(program, [...args, "--engine", "cpu"], { encoding: "utf8", maxBuffer: 1 << 26 });
const lines = (...args) => run("sample", join(dir, "model"), "--json", "--count", "1", ...args).trim().split("\n").map(JSON.parse);

test("the import stays within its goals", () => {
  const report = JSON.parse(run("import", model, "--out", join(dir, "model"), "--json"));
  console.log(report);
  assert.ok(report.kl > 0 && report.kl < 0.002, `mean KL ${report.kl}`);
  assert.ok(report.top1 > 0.96, `top-1 agreement ${report.top1}`);
  assert.ok(report.ppl_exact / report.ppl_source < 1.01, `perplexity ${report.ppl_source} to ${report.ppl_exact}`);
  // Nothing is clamped; the first token's massive channel makes a few large terms.
  assert.deepEqual(Object.keys(report.saturation).filter((site) => site !== "matmul"), []);
  assert.deepEqual(report.formats, ["F32", "Q4_1", "Q8_0"]);
  assert.equal(report.tensors, 272);
});

test("texts have the token ids of the original's tokenizer", () => {
  const prompts = reference.battery.flatMap(({ text }) => ["--prompt", text]);
  const said = lines("--raw", "--max-new-tokens", "1", ...prompts);
  assert.equal(said.length, reference.battery.length);
  reference.battery.forEach(({ text, ids }, i) => assert.deepEqual(said[i].prompt_ids, ids, JSON.stringify(text)));
});

test("a chat asks as the original does and is answered by its words", () => {
  const chat = reference.prompts.find((p) => p.name === "math_chat");
  const [said] = lines("--prompt", "What is 17 + 25? Answer with a number.", "--greedy", "--max-new-tokens", "4", "--ignore-end");
  assert.deepEqual(said.prompt_ids, chat.ids);
  assert.deepEqual(said.tokens, chat.greedy_ids.slice(0, 4));
});
