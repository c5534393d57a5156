// Runs the conformance suite of the wasm build:  node conformance.mjs manyhands_web.wasm
// Exits 1 unless its digest is the published one.
import { readFile } from "node:fs/promises";

const bytes = await readFile(process.argv[2]);
const { instance } = await WebAssembly.instantiate(bytes, {});
const { memory, report_address, report_length } = instance.exports;
const [address, length] = [report_address(), report_length()];
const report = new TextDecoder().decode(new Uint8Array(memory.buffer, address, length));
console.log(`wasm conformance: ${report} (${(bytes.length / 1024).toFixed(0)} KiB of wasm)`);
process.exit(report.startsWith("PASS ") ? 0 : 1);
