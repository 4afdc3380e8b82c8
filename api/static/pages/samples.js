// The samples of a run: search and filter them, and look at one.

import { get, jobPath, query } from "../api.js";
import { h, replace, setAttribute, setText } from "../dom.js";
import { number, plural, visible } from "../format.js";
import { SAMPLE_STATES } from "../words.js";
import { Sample } from "./sample.js";

const PAGE = 30;
const TYPING = 250; // milliseconds after the last key until the question is asked

export class SamplesTab {
  #id; #form; #list; #says; #more; #detail; #search = new URLSearchParams(); #cursor = null; #asked = 0; #shown = null; #timer = 0; #samples = [];
  #layout; #loaded = null;

  constructor(app, id) {
    this.#id = id;
    const field = (name, label, attributes = {}) => h("label", {}, h("span", {}, label), h("input", { name, type: "number", ...attributes }));
    this.#form = h("form", { class: "sample-filters", role: "search", "aria-label": "Samples", on: { submit: (event) => event.preventDefault(), input: () => this.#later() } },
      h("label", { class: "grow" }, h("span", {}, "Text"), h("input", { name: "q", type: "search", maxlength: "200", placeholder: "In prompt or response" })),
      h("label", {}, h("span", {}, "State"), h("select", { name: "state" }, h("option", { value: "" }, "any"), SAMPLE_STATES.map((state) => h("option", {}, state)))),
      field("step", "Step", { min: 1 }), field("group_id", "Group", { min: 0 }),
      field("min_reward", "Reward from", { step: "any" }), field("max_reward", "to", { step: "any" }));
    this.#list = h("ol", { class: "sample-list" });
    this.#says = h("p", { class: "says", role: "status" });
    this.#more = h("button", { type: "button", class: "quiet", hidden: true, on: { click: () => this.#load(true) } }, "More");
    this.#detail = h("div", { class: "sample-detail" });
    this.#layout = h("div", { class: "samples-layout" },
      h("div", { class: "sample-side" }, this.#says, this.#list, this.#more), this.#detail);
    this.element = h("div", {}, this.#form, this.#layout);
  }

  close() {
    clearTimeout(this.#timer);
  }

  go([sampleId], search) {
    const text = String(search);
    this.#search = search;
    for (const field of this.#form.elements) if (field.name && document.activeElement !== field) field.value = search.get(field.name) ?? "";
    if (text !== this.#loaded) {
      this.#loaded = text;
      this.#load(false);
    }
    this.#open(sampleId ?? null);
  }

  show() {}

  #later() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => {
      if (!this.#form.checkValidity()) return;
      const given = [...new FormData(this.#form)].filter(([, value]) => value !== "");
      location.replace(this.#address(this.#shown, new URLSearchParams(given)));
    }, TYPING);
  }

  #address(sampleId, search) {
    const text = String(search);
    return `#/jobs/${encodeURIComponent(this.#id)}/samples${sampleId === null ? "" : `/${encodeURIComponent(sampleId)}`}${text ? `?${text}` : ""}`;
  }

  async #load(more) {
    this.#asked += 1;
    const asked = this.#asked;
    try {
      const page = await get(jobPath(this.#id, `/samples${query({ ...Object.fromEntries(this.#search), limit: PAGE, cursor: more ? this.#cursor : null })}`));
      if (asked !== this.#asked) return;
      this.#cursor = page.next_cursor;
      this.#samples = more ? [...this.#samples, ...page.data] : page.data;
      this.#more.hidden = !page.has_more;
      setText(this.#says, this.#samples.length ? `${plural(this.#samples.length, "sample")}${page.has_more ? ", and there are more" : ""}.` : "No sample is like that.");
      const place = more ? this.#list.childElementCount : -1;
      replace(this.#list, this.#samples.map((sample) => this.#item(sample)));
      if (place >= 0) this.#list.children[place]?.querySelector("a").focus();
      this.#mark();
    } catch (error) {
      if (asked !== this.#asked) return;
      setText(this.#says, error.message);
      if (error.retryAfter) this.#timer = setTimeout(() => this.#load(more), 1000 * error.retryAfter);
    }
  }

  #item(sample) {
    const facts = [sample.state, sample.step === null || sample.step === undefined ? null : `step ${sample.step}`,
      sample.staleness === null || sample.staleness === undefined ? null : `staleness ${sample.staleness}`,
      sample.versions?.length > 1 ? `${sample.versions.length} versions` : null, sample.reason];
    return h("li", {}, h("a", { href: this.#address(sample.id, this.#search), data: { id: String(sample.id) } },
      h("span", { class: "sample-head" }, h("b", {}, `#${sample.id}`), h("span", {}, facts.filter(Boolean).join(" · ")), h("span", { class: "reward" }, sample.reward === null ? "" : number(sample.reward))),
      h("span", { class: "one-line", dir: "auto" }, visible(sample.prompt)), h("span", { class: "one-line soft", dir: "auto" }, visible(sample.response))));
  }

  #mark() {
    for (const link of this.#list.querySelectorAll("a")) setAttribute(link, "aria-current", link.dataset.id === this.#shown ? "true" : null);
  }

  async #open(sampleId) {
    this.#layout.classList.toggle("open", sampleId !== null);
    if (sampleId === this.#shown && sampleId !== null) return;
    this.#shown = sampleId;
    this.#mark();
    if (sampleId === null) {
      replace(this.#detail, h("p", { class: "empty" }, "Choose a sample to see its text, its tokens, and its life."));
      return;
    }
    replace(this.#detail, h("p", { class: "empty" }, "Loading…"));
    try {
      const sample = await get(jobPath(this.#id, `/samples/${encodeURIComponent(sampleId)}`));
      if (this.#shown !== sampleId) return;
      const back = h("a", { class: "back-link", href: this.#address(null, this.#search) }, "All samples");
      const { element } = new Sample(sample);
      replace(this.#detail, back, element);
      if (this.#list.offsetParent === null) { // on a phone the sample takes the list's place
        element.focus({ preventScroll: true });
        this.#detail.scrollIntoView();
      }
    } catch (error) {
      if (this.#shown === sampleId) replace(this.#detail, h("p", { class: "empty" }, error.message));
    }
  }
}
