// The network worker: the volunteer of the swarm, and everything that is kept. It never computes,
// so that heartbeats do not wait for arithmetic.
import { initSync, Volunteer } from "/pkg/manyhands_web.js";
import { reasonToRest } from "/courtesy.js";
import { Files } from "/files.js";
import { Kept } from "/kept.js";

const TICK_MS = 100;
// The page hears of changes at most so often.
const TELL_MS = 250;
// Between two notes of how much was sent and received.
const TRAFFIC_MS = 5_000;
// First and longest pause before the host is asked again.
const RETRY_MS_MIN = 500;
const RETRY_MS_MAX = 30_000;
// So many parts of units are the newest, when it comes to how busy the engines are.
const PARTS = 20;
// How long to wait for another tab of this browser to let go.
const OTHER_TAB_MS = 8_000;

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const today = () => new Date().toDateString();

let volunteer, kept, files, settings, facts, loaded_ms, totals;
let ports = [];
let first_credit_s = null;
// How long each of the newest parts was computed, and rested after: [busy, rest], milliseconds.
let parts = [];
// How long submissions to the graphics device took, as the engine says.
let submissions = null;
let traffic = { day: today(), bytes: 0 };
let counted = 0;

const say = (text) => postMessage({ say: text });

/** What the volunteer has done; see `Outside` in volunteer.rs. */
const outside = {
  model: (model) => ports.forEach((port) => port.postMessage({ model })),
  load: (want, base, blobs) => ports.forEach((port) => port.postMessage({ load: true, want, base, blobs })),
  forget: (weights) => ports.forEach((port) => port.postMessage({ forget: weights })),
  compute: (engine, part, unit) => ports[engine].postMessage({ compute: part, unit }, [unit.buffer]),
  broken: (engine, why) => postMessage({ broken_engine: `an engine answered nonsense: ${why}` }),
  keep: async (receipt) => {
    const lasted = kept.lasts;
    await kept.keepReceipt(JSON.parse(receipt));
    if (lasted && !kept.lasts) say("this browser's storage is full; receipts last as long as the page");
    totals = await kept.totals();
  },
  accepted: async (unit, sequence) => {
    const news = await kept.accepted(unit, sequence);
    totals = await kept.totals();
    if (news && first_credit_s === null) {
      first_credit_s = (Date.now() - loaded_ms) / 1000;
      say(`the first unit of this visit was accepted after ${first_credit_s.toFixed(1)} s`);
    }
  },
  read_blob: (hash) => files.read(hash),
  write_blob: (hash, offset, bytes, length) => files.write(hash, offset, bytes, length),
  say,
};

function listen(port, engine) {
  port.onmessage = ({ data }) => {
    if ("say" in data) say(data.say);
    else if ("loaded" in data) volunteer.loaded(data.loaded, data.made);
    else if ("progress" in data) volunteer.progress(data.progress, data.tokens);
    else if ("computed" in data) {
      parts = [...parts, [data.busy_ms, data.rest_ms]].slice(-PARTS);
      submissions = data.submissions ? JSON.parse(data.submissions) : null;
      volunteer.computed(engine, data.computed, data.bytes);
    }
  };
}

/** Of the time since work was there, the share in which the engines computed. */
function busyShare() {
  const [busy, rest] = parts.reduce(([a, b], [c, d]) => [a + c, b + d], [0, 0]);
  return busy > 0 ? busy / (busy + rest) : null;
}

function takeEngines(new_ports) {
  ports.forEach((port) => port.close());
  ports = new_ports;
  ports.forEach(listen);
  ports.forEach((port) => port.postMessage({ duty: settings.duty }));
}

/** Only one tab of a browser is the volunteer: both would have the same name. */
async function onlyTab() {
  if (!navigator.locks) return;
  const abort = AbortSignal.timeout(OTHER_TAB_MS);
  await new Promise((resolve, reject) => {
    const hold = () => {
      resolve();
      // Held until the worker ends.
      return new Promise(() => {});
    };
    navigator.locks.request("manyhands", { signal: abort }, hold).catch(reject);
  }).catch(() => {
    throw new Error("another tab of this browser takes part already; close one of the two");
  });
}

async function manifest() {
  for (let wait = RETRY_MS_MIN; ; wait = Math.min(2 * wait, RETRY_MS_MAX)) {
    try {
      const answer = await fetch("/api/manifest", { cache: "no-store" });
      if (answer.ok) return await answer.json();
    } catch {
      // Asked again below.
    }
    postMessage({ state: { stage: "connecting", reason: "the host does not answer; trying again by itself" } });
    await pause(wait);
  }
}

async function start({ module, engine, setup }) {
  kept = await Kept.open();
  if (!kept.lasts) say("this browser keeps nothing for this page; identity and receipts last as long as it is open");
  totals = await kept.totals();
  await onlyTab();
  files = await Files.open(kept, settings.cache_mb * 1e6, say);
  const noted = await kept.get("traffic");
  if (noted?.day === traffic.day) traffic = noted;
  initSync({ module });
  const described = { ...setup, manifest: await manifest(), engine: engine.name, speed: engine.speed, engines: ports.length };
  volunteer = new Volunteer(outside, await kept.seed(), JSON.stringify(described));
  setInterval(tick, TICK_MS);
}

let told_ms = 0;
let noted_ms = 0;
let told = "";

function tick() {
  const view = JSON.parse(volunteer.view());
  const bytes = view.bytes_in + view.bytes_out;
  if (traffic.day !== today()) traffic = { day: today(), bytes: 0 };
  traffic.bytes += bytes - counted;
  counted = bytes;
  volunteer.wishes(reasonToRest(settings, { ...facts, bytes_today: traffic.bytes }, new Date()) ?? undefined, settings.duty);
  volunteer.tick();
  const now = performance.now();
  if (now - noted_ms > TRAFFIC_MS) {
    noted_ms = now;
    kept.put("traffic", traffic);
  }
  if (now - told_ms < TELL_MS) return;
  const { run, name, ...rest } = view;
  const measured = { first_credit_s, cached_bytes: files.bytes, busy_share: busyShare(), submissions };
  const state = { ...rest, ...totals, ...measured, run: { id: run, name } };
  const text = JSON.stringify(state);
  if (text === told) return;
  [told, told_ms] = [text, now];
  postMessage({ state });
}

self.onmessage = async ({ data }) => {
  if (data.settings) {
    settings = data.settings;
    if (files) files.bytes_max = settings.cache_mb * 1e6;
    ports.forEach((port) => port.postMessage({ duty: settings.duty }));
  }
  if (data.facts) facts = data.facts;
  if (data.ports) takeEngines(data.ports);
  if (data.start) {
    loaded_ms = data.start.loaded_ms;
    await start(data.start).catch((error) => postMessage({ failed: error.message ?? `${error}` }));
  } else if (data.ports) {
    volunteer?.engines_replaced(data.ports.length);
  }
};
self.addEventListener("error", ({ message }) => postMessage({ broken: message }));
self.addEventListener("unhandledrejection", ({ reason }) => postMessage({ broken: `${reason?.message ?? reason}` }));
