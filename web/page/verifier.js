// Checks the ledger in a worker of its own: hashes and signatures of all records, and any unit by
// computing it again on this machine.
import { initSync, hash_of, unit_weights } from "/pkg/manyhands_web.js";
import { initSync as initEngine } from "/pkg/manyhands_engine.js";
import { Blobs, fetchText } from "/blobs.js";
import { open } from "/engines.js";
import { load, read, readWhole } from "/run-chain.js";

async function recompute(sequence, kind, workers) {
  const chain = await readWhole();
  const [record] = JSON.parse(await fetchText(`/api/ledger?from=${sequence}&limit=1`));
  // Enums are told apart by their key.
  const entry = record?.entry?.Unit;
  if (!entry) throw new Error(`record ${sequence} is no unit`);
  const blobs = await Blobs.open(() => {});
  const [unit, opened] = await Promise.all([blobs.get(entry.unit), open(kind, workers)]);
  const { engine, report } = opened;
  if (!engine) throw new Error(opened.problem);
  const model = chain.model();
  const weights = unit_weights(unit, model);
  if (!weights) throw new Error("the unit is not one of this run's model");
  engine.model(model);
  await load(engine, chain, weights, blobs);
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
      const chain = await read(undefined, (records) => postMessage({ progress: records }));
      postMessage({ result: JSON.parse(chain.outcome()) });
    }
  } catch (error) {
    postMessage({ error: error.message ?? `${error}` });
  }
};
