// Runs the conformance suite of the wasm build:  node conformance.mjs DIRECTORY
// where DIRECTORY is what `.ci/wasm build` made. Exits 1 unless the digest is the published one.
import { readFile } from "node:fs/promises";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";

const directory = resolve(process.argv[2]);
const { initSync, conformance } = await import(pathToFileURL(`${directory}/manyhands_engine.js`));
const bytes = await readFile(`${directory}/manyhands_engine_bg.wasm`);
initSync({ module: bytes });
const report = conformance();
console.log(`wasm conformance: ${report} (${(bytes.length / 1024).toFixed(0)} KiB of wasm)`);
process.exit(report.startsWith("PASS ") ? 0 : 1);
