// A question before something that cannot be taken back.

import { freshId, h, setText } from "./dom.js";

export class Question {
  #title; #done;

  /** `no` and `yes` are what its buttons say; `done` is called after the second one. */
  constructor({ title, text, no, yes, done }) {
    const id = freshId("question");
    this.#title = h("h2", { id }, title);
    this.element = h("dialog", { "aria-labelledby": id }, this.#title, h("p", {}, text),
      h("form", { method: "dialog", class: "row" },
        h("button", { value: "no", class: "quiet" }, no), h("button", { value: "yes", class: "danger" }, yes)));
    this.#done = done;
    this.element.addEventListener("close", () => this.element.returnValue === "yes" && this.#done());
  }

  /** `title`: another one than that it was made with; `done`: another thing to do after it. */
  ask({ title, done } = {}) {
    if (title) setText(this.#title, title);
    if (done) this.#done = done;
    this.element.returnValue = "";
    this.element.showModal();
  }
}
