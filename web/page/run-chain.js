// The ledger of the run and what it names, for workers: records are checked as they are read, and
// weights are made of the blobs that the ledger says.
import { Chain } from "/pkg/manyhands_web.js";
import { fetchText } from "/blobs.js";

const PAGE_RECORDS = 1000;

/** Reads what the ledger has beyond what `chain` has read. */
export async function read(chain = new Chain(), tell = () => {}) {
  for (;;) {
    const page = await fetchText(`/api/ledger?from=${chain.records()}&limit=${PAGE_RECORDS}`);
    const count = chain.push(page);
    tell(chain.records());
    if (count === 0) return chain;
  }
}

/** The ledger as far as it goes, if all of it is right. */
export async function readWhole(chain) {
  const whole = await read(chain);
  const outcome = JSON.parse(whole.outcome());
  if (!outcome.ok) throw new Error(`the ledger is broken: ${outcome.first_wrong?.why}`);
  return whole;
}

/**
 * Puts weights on an engine that knows the model, and before them what they adapt. Of an engine
 * that has some version, `have`, only what follows from it is asked.
 */
export async function load(engine, chain, weights, blobs, { have, tell = () => {} } = {}) {
  const plan = JSON.parse(chain.plan(weights, have) ?? "null");
  if (!plan) throw new Error("the ledger does not say how these weights are made");
  for (const { want, base, blobs: names } of plan) {
    const bytes = [];
    for (const name of names) bytes.push(await blobs.get(name, tell));
    engine.load(want, base ?? undefined, bytes);
  }
}
