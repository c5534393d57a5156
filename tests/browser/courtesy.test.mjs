// When a tab rests:  node --test tests/browser/courtesy.test.mjs
import assert from "node:assert/strict";
import { test } from "node:test";

import { inHours, reasonToRest } from "../../web/page/courtesy.js";

const at = (hour, minute = 0) => new Date(2026, 0, 5, hour, minute);

test("hours may go over midnight, and end before their last minute", () => {
  assert.ok(inHours(null, at(3)));
  assert.ok(inHours("22-7", at(23)) && inHours("22-7", at(6, 59)) && !inHours("22-7", at(7)));
  assert.ok(inHours("8:30-17", at(8, 30)) && !inHours("8:30-17", at(8, 29)) && !inHours("8:30-17", at(17)));
});

test("every wish of the owner is a reason to rest, and none without a wish", () => {
  const all = { only_visible: true, only_mains: true, hours: "9-10", data_cap_mb: 5 };
  const none = { only_visible: false, only_mains: false, hours: null, data_cap_mb: null };
  const good = { paused: false, visible: true, battery: false, bytes_today: 0 };
  assert.equal(reasonToRest(all, good, at(9)), null);
  for (const [facts, date, word] of [
    [{ paused: true }, at(9), "paused"],
    [{ visible: false }, at(9), "hidden"],
    [{ battery: true }, at(9), "battery"],
    [{}, at(11), "hours"],
    [{ bytes_today: 5e6 }, at(9), "cap"],
  ]) {
    assert.match(reasonToRest(all, { ...good, ...facts }, date), new RegExp(word));
    const free = reasonToRest(none, { ...good, ...facts }, date);
    assert.equal(free === null, word !== "paused");
  }
});
