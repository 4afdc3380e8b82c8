// The tokens with which people and scripts call the service: make one, which is shown once, and take one back.

import { get, post, query, remove } from "../api.js";
import { h, replace, setText } from "../dom.js";
import { clock, epoch, plural } from "../format.js";
import { Question } from "../question.js";

const PAGE = 100;
const DAY = 86_400; // seconds
const SCOPES = [["read", "read: look at everything"], ["submit", "submit: also start and steer jobs"], ["admin", "admin: also make tokens"]];

export class Tokens {
  #app; #list; #says; #made; #error; #name; #scope; #days; #question; #button; #closed = false;

  constructor(app) {
    this.#app = app;
    app.title("Tokens");
    this.#says = h("p", { class: "sub" }, "Loading…");
    this.#error = h("p", { class: "error", role: "alert" });
    this.#made = h("div", { class: "made", role: "status" });
    this.#list = h("div");
    this.#name = h("input", { id: "token-name", type: "text", maxlength: "100", required: true, autocomplete: "off" });
    this.#scope = h("select", { id: "token-scope" }, SCOPES.map(([value, text]) => h("option", { value }, text)));
    this.#days = h("input", { id: "token-days", type: "number", min: "1", max: "3650", step: "1", placeholder: "never" });
    this.#button = h("button", { type: "submit", class: "primary" }, "Make the token");
    this.#question = new Question({
      title: "Revoke this token?", no: "Keep it", yes: "Revoke the token",
      text: "Whoever uses it is refused from then on, and browsers that logged in with it are logged out.",
    });
    this.element = h("div", { class: "page" },
      h("div", { class: "page-head" }, h("div", {}, h("h1", {}, "Tokens"), this.#says)), this.#error,
      app.may("admin")
        ? h("div", { class: "grid" },
          h("div", { class: "c8" }, h("section", { class: "panel" }, h("h2", {}, "All tokens"), this.#list)),
          h("div", { class: "c4" }, h("section", { class: "panel" }, h("h2", {}, "A new token"),
            h("form", { class: "stacked", on: { submit: (event) => this.#make(event) } },
              h("label", { for: "token-name" }, "Name"), this.#name,
              h("label", { for: "token-scope" }, "Scope"), this.#scope,
              h("label", { for: "token-days" }, "Expires after days"), this.#days,
              h("p", { class: "row" }, this.#button)), this.#made)))
        : h("p", { class: "notice" }, "Tokens are made and revoked with a token of scope admin."),
      this.#question.element);
    if (app.may("admin")) this.#load();
    else setText(this.#says, "");
  }

  close() {
    this.#closed = true;
  }

  async #load() {
    try {
      const tokens = [];
      for (let cursor = null; ;) {
        const page = await get(`/v1/tokens${query({ limit: PAGE, cursor })}`);
        tokens.push(...page.data);
        cursor = page.next_cursor;
        if (!page.has_more || !cursor) break;
      }
      if (!this.#closed) this.#show(tokens);
    } catch (error) {
      if (!this.#closed) setText(this.#error, error.message);
    }
  }

  #show(tokens) {
    const over = tokens.filter(expired).length;
    setText(this.#says, `${plural(tokens.length, "token")}${over ? `, ${over} expired` : ""}.`);
    const heads = ["name", "scope", "made", "expires", ""].map((name) => h("th", { scope: "col" }, name || h("span", { class: "unseen" }, "revoke")));
    replace(this.#list, h("div", { class: "scroll tall", role: "region", tabindex: "0", "aria-label": "All tokens" },
      h("table", {}, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, tokens.map((token) => this.#row(token))))));
  }

  #row(token) {
    const ends = token.expires_at ? `${expired(token) ? "expired " : ""}${clock(token.expires_at, { seconds: false })}` : "never";
    const revoke = h("button", { type: "button", class: "quiet small", "aria-label": `Revoke ${token.name}`, on: { click: () => this.#ask(token) } }, "Revoke");
    return h("tr", {}, h("th", { scope: "row", class: "wrap" }, token.name), h("td", {}, token.scope),
      h("td", {}, clock(token.created_at, { seconds: false })), h("td", {}, ends), h("td", {}, revoke));
  }

  #ask(token) {
    this.#question.ask({ title: `Revoke the token ${token.name}?`, done: () => this.#revoke(token) });
  }

  async #revoke(token) {
    setText(this.#error, "");
    try {
      await remove(`/v1/tokens/${encodeURIComponent(token.id)}`);
      replace(this.#made);
      await this.#load();
      this.#app.announce(`The token ${token.name} is revoked.`);
    } catch (error) {
      setText(this.#error, error.message);
    }
  }

  async #make(event) {
    event.preventDefault();
    setText(this.#error, "");
    const days = this.#days.valueAsNumber;
    const body = { name: this.#name.value.trim(), scope: this.#scope.value };
    if (Number.isInteger(days)) body.expires_in = days * DAY;
    this.#button.disabled = true;
    try {
      this.#shown(await post("/v1/tokens", body));
      this.#name.value = this.#days.value = "";
      await this.#load();
    } catch (error) {
      setText(this.#error, error.message);
    }
    this.#button.disabled = false;
  }

  /** The one time that it can be seen. */
  #shown({ name, token }) {
    const copied = h("span", { role: "status" });
    const copy = navigator.clipboard
      ? h("button", { type: "button", on: { click: () => navigator.clipboard.writeText(token).then(() => setText(copied, "Copied."), () => setText(copied, "Select it and copy it by hand.")) } }, "Copy")
      : null;
    replace(this.#made, h("p", {}, `The token ${name} is made. It is shown this once: keep it now.`),
      h("code", { class: "token-text", tabindex: "0" }, token), h("p", { class: "row" }, copy, copied));
  }
}

const expired = (token) => token.expires_at !== null && epoch(token.expires_at) <= Date.now() / 1000;
