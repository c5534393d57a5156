// Try it: talk to the newest version of the model, computed in the visitor's own tab.

import { run } from "../data.js";
import { h, hash, put, speak } from "../dom.js";
import { WITHOUT_TAB } from "../own-tab.js";
import { bytes, fixed, plural, whole } from "../words.js";

const SEED_MAX = 2 ** 32;

export class TryView {
  #tab = null;
  #messages = [];
  #answering = false;
  #log = h("ol", { class: "talk", "aria-label": "Conversation" });
  #doing = h("p", { class: "quiet", role: "status" });
  #bar = h("progress", { "aria-label": "Download" });
  #amount = h("span");
  #download = h("div", { class: "download quiet", hidden: true }, this.#bar, this.#amount);
  #facts = h("p", { class: "quiet facts" });
  #prompt = h("textarea", { id: "prompt", rows: 3, required: true, maxlength: 100_000 });
  #how = h("select", { id: "how" }, h("option", { value: "greedy" }, "The likeliest"), h("option", { value: "draw" }, "Drawn by chance"));
  #send = h("button", { class: "main", type: "submit", disabled: true }, "Ask");
  #stop = h("button", { class: "small", type: "button", hidden: true, click: () => this.#tab.hush() }, "Stop");
  #problem = h("button", { class: "small", type: "button", hidden: true, click: () => this.#takeProblem() }, "Take a problem of the run");
  #anew = h("button", { class: "small", type: "button", hidden: true, click: () => this.#begin() }, "Begin anew");

  constructor(root, opening) {
    this.root = root;
    const field = (label, control) => h("div", { class: "field" }, h("label", { for: control.id }, label), control);
    const form = h("form", { submit: (event) => this.#submit(event) },
      field("Your words", this.#prompt),
      h("div", { class: "row" }, this.#send, this.#stop, this.#problem, this.#anew,
        h("span", { class: "how" }, h("label", { for: "how" }, "Next word"), this.#how)));
    this.#prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        form.requestSubmit();
      }
    });
    root.append(
      h("h1", { id: "try-title" }, "Try the model"),
      h("p", { class: "lead" }, "Ask the newest version of the run’s model. Your own machine computes the answer, from weights whose hash is in the ledger; what you type stays in this tab."),
      h("section", { class: "card block" }, this.#log, this.#doing, this.#download, this.#facts, form));
    this.#begin();
    opening.then((tab) => {
      this.#tab = tab;
      if (tab === null) this.#say(WITHOUT_TAB);
      this.#send.disabled = tab === null;
    }, (error) => this.#say(`${error.message}. Reload the page to try again.`));
    run.addEventListener("samples", () => this.show());
  }

  // What an imported model reads is no text that could be typed.
  show() {
    const typed = run.config !== null && !run.config.model.import;
    this.#problem.hidden = !typed || !run.samples?.groups.length;
  }

  #say(text) {
    put(this.#doing, text);
    this.#doing.hidden = text === "";
    this.#download.hidden = true;
  }

  #begin() {
    this.#messages = [];
    this.#log.replaceChildren();
    this.#log.hidden = true;
    this.#anew.hidden = true;
    this.#facts.replaceChildren();
    this.#say("Nothing has been asked yet. The first question fetches the weights, which this browser keeps.");
  }

  #takeProblem() {
    const groups = run.samples.groups;
    this.#prompt.value = groups[Math.floor(Math.random() * groups.length)].problem;
    this.#prompt.focus();
  }

  #turn(role, text) {
    const words = h("div", { class: "said" }, text);
    this.#log.append(h("li", { class: role }, h("strong", {}, role === "user" ? "You" : "Model"), words));
    this.#log.hidden = false;
    return words;
  }

  async #submit(event) {
    event.preventDefault();
    const content = this.#prompt.value;
    if (this.#answering || content.trim() === "") return;
    this.#answering = true;
    this.#send.disabled = this.#anew.disabled = true;
    this.#stop.hidden = false;
    this.#prompt.value = "";
    this.#turn("user", content);
    const messages = [...this.#messages, { role: "user", content }];
    let words = null;
    const hear = (data) => {
      if (data.doing) this.#say(data.doing);
      else if (data.facts) this.#showFacts(data.facts);
      else if ("done" in data) this.#showDownload(data);
      else if ("text" in data) {
        words ??= this.#turn("assistant", "");
        put(words, data.text);
      }
    };
    try {
      const ask = { messages, greedy: this.#how.value === "greedy", seed: Math.floor(Math.random() * SEED_MAX) };
      const answer = await this.#tab.ask(ask, hear);
      this.#messages = [...messages, { role: "assistant", content: answer.text }];
      put(words ?? this.#turn("assistant", ""), answer.text);
      this.#say(this.#summary(answer));
      speak(`The model answers: ${answer.text}`);
    } catch (error) {
      const why = error.message === "stopped" ? "Stopped." : `There is no answer: ${error.message}`;
      this.#say(why);
      if (words === null) {
        this.#prompt.value = content;
        this.#log.lastElementChild.remove();
      }
    }
    this.#answering = false;
    this.#send.disabled = this.#anew.disabled = false;
    this.#stop.hidden = true;
    this.#anew.hidden = false;
  }

  #summary({ tokens, tokens_per_second, stopped, ended }) {
    const rate = tokens_per_second === null ? "" : ` at ${fixed(tokens_per_second, 1)} tokens a second`;
    const why = stopped ? ", stopped" : ended ? "" : ", cut off where the model’s context ends";
    return `${plural(tokens.length, "token")}${rate}${why}.`;
  }

  #showFacts({ ordinal, weights, engine, problem, chats, context }) {
    this.#say("Reading your words.");
    const memory = chats
      ? `It hears the whole conversation, up to ${whole(context)} tokens.`
      : "It was trained on the run’s problems and does not chat: each question stands alone, so ask as the problems do.";
    const why = problem ? `: ${problem}` : "";
    this.#facts.replaceChildren(`Version ${whole(ordinal)}, weights `, hash(weights, 16), `, computed here with ${engine}${why}. ${memory}`);
  }

  #showDownload({ done, total }) {
    this.#download.hidden = false;
    if (total) [this.#bar.max, this.#bar.value] = [total, done];
    else this.#bar.removeAttribute("value");
    put(this.#amount, total ? `${bytes(done)} of ${bytes(total)}` : bytes(done));
  }
}
