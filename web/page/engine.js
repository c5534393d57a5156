// The engine worker: opens one engine, proves it, and computes what comes over its port. It ends
// when the page ends it; what goes wrong is told, and the page starts another.
import { initSync } from "/pkg/manyhands_engine.js";
import { open } from "/engines.js";

// Tokens are told at most so often.
const PROGRESS_MS = 250;

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Serves a port: tasks one after another. */
function serve(engine, port) {
  let duty = 1;
  const tasks = {
    model: ({ model }) => engine.model(model),
    load: ({ want, base, blobs }) => {
      let made = true;
      try {
        engine.load(want, base, blobs);
      } catch (error) {
        made = false;
        port.postMessage({ say: `weights could not be loaded: ${error.message}` });
      }
      port.postMessage({ loaded: want, made });
    },
    forget: ({ forget }) => engine.forget(forget),
    compute: async ({ compute: part, unit }) => {
      const started = performance.now();
      let told = started;
      const progress = (tokens) => {
        const now = performance.now();
        if (now - told < PROGRESS_MS) return;
        told = now;
        port.postMessage({ progress: part, tokens });
      };
      const bytes = await engine.compute(unit, progress);
      const done = performance.now();
      const busy_ms = done - started;
      let rest_ms = 0;
      if (duty < 1) {
        // A duty of a half rests as long as it worked.
        await pause(busy_ms * (1 / duty - 1));
        rest_ms = performance.now() - done;
      }
      port.postMessage({ computed: part, bytes, busy_ms, rest_ms, submissions: engine.submissions() }, [bytes.buffer]);
    },
  };
  let last = Promise.resolve();
  port.onmessage = ({ data }) => {
    if (data.duty) duty = data.duty;
    const name = Object.keys(tasks).find((name) => name in data);
    if (name) {
      last = last.then(() => tasks[name](data)).catch((error) => postMessage({ lost: error.message }));
    }
  };
}

let engine;
self.onmessage = async ({ data }) => {
  try {
    if (data.module) {
      initSync({ module: data.module });
      const opened = await open(data.kind, data.workers);
      engine = opened.engine;
      postMessage({ report: opened.report });
    } else if (data.port) {
      serve(engine, data.port);
    }
  } catch (error) {
    postMessage({ lost: error.message });
  }
};
// A panic in wasm ends up here when nobody waits for it.
self.addEventListener("unhandledrejection", ({ reason }) => postMessage({ lost: `${reason?.message ?? reason}` }));
