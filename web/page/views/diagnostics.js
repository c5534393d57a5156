// What the engines and the network measured of themselves: for whoever wants to know more.

import { h, hash, pairs, renew } from "../dom.js";
import { big, bytes, fixed, percent, plural } from "../words.js";

const NONE = "Nothing yet. It is measured from when you press Start.";

function submissions(s) {
  if (!s || s.count === 0) return null;
  const most = `${fixed(s.p99_ms, 1)} ms for 99 of 100, ${fixed(s.max_ms, 1)} ms for the longest`;
  const compiling = s.compiling_count > 0 ? ` ${plural(s.compiling_count, "more")} compiled something, for up to ${fixed(s.compiling_max_ms, 0)} ms.` : "";
  return `${plural(s.count, "submission")}: ${most} (${s.longest}).${compiling}`;
}

export class Diagnostics {
  #body = h("div", {}, h("p", { class: "quiet" }, NONE));
  root = h("details", { class: "card diagnostics" }, h("summary", {}, "Diagnostics"), this.#body);

  show(s) {
    if (!s.engine) return;
    renew(this.#body, pairs([
      ["Engine", s.engine.name],
      ["Digest of its arithmetic", hash(s.engine.digest, 16)],
      ["Speed", s.speed > 0 ? `${big(s.speed)} multiply-adds a second, as measured at the start` : null],
      ["Busy", s.busy_share === null ? null : `${percent(s.busy_share)} of the time with work at hand`],
      ["Work handed to the graphics device", submissions(s.submissions)],
      ["Received", `${bytes(s.bytes_in)}, of which weights ${bytes(s.weights_in)}`],
      ["Sent", bytes(s.bytes_out)],
      ["Weights kept", bytes(s.cached_bytes)],
    ]));
  }
}
