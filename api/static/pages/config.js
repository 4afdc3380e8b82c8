// The resolved configuration, the checkpoints, and the way to a job like this one.

import { get, jobPath } from "../api.js";
import { dump, CORE_SCHEMA } from "../vendor/js-yaml/js-yaml.mjs";
import { table } from "../charts/figure.js";
import { h, replace, setText } from "../dom.js";
import { bytes, clock, isNumber } from "../format.js";
import { isEnded } from "../words.js";

export class ConfigTab {
  #app; #id; #feed; #text; #facts; #checkpoints; #asked = ""; #links;

  constructor(app, id, feed) {
    this.#app = app;
    this.#id = id;
    this.#feed = feed;
    this.#text = h("pre", { class: "code", tabindex: "0", role: "region", "aria-label": "Configuration" });
    this.#facts = h("div");
    this.#checkpoints = h("div");
    this.#links = h("p", { class: "row" });
    this.element = h("div", { class: "grid" },
      h("div", { class: "c6" }, h("section", { class: "panel" }, h("h2", {}, "Configuration"), this.#links, this.#text)),
      h("div", { class: "c6" }, h("section", { class: "panel" }, h("h2", {}, "Job"), this.#facts),
        h("section", { class: "panel" }, h("h2", {}, "Checkpoints"), this.#checkpoints)));
  }

  close() {}

  show(what) {
    if (what !== "job" && what !== "all") return;
    const { job } = this.#feed;
    setText(this.#text, dump(job.config ?? {}, { schema: CORE_SCHEMA, lineWidth: 100, noRefs: true }));
    const facts = [
      ["id", job.id], ["state", job.state], ["priority", String(job.priority)], ["submitted", clock(job.created_at)],
      ["started", clock(job.started_at)], ["ended", clock(job.finished_at)], ["starts", String(job.starts)], ["run directory", job.run_dir ?? "–"],
      ...Object.entries(job.summary ?? {}).filter(([, value]) => ["string", "number", "boolean"].includes(typeof value)).map(([name, value]) => [name, isNumber(value) ? String(Number(value.toPrecision(6))) : String(value)]),
    ];
    replace(this.#facts, h("dl", { class: "facts-list" }, facts.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])));
    replace(this.#links,
      this.#app.may("submit") ? h("a", { href: `#/submit?from=${encodeURIComponent(job.id)}` }, "Submit another one like this") : null,
      job.started_at && isEnded(job) ? h("a", { href: jobPath(job.id, "/report"), target: "_blank", rel: "noopener" }, "Report") : null);
    this.#askCheckpoints(`${job.state}|${isEnded(job)}`);
  }

  async #askCheckpoints(key) {
    if (key === this.#asked) return;
    this.#asked = key;
    try {
      const { data } = await get(jobPath(this.#id, "/checkpoints"));
      const names = [...new Set(data.flatMap((checkpoint) => Object.keys(checkpoint)))].filter((name) => name !== "object");
      const cell = (name, value) => (name === "bytes" ? bytes(value) : name.endsWith("_at") ? clock(value) : value === null || value === undefined ? "–" : typeof value === "object" ? JSON.stringify(value) : String(value));
      replace(this.#checkpoints, data.length
        ? h("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "Checkpoints" }, table(names, data.map((checkpoint) => names.map((name) => cell(name, checkpoint[name]))), "Checkpoints"))
        : h("p", { class: "empty" }, "There is none."));
    } catch (error) {
      replace(this.#checkpoints, h("p", { class: "empty" }, error.message));
    }
  }
}
