// Who wants to see anything shows a token first.

import { post } from "../api.js";
import { h, setText } from "../dom.js";

export class Login {
  #input; #error; #button;

  constructor(app, reason, enter) {
    app.title("Log in");
    this.#error = h("p", { class: "error", role: "alert", id: "login-error" }, reason);
    this.#input = h("input", {
      id: "token", name: "token", type: "password", autocomplete: "current-password", required: true,
      spellcheck: "false", "aria-describedby": "login-error login-help",
    });
    this.#button = h("button", { type: "submit", class: "primary" }, "Log in");
    this.element = h("section", { class: "login" },
      h("h1", {}, "AsyncFlow"),
      h("form", { on: { submit: (event) => this.#submit(event, enter) } },
        h("label", { for: "token" }, "Token"), this.#input, this.#error, this.#button),
      h("p", { class: "help", id: "login-help" },
        "The first one is in the file that ", h("code", {}, "asyncflow serve"), " named when it started."));
  }

  focus() {
    this.#input.focus();
  }

  close() {}

  async #submit(event, enter) {
    event.preventDefault();
    this.#button.disabled = true;
    setText(this.#error, "");
    try {
      await post("/v1/login", { token: this.#input.value.trim() });
      await enter();
    } catch (error) {
      setText(this.#error, error.status === 401 ? "This token is not known, or it has expired." : error.message);
      this.#input.setAttribute("aria-invalid", "true");
      this.#input.select();
    }
    this.#button.disabled = false;
  }
}
