// The page's side of talking to the model: one worker, which keeps its weights between questions.

export class Talk {
  #compile;
  #worker = null;
  // Gives up the question in hand.
  #end = null;
  // An answer has begun.
  #speaking = false;

  constructor(compile) {
    this.#compile = compile;
  }

  /** Asks; `hear` gets what the worker says on the way. Resolves to the answer. */
  async ask(ask, kind, workers, hear) {
    const ended = new Promise((_, reject) => (this.#end = reject));
    this.#speaking = false;
    try {
      return await Promise.race([ended, this.#answer({ ask, kind, workers }, hear)]);
    } catch (error) {
      // Whatever ended it, the next question begins anew; what was fetched is kept.
      this.#worker?.terminate();
      this.#worker = null;
      throw error;
    } finally {
      this.#end = null;
    }
  }

  async #answer(question, hear) {
    const end = this.#end;
    const modules = this.#worker ? undefined : await this.#compile();
    if (end !== this.#end) return;
    const worker = (this.#worker ??= new Worker("/speaker.js", { type: "module" }));
    return new Promise((resolve, reject) => {
      worker.onerror = ({ message }) => reject(new Error(message));
      worker.onmessage = ({ data }) => {
        if (data.answer) return resolve(data.answer);
        if (data.error) return reject(new Error(data.error));
        if ("text" in data) this.#speaking = true;
        hear(data);
      };
      worker.postMessage({ modules, ...question });
    });
  }

  /** Ends an answer after the token in hand; what is being prepared is given up. */
  stop() {
    if (this.#speaking) this.#worker.postMessage({ stop: true });
    else this.#end?.(new Error("stopped"));
  }
}
