// Checks the ledger in a worker of its own: hashes and signatures of all records, and any unit by
// computing it again on this machine.
import { initSync, Chain, hash_of, unit_weights } from "/pkg/manyhands_web.js";
import { initSync as initEngine } from "/pkg/manyhands_engine.js";
import { open } from "/engines.js";

const PAGE_RECORDS = 1000;

const fetchOk = async (url) => {
  const answer = await fetch(url, { cache: "no-store" });
  if (!answer.ok) throw new Error(`the host does not give ${url}: ${(await answer.json()).error}`);
  return answer;
};

const blob = async (hash) => {
  const bytes = new Uint8Array(await (await fetchOk(`/api/blobs/${hash}`)).arrayBuffer());
  if (hash_of(bytes) !== hash) throw new Error(`the host gives other bytes for ${hash}`);
  return bytes;
};

/** Reads all of the ledger. */
async function readChain(tell) {
  const chain = new Chain();
  for (;;) {
    const page = await (await fetchOk(`/api/ledger?from=${chain.records()}&limit=${PAGE_RECORDS}`)).text();
    const count = chain.push(page);
    tell(chain.records());
    if (count === 0) return chain;
  }
}

async function recompute(sequence, kind, workers) {
  const chain = await readChain(() => {});
  const outcome = JSON.parse(chain.outcome());
  if (!outcome.ok) throw new Error(`the ledger is broken: ${outcome.first_wrong?.why}`);
  const [record] = await (await fetchOk(`/api/ledger?from=${sequence}&limit=1`)).json();
  // Enums are told apart by their key.
  const entry = record?.entry?.Unit;
  if (!entry) throw new Error(`record ${sequence} is no unit`);
  const [unit, opened] = await Promise.all([blob(entry.unit), open(kind, workers)]);
  const { engine, report } = opened;
  if (!engine) throw new Error(opened.problem);
  const model = chain.model();
  const weights = unit_weights(unit, model);
  const plan = weights && chain.plan(weights);
  if (!plan) throw new Error("the ledger does not say how the unit's weights are made");
  engine.model(model);
  engine.load(weights, undefined, await Promise.all(plan.map(blob)));
  const started = performance.now();
  const computed = hash_of(await engine.compute(unit, () => {}));
  return {
    unit: entry.unit,
    claimed: entry.receipt,
    computed,
    equal: computed === entry.receipt,
    seconds: (performance.now() - started) / 1000,
    engine: report.name,
  };
}

self.onmessage = async ({ data }) => {
  try {
    initSync({ module: data.modules.web });
    if ("recompute" in data) {
      initEngine({ module: data.modules.engine });
      postMessage({ result: await recompute(data.recompute, data.kind, data.workers) });
    } else {
      const chain = await readChain((records) => postMessage({ progress: records }));
      postMessage({ result: JSON.parse(chain.outcome()) });
    }
  } catch (error) {
    postMessage({ error: error.message ?? `${error}` });
  }
};
