// When a tab rests, in a real browser on the real page: hidden, on battery, outside hours, over the
// data cap, and by its duty. A rest is seen by what does not happen while somebody else works on.
import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, test } from "node:test";

import { runOf } from "./run.mjs";
import {
  diagnostics, directory, openPage, press, startBrowser, startHost, startVolunteer, unitsByOthers, until,
} from "./support.mjs";

let browser, host, volunteer;
before(async () => {
  const dir = directory();
  const runFile = join(dir, "run.toml");
  writeFileSync(runFile, runOf(100_000, 1));
  browser = await startBrowser({ webgpu: false });
  host = await startHost({ runFile, dir: join(dir, "host") });
  volunteer = startVolunteer({ url: host.url, dir: join(dir, "native") });
});
after(async () => {
  await browser?.close();
  await volunteer?.stop();
  await host?.stop();
});

/** A page that contributes with the settings that it has by itself, on one worker. */
async function contribute(t, prepare) {
  const context = await browser.newContext();
  t.after(() => context.close());
  await context.addInitScript(prepare ?? (() => {}));
  const { page } = await openPage(t, browser, host.url, "contribute", context);
  await until("the settings are shown", () => page.getByLabel("How hard").inputValue());
  await page.getByLabel("WebAssembly workers").fill("1");
  await page.getByLabel("WebAssembly workers").blur();
  const computed = async () => Number(/([\d,]+) computed in all/.exec(await page.getByText("computed in all.").innerText())[1].replaceAll(",", ""));
  await press(page, "Start");
  const works = async () => {
    const before = await computed();
    await until("units are computed", async () => (await computed()) > before);
  };
  await until("it has begun", () => page.getByText("computed in all.").isVisible());
  await works();
  /** It says why it rests, and does nothing while somebody else does ten units. */
  const rests = async (why) => {
    await page.getByRole("heading", { name: "Resting" }).waitFor();
    await page.getByText(why).waitFor();
    await page.locator(".doing").waitFor({ state: "hidden" });
    // The receipt of the unit that was in hand is kept a moment later.
    await unitsByOthers(host.url, 1);
    const before = await computed();
    await unitsByOthers(host.url, 10);
    assert.equal(await computed(), before, `it does not rest, although it says: ${why}`);
  };
  return { page, context, works, rests };
}

test("a tab that is hidden rests, unless it may work hidden", async (t) => {
  const { page, works, rests } = await contribute(t, () => {
    // Playwright lets every page believe that it is seen.
    let state = "visible";
    Object.defineProperty(document, "visibilityState", { get: () => state });
    window.become = (next) => {
      state = next;
      document.dispatchEvent(new Event("visibilitychange"));
    };
  });
  assert.ok(await page.getByLabel("Only while this page is visible").isChecked(), "on by default");
  await page.evaluate(() => window.become("hidden"));
  await rests("this tab is hidden");
  await page.evaluate(() => window.become("visible"));
  await works();
  await page.evaluate(() => window.become("hidden"));
  await rests("this tab is hidden");
  await page.getByLabel("Only while this page is visible").uncheck();
  await works();
});

test("a tab on a discharging battery rests, unless it may use it", async (t) => {
  const { page, works, rests } = await contribute(t, () => {
    const battery = new EventTarget();
    battery.charging = true;
    navigator.getBattery = async () => battery;
    window.plug = (charging) => {
      battery.charging = charging;
      battery.dispatchEvent(new Event("chargingchange"));
    };
  });
  assert.ok(await page.getByLabel("Only on mains power").isChecked(), "on by default");
  await page.evaluate(() => window.plug(false));
  await rests("the battery is in use");
  await page.evaluate(() => window.plug(true));
  await works();
  await page.evaluate(() => window.plug(false));
  await rests("the battery is in use");
  await page.getByLabel("Only on mains power").uncheck();
  await works();
});

test("a tab keeps to its hours and to its data cap", async (t) => {
  const { page, works, rests } = await contribute(t);
  const hour = await page.evaluate(() => new Date().getHours());
  await page.getByLabel("From").selectOption(String((hour + 2) % 24));
  await page.getByLabel("To", { exact: true }).selectOption(String((hour + 3) % 24));
  await rests("outside the hours that you set");
  await page.getByLabel("From").selectOption("");
  await works();
  await page.getByLabel("Data cap").fill("1");
  await page.getByLabel("Data cap").blur();
  await rests("today's data cap is used up");
  // What was used is known after a reload, and so is the cap.
  await page.reload();
  await press(page, "Start");
  await page.getByText("today's data cap is used up").waitFor();
  await page.getByLabel("Data cap").fill("");
  await page.getByLabel("Data cap").blur();
  await works();
});

test("a tab computes for the share of the time that it was given", async (t) => {
  const { page } = await contribute(t);
  const busy = async () => Number(/([\d.]+)%/.exec(await diagnostics(page, "Busy"))[1]);
  assert.equal(await busy(), 100);
  await page.getByLabel("How hard").fill("20");
  // A rest is never shorter than it should be; it takes some parts until they are the newest ones.
  const least = await until("it rests between parts", async () => ((await busy()) <= 25 ? busy() : null));
  t.diagnostic(`busy for 100% of the time at full duty, for ${least}% at 20%`);
  await page.getByLabel("How hard").fill("100");
  await until("it works through again", async () => (await busy()) > 50);
});
