// Which engine computes: the graphics processor or the processor, whichever proves itself and is
// faster. For workers.
import { Engine } from "/pkg/manyhands_engine.js";

/** What the browser tells of its adapter, or null if it has none. */
async function adapterName() {
  const adapter = await navigator.gpu?.requestAdapter({ powerPreference: "high-performance" });
  if (!adapter) return null;
  const { vendor, architecture, description, device } = adapter.info ?? {};
  return [vendor, architecture, description || device].filter(Boolean).join(" ") || "graphics adapter";
}

async function openGpu() {
  const name = await adapterName();
  if (name === null) {
    const secure = self.isSecureContext
      ? "this browser offers no graphics adapter"
      : "a page over plain http has no WebGPU; open it by https to use the graphics processor";
    return { problem: secure };
  }
  try {
    const engine = await Engine.open("webgpu", name);
    const report = JSON.parse(engine.report());
    if (report.pass) return { engine, report };
    return { problem: `${name} is not used: ${report.problem}`, report };
  } catch (error) {
    return { problem: `${name} cannot be used: ${error.message}` };
  }
}

async function openWasm(problem) {
  const engine = await Engine.open("wasm", "");
  const report = JSON.parse(engine.report());
  return { engine, report: { ...report, problem: report.problem ?? problem } };
}

/** Opens the engine that was asked for; "auto" takes the faster of the two. */
export async function open(kind, workers) {
  if (kind === "wasm") return openWasm(null);
  const gpu = await openGpu();
  if (!gpu.engine) return openWasm(gpu.problem);
  if (kind === "webgpu") return gpu;
  const wasm = await openWasm(null);
  const [fast, slow] = [wasm.report.speed * workers, gpu.report.speed];
  if (slow >= fast) {
    wasm.engine.free();
    return gpu;
  }
  gpu.engine.free();
  const figures = `${(slow / 1e9).toFixed(2)} against ${(fast / 1e9).toFixed(2)} G multiply-adds a second`;
  wasm.report.problem = `WebGPU is right here but slower than the processor: ${figures} (${gpu.report.name})`;
  return wasm;
}
