// Numbers and names as people read them.

export const percent = (v) => (v === null || v === undefined ? "–" : `${(100 * v).toFixed(v > 0 && v < 0.0995 ? 1 : 0)}%`);
export const whole = (v) => Math.round(v).toLocaleString("en");
export const plural = (n, one, many = `${one}s`) => `${whole(n)} ${n === 1 ? one : many}`;

export function big(v) {
  if (!v) return "0";
  const units = ["", " k", " M", " G", " T", " P", " E"];
  const power = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log10(Math.abs(v)) / 3)));
  const scaled = v / 1000 ** power;
  return `${scaled.toFixed(scaled < 10 && (power > 0 || scaled % 1 !== 0) ? 1 : 0)}${units[power]}`;
}

export const bytes = (v) => `${big(v)}${v < 1000 ? " " : ""}B`;

export function time(s) {
  if (s < 90) return `${Math.round(s)} s`;
  if (s < 5400) return `${Math.round(s / 60)} min`;
  if (s < 172800) return `${(s / 3600).toFixed(1)} h`;
  return `${Math.round(s / 86400)} days`;
}

// From 1 down to a part in a thousand a percentage says it; beyond that, "1 in N" does.
export function chance(v) {
  if (v >= 0.001 || v === 0) return v === 0 ? "0" : percent(v);
  return `1 in ${big(1 / v)}`;
}

export const fixed = (v, digits = 3) => (v === null || v === undefined ? "–" : v.toFixed(digits));

export const PHASES = { sft: "supervised fine-tuning", rl: "reinforcement learning", done: "all steps done" };

export const OFFENCES = {
  wrong_result: "a wrong result",
  bytes_differ_from_receipt: "bytes that differ from their receipt",
  malformed: "bytes that no correct program sends",
  bad_signature: "a signature that was not its own",
  lease_hoarding: "taking units and letting them lapse",
  flooding: "more messages than the protocol allows",
};

// What a unit is for, from the stage of its job: a name, or an object with that name.
export function stage(value) {
  const name = typeof value === "string" ? value : Object.keys(value)[0];
  return {
    Evaluate: "evaluation",
    EvaluateGreedy: "evaluation",
    Rollout: "rollout",
    Proximal: "score",
    Reference: "score",
    Policy: "score",
    Gradient: "gradient",
  }[name] ?? name.toLowerCase();
}

// A tab or a program, by what a volunteer says that it runs.
export const isTab = (volunteer) => /^tab\b/.test(volunteer.agent);
