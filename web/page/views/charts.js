// The charts of a run, and how its steps and evaluations become their data.

import { Chart, shared } from "./chart.js";
import { big, fixed, percent } from "../words.js";

// Share of the newest value in the smoothed line, for long runs.
const SMOOTH = 0.12;
const nats = (v) => fixed(v, 2);
// As many digits as the size of a number asks for.
const measured = (v) => (v === 0 ? "0" : fixed(v, Math.abs(v) >= 10 ? 1 : Math.abs(v) >= 0.1 ? 3 : 5));
const plain = (v) => String(Number(v.toPrecision(4)));
const share = (_, low, high) => [0, Math.min(1, Math.max(0.1, Math.ceil((high ?? 1) * 11) / 10))];
const fromZero = (_, low, high) => [0, (high || 1) * 1.12];

const RL = "Begins with the first step of reinforcement learning.";
const EVALUATION = "Begins with the first evaluation on held-out problems.";

const SPECS = {
  reward: {
    title: "Reward", words: "Share of sampled answers that are right, on training problems.", empty: RL, format: percent, range: share,
    series: [{ name: "step", line: "line-1", faint: true }, { name: "smoothed", line: "line-1" }],
  },
  pass: {
    title: "pass@1 and pass@k", words: "Held-out problems solved in one attempt, and in the best of k; 95% intervals.", empty: EVALUATION, format: percent, range: share,
    series: [
      { name: "pass@1", line: "line-1", points: true, band: [1, 2] }, { low: true, line: "line-1" }, { high: true, line: "line-1" },
      { name: "pass@k", line: "line-3", points: true, band: [4, 5] }, { low: true, line: "line-3" }, { high: true, line: "line-3" },
    ],
    bands: [{ low: 2, high: 3, line: "line-1" }, { low: 5, high: 6, line: "line-3" }],
  },
  entropy: {
    title: "Token entropy", words: "How undecided a token is, nats. The band is where the run keeps it.", empty: RL, format: nats, axis: plain,
    series: [{ name: "sampled", line: "line-1" }, { name: "held-out", line: "line-3", points: true }, { low: true, silent: true, line: "line-4" }, { high: true, silent: true, line: "line-4" }],
    bands: [{ low: 3, high: 4, line: "line-4" }], range: fromZero,
  },
  answers: {
    title: "Answer entropy", words: "How many different final answers a held-out problem gets, nats.", empty: EVALUATION, format: nats, axis: plain, range: fromZero,
    series: [{ name: "entropy", line: "line-1", points: true }],
  },
  kl: {
    title: "KL to the reference", words: "How far the policy moved since the last reset, nats a token. Dashed: a reset.", empty: RL, format: measured, axis: plain,
    series: [{ name: "KL", line: "line-1" }],
  },
  lag: {
    title: "Policy lag", words: "Updates between the weights that sampled and the weights that learn.", empty: RL, format: (v) => fixed(v, v % 1 ? 1 : 0), axis: plain, range: fromZero,
    series: [{ name: "updates", line: "line-1" }],
  },
  speed: {
    title: "Speed", words: "Tokens sampled and trained on a second, all machines together.", empty: "Begins with the first step.", format: big, range: fromZero,
    series: [{ name: "step", line: "line-1", faint: true }, { name: "smoothed", line: "line-1" }],
  },
  loss: {
    title: "Loss", words: "Of the batch: imitation first, then the policy objective.", empty: "Begins with the first step.", format: measured, axis: plain,
    series: [{ name: "supervised", line: "line-3" }, { name: "reinforcement", line: "line-1" }],
  },
};

function smooth(values) {
  let mean = null;
  return values.map((v) => {
    if (v === null) return null;
    mean = mean === null ? v : mean + SMOOTH * (v - mean);
    return mean;
  });
}

export class Charts {
  #charts = Object.fromEntries(Object.entries(SPECS).map(([name, spec]) => [name, new Chart(spec)]));

  get figures() {
    return Object.values(this.#charts).map((chart) => chart.root);
  }

  // Draws what a run has so far.
  update({ steps, evaluations, config, status }) {
    const inOrder = (map) => [...map].sort((a, b) => a[0] - b[0]);
    const lines = inOrder(steps);
    const tests = inOrder(evaluations);
    const last = Math.max(1, status?.steps ?? 0, ...lines.slice(-1).map(([x]) => x));
    const done = Math.max(1, ...lines.slice(-1).map(([x]) => x), ...tests.slice(-1).map(([x]) => x));
    // The future is shown only as far as it is near, so that the past has room.
    const end = Math.min(last, Math.max(10, Math.ceil(done * 1.02)));
    if (shared.all[1] !== end) shared.all = [0, end];
    const learning = lines.filter(([, s]) => s.phase === "rl");
    this.#step("reward", learning, (s) => [s.reward]);
    this.#step("kl", config?.rl?.learn?.loss?.kl?.beta === 0 ? [] : learning, (s) => [s.batch.kl], resets(learning));
    this.#step("lag", learning, (s) => [s.policy_lag]);
    this.#step("speed", lines, (s) => [s.tokens_per_second ?? null]);
    this.#charts.loss.update(columns(lines, (s) => (s.phase === "sft" ? [s.loss, null] : [null, s.loss])));
    const ks = [...new Set(tests.flatMap(([, t]) => Object.keys(t.overall.pass_at_k).map(Number)))].sort((a, b) => a - b);
    const most = ks.at(-1);
    if (most > 1) SPECS.pass.series[3].name = `pass@${most}`;
    const rates = (t) => [1, most > 1 ? most : null].flatMap((k) => {
      const rate = t.overall.pass_at_k[k];
      return rate ? [rate.mean, rate.low, rate.high] : [null, null, null];
    });
    this.#charts.pass.update(columns(tests, rates));
    this.#charts.answers.update(columns(tests, (t) => [t.overall.answer_entropy]));
    this.#entropy(learning, tests, config?.rl?.learn?.entropy);
  }

  // A series of steps, and its smoothed form if the chart has one.
  #step(name, lines, values, marks) {
    const data = columns(lines, values);
    if (SPECS[name].series.length > data.length - 1 && data.length > 1) data.push(smooth(data[1]));
    this.#charts[name].update(data, marks);
  }

  // Both sampled and held-out entropy, on the union of their steps, over the target band.
  #entropy(learning, tests, band) {
    const sampled = new Map(learning.map(([x, s]) => [x, s.entropy]));
    const held = new Map(tests.map(([x, t]) => [x, t.token_entropy]));
    const xs = [...new Set([...sampled.keys(), ...held.keys()])].sort((a, b) => a - b);
    const edge = (v) => xs.map(() => v ?? null);
    this.#charts.entropy.update([xs, xs.map((x) => sampled.get(x) ?? null), xs.map((x) => held.get(x) ?? null), edge(band?.low), edge(band?.high)]);
  }
}

// Columns for uPlot: x values, then one list a value.
function columns(lines, values) {
  const rows = lines.map(([, line]) => values(line));
  const width = rows[0]?.length ?? 0;
  return [lines.map(([x]) => x), ...Array.from({ length: width }, (_, i) => rows.map((row) => row[i]))];
}

function resets(lines) {
  const words = { schedule: "reference reset by schedule", kl: "reference reset: KL", stalled: "reference reset: stalled" };
  return new Map(lines.filter(([, s]) => s.reset).map(([x, s]) => [x, words[s.reset] ?? s.reset]));
}
