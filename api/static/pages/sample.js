// One sample: its text with the version of every token and what is masked out of the loss, its rewards, its whole life.
// All of it is foreign text.

import { table } from "../charts/figure.js";
import { h, replace, setAttribute, setText } from "../dom.js";
import { clock, compareVersions, number, plural, visible } from "../format.js";

const COLOURS = 6; // of versions, in the style sheet; more of them begin again

export class Sample {
  #tokens; #spans = []; #at = -1; #readout; #box;

  constructor(sample) {
    this.#tokens = sample.tokens ?? [];
    const versions = [...new Set(this.#tokens.map((token) => token.version))].filter((version) => version !== null).sort(compareVersions);
    const facts = [
      ["state", sample.state], ["group", sample.group_id], ["step", sample.step], ["reward", number(sample.reward)],
      ["staleness", sample.staleness], ["attempts", sample.attempts], ["finish", sample.finish_reason], ["reason", sample.reason],
    ];
    this.element = h("article", { class: "sample", tabindex: "-1", "aria-label": `Sample ${sample.id}` },
      h("h2", {}, `Sample ${sample.id}`),
      h("dl", { class: "facts-row" }, facts.filter(([, value]) => value !== null && value !== undefined).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value))))),
      h("h3", {}, "Prompt"), h("div", { class: "text", dir: "auto", tabindex: "0", role: "region", "aria-label": "Prompt" }, visible(sample.prompt)),
      h("h3", {}, "Response"), this.#legend(versions), this.#response(sample, versions),
      this.#rewards(sample.reward_parts ?? {}, sample.reward),
      h("h3", {}, "Life"), h("ol", { class: "life" }, (sample.events ?? []).map((event) => h("li", {},
        h("time", { datetime: event.at }, clock(event.at)), h("span", { class: "type" }, event.type), h("span", {}, visible(event.message))))),
      this.#table(sample));
  }

  #legend(versions) {
    const masked = this.#tokens.filter((token) => token.masked).length;
    const items = versions.map((version, index) => {
      const count = this.#tokens.filter((token) => token.version === version).length;
      return h("li", {}, h("span", { class: `swatch v${index % COLOURS}` }), `version ${version}: ${plural(count, "token")}`);
    });
    if (masked) items.push(h("li", {}, h("span", { class: "swatch masked" }), `${plural(masked, "token")} masked out of the loss`));
    return h("ul", { class: "legend" }, items);
  }

  #response(sample, versions) {
    if (!this.#tokens.length) return h("div", { class: "text", dir: "auto" }, visible(sample.response) || "There is none yet.");
    let last = null;
    const pieces = [];
    this.#spans = this.#tokens.map((token, index) => {
      if (token.version !== last && token.version !== null && versions.length > 1) pieces.push(h("sup", { class: "version-mark", "aria-hidden": "true" }, token.version));
      last = token.version;
      const span = h("span", { class: `token v${Math.max(0, versions.indexOf(token.version)) % COLOURS} ${token.masked ? "masked" : ""}`, data: { index: String(index) } }, textOf(token));
      pieces.push(span);
      return span;
    });
    this.#readout = h("p", { class: "readout", role: "status" }, "Point at a token, or walk with the arrow keys.");
    this.#box = h("div", {
      class: "text tokens", tabindex: "0", role: "group", dir: "auto", "aria-label": "Response. Arrow keys go from token to token.",
      on: {
        keydown: (event) => this.#key(event),
        pointerover: (event) => event.target.dataset.index && this.#select(Number(event.target.dataset.index)),
      },
    }, pieces);
    return [this.#box, this.#readout];
  }

  #key(event) {
    const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity };
    if (!(event.key in moves)) return;
    event.preventDefault();
    this.#select(Math.max(0, Math.min(this.#spans.length - 1, this.#at + moves[event.key])));
    this.#spans[this.#at].scrollIntoView({ block: "nearest" });
  }

  #select(index) {
    this.#spans[this.#at]?.classList.remove("selected");
    this.#at = index;
    this.#spans[index].classList.add("selected");
    const token = this.#tokens[index];
    const parts = [`token ${index + 1} of ${this.#tokens.length}`, `id ${token.id}`, token.version && `version ${token.version}`, `log-prob ${number(token.logprob)}`,
      token.ref_logprob === null || token.ref_logprob === undefined ? null : `reference ${number(token.ref_logprob)}`, token.masked ? "masked out of the loss" : null];
    setText(this.#readout, parts.filter(Boolean).join(" · "));
  }

  #rewards(parts, total) {
    const names = Object.keys(parts);
    if (!names.length) return null;
    return [h("h3", {}, "Rewards"), table(["function", "reward"], [...names.map((name) => [name, number(parts[name])]), ["together", number(total)]], "Rewards")];
  }

  #table() {
    if (!this.#tokens.length) return null;
    const place = h("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "Tokens", hidden: true });
    const button = h("button", { type: "button", class: "quiet small", "aria-expanded": "false" }, "Table of tokens");
    button.addEventListener("click", () => {
      place.hidden = !place.hidden;
      setAttribute(button, "aria-expanded", String(!place.hidden));
      if (!place.childElementCount) {
        replace(place, table(["place", "id", "text", "log-prob", "reference", "version", "masked"], this.#tokens.map((token, index) => [
          String(index), String(token.id), textOf(token), number(token.logprob), number(token.ref_logprob), token.version ?? "–", token.masked ? "masked" : "",
        ]), "Tokens"));
      }
    });
    return [h("p", {}, button), place];
  }
}

/** A token whose text is not known is shown as its id. */
const textOf = (token) => (token.text === null ? `⟨${token.id}⟩` : visible(token.text));
