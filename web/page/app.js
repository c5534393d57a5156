// The page: four views behind one address, chosen by what follows the #.

import { Contribute } from "./views/contribute.js";
import { RunView } from "./views/run.js";
import { TryView } from "./views/try.js";
import { Ledger } from "./views/ledger.js";
import { run } from "./data.js";
import { $, put } from "./dom.js";
import { time, whole } from "./words.js";
import { openTab } from "./own-tab.js";

const TITLES = { contribute: "Contribute", run: "The run", try: "Try it", ledger: "The ledger" };

// One tab object for all views: what it computes goes on while the person looks around.
const tab = openTab();
const views = {
  contribute: new Contribute($("contribute"), tab),
  run: new RunView($("run")),
  try: new TryView($("try"), tab),
  ledger: new Ledger($("ledger"), tab),
};
let shown = null;

// "#/ledger/12?kind=unit" is the view `ledger`, the path ["12"] and parameters.
function route() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const [name, ...rest] = path.split("/");
  return { name: name in views ? name : "contribute", rest, query: new URLSearchParams(query) };
}

function show() {
  const { name, rest, query } = route();
  const changed = shown !== name;
  for (const [other, view] of Object.entries(views)) {
    view.root.hidden = other !== name;
    const link = document.querySelector(`header nav a[href="#/${other}"]`);
    if (other === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const first = shown === null;
  shown = name;
  views[name].show(rest, query);
  title();
  if (changed && !first) {
    scrollTo(0, 0);
    $("view").focus({ preventScroll: true });
  }
}

function title() {
  const name = run.status?.name;
  put(document.querySelector("title"), [TITLES[shown], name, "Manyhands"].filter(Boolean).join(" · "));
}

function about() {
  const s = run.status;
  put($("about"), `manyhands ${s.version}, up ${time(s.uptime_s)}. ${whole(s.parameters)} parameters. Run ${s.run.slice(0, 16)}.`);
}

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  $("view").focus();
});
addEventListener("hashchange", show);
run.addEventListener("status", () => { about(); title(); });
run.addEventListener("lost", () => {
  $("lost").hidden = run.lost === null;
  if (run.lost !== null) {
    put($("lost"), `The coordination peer does not answer. What you see is from before; asking again. (${run.lost})`);
  }
});
show();
run.start();
