// What happened to the job, as sentences, and what its process printed.

import { getText, jobPath, query } from "../api.js";
import { h, Keyed, replace, setText } from "../dom.js";
import { clock, plural, visible } from "../format.js";
import { isEnded } from "../words.js";

const LOG_EVERY = 2000; // milliseconds
const LOG_LINES = 400;
const SHOWN = 300; // events
const QUIET = ["step", "weights", "served", "checkpoint"];

export class EventsTab {
  #id; #feed; #rows; #says; #all; #log; #timer = 0; #closed = false; #text = null; #list;

  constructor(app, id, feed) {
    this.#id = id;
    this.#feed = feed;
    this.#says = h("p", { class: "says" });
    this.#all = h("input", { type: "checkbox", id: "all-events", on: { change: () => this.show("events") } });
    this.#list = h("ol", { class: "events" });
    this.#log = h("pre", { class: "log", tabindex: "0", role: "region", "aria-label": "Log" }, "Loading…");
    this.#rows = new Keyed(this.#list, (event) => event.id, (event) => ({
      element: h("li", { class: event.level },
        h("time", { datetime: event.created_at }, clock(event.created_at)), h("span", { class: "type" }, event.type), h("span", {}, visible(event.message))),
      update() {},
    }));
    this.element = h("div", { class: "grid" },
      h("div", { class: "c6" }, h("section", { class: "panel" },
        h("div", { class: "figure-head" }, h("h2", {}, "Events"), h("label", { class: "check" }, this.#all, " every step and update")),
        this.#says, h("div", { class: "scroll tall", role: "region", tabindex: "0", "aria-label": "Events" }, this.#list))),
      h("div", { class: "c6" }, h("section", { class: "panel" },
        h("div", { class: "figure-head" }, h("h2", {}, "Log"),
          h("a", { href: jobPath(id, "/logs?offset=0"), download: `${id}.log` }, "All of it")), this.#log)));
    this.#readLog();
  }

  close() {
    this.#closed = true;
    clearTimeout(this.#timer);
  }

  show(what) {
    if (what !== "events" && what !== "all") return;
    const wanted = this.#feed.events.filter((event) => this.#all.checked || event.level !== "info" || !QUIET.includes(event.type));
    setText(this.#says, wanted.length ? `${plural(wanted.length, "event")}, the newest first${this.#feed.cut ? ", of the run's last 2,000 lines: asyncflow events has all" : ""}.` : "Nothing has happened yet.");
    this.#rows.show(wanted.slice(-SHOWN).reverse());
  }

  async #readLog() {
    try {
      const text = await getText(jobPath(this.#id, `/logs${query({ tail: LOG_LINES })}`));
      if (this.#closed) return;
      if (text !== this.#text) {
        const atEnd = this.#log.scrollHeight - this.#log.scrollTop - this.#log.clientHeight < 40;
        this.#text = text;
        replace(this.#log, text ? visible(text) : "Nothing was printed.");
        if (atEnd) this.#log.scrollTop = this.#log.scrollHeight;
      }
    } catch (error) {
      if (this.#text === null) setText(this.#log, error.message);
    }
    if (this.#closed || (this.#feed.job && isEnded(this.#feed.job))) return;
    this.#timer = setTimeout(() => this.#readLog(), LOG_EVERY);
  }
}
