// Compiles every kernel and pipeline with Tint through Dawn's null backend: no GPU is needed.
//
//   cargo run -q -p manyhands-shaders --example dump_wgsl | node tests/tint/validate.mjs
//
// naga accepts some modules that Tint rejects (a barrier in control flow that is not uniform, above
// all); browsers on Dawn would refuse them. Exits with 1 and the compiler's messages on any error.

import { readFileSync } from "node:fs";
import { create, globals } from "webgpu";

Object.assign(globalThis, globals);

const modules = JSON.parse(readFileSync(0, "utf8"));
const gpu = create(["backend=null"]);
const adapter = await gpu.requestAdapter();
const device = await adapter.requestDevice();
device.addEventListener("uncapturederror", (e) => e.preventDefault?.());

const problems = [];
let pipelines = 0;
for (const { name, source, entry_points } of modules) {
  device.pushErrorScope("validation");
  const module = device.createShaderModule({ label: name, code: source });
  const { messages } = await module.getCompilationInfo();
  await device.popErrorScope();
  for (const m of messages) {
    const line = source.split("\n")[m.lineNum - 1] ?? "";
    console.error(`${name}:${m.lineNum}:${m.linePos}: ${m.type}: ${m.message}\n    ${line.trim()}`);
  }
  // Building pipelines of an invalid module can bring Dawn for Node down: check the messages first.
  if (messages.some((m) => m.type === "error")) {
    problems.push(name);
    continue;
  }
  for (const entry of entry_points) {
    for (const lanes of entry.lanes === null ? [null] : [8, entry.lanes, 256]) {
      device.pushErrorScope("validation");
      device.createComputePipeline({
        layout: "auto",
        compute: {
          module,
          entryPoint: entry.name,
          constants: lanes === null ? {} : { LANES: lanes },
        },
      });
      const error = await device.popErrorScope();
      pipelines += 1;
      if (error) {
        problems.push(`${name}.${entry.name}`);
        console.error(`${name}.${entry.name} with LANES = ${lanes}: ${error.message}`);
      }
    }
  }
}

console.log(`${modules.length} modules, ${pipelines} pipelines, ${problems.length} with errors`);
// Dawn keeps the event loop alive: leave explicitly.
process.exit(problems.length === 0 ? 0 : 1);
