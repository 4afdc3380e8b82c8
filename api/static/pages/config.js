// The resolved configuration, the checkpoints, the way to a job like this one, and what is said of a job: its name, its
// priority and its labels, which can be changed.

import { get, jobPath, patch } from "../api.js";
import { dump, CORE_SCHEMA } from "../vendor/js-yaml/js-yaml.mjs";
import { table } from "../charts/figure.js";
import { h, replace, setAttribute, setText } from "../dom.js";
import { bytes, clock, isNumber } from "../format.js";
import { labelsText, parseLabels } from "../labels.js";
import { isEnded, WAITING } from "../words.js";

export class ConfigTab {
  #app; #id; #feed; #text; #facts; #checkpoints; #asked = ""; #links; #form; #fields; #said; #revision = null; #save;

  constructor(app, id, feed) {
    this.#app = app;
    this.#id = id;
    this.#feed = feed;
    this.#text = h("pre", { class: "code", tabindex: "0", role: "region", "aria-label": "Configuration" });
    this.#facts = h("div");
    this.#checkpoints = h("div");
    this.#links = h("p", { class: "row" });
    const field = (name, label, attributes) => {
      const input = h("input", { id: `job-${name}`, ...attributes });
      return { input, row: [h("label", { for: `job-${name}` }, label), input] };
    };
    this.#fields = {
      name: field("name", "Name", { type: "text", maxlength: "100", required: true }),
      priority: field("priority", "Priority, 0 to 100", { type: "number", min: "0", max: "100", step: "1", required: true }),
      labels: field("labels", "Labels", { type: "text", placeholder: "team=maths, try=3" }),
    };
    this.#said = h("p", { class: "verdict", role: "status" });
    this.#save = h("button", { type: "submit" }, "Save");
    this.#form = h("form", { class: "stacked", "aria-label": "What is said of this job", on: { submit: (event) => this.#change(event) } },
      Object.values(this.#fields).map(({ row }) => row), h("p", { class: "row" }, this.#save, this.#said));
    this.element = h("div", { class: "grid" },
      h("div", { class: "c6" }, h("section", { class: "panel" }, h("h2", {}, "Configuration"), this.#links, this.#text)),
      h("div", { class: "c6" }, h("section", { class: "panel" }, h("h2", {}, "Job"), this.#facts, app.may("submit") ? this.#form : null),
        h("section", { class: "panel" }, h("h2", {}, "Checkpoints"), this.#checkpoints)));
  }

  close() {}

  show(what) {
    if (what !== "job" && what !== "all") return;
    const { job } = this.#feed;
    setText(this.#text, dump(job.config ?? {}, { schema: CORE_SCHEMA, lineWidth: 100, noRefs: true }));
    const facts = [
      ["id", job.id], ["state", job.state], ["priority", String(job.priority)], ["submitted", clock(job.created_at)],
      ["started", clock(job.started_at)], ["ended", clock(job.finished_at)], ["goes on from", job.resume_from ? h("a", { href: `#/jobs/${encodeURIComponent(job.resume_from)}` }, job.resume_from) : null], ["starts", String(job.starts)], ["run directory", job.run_dir ?? "–"],
      ...Object.entries(job.summary ?? {}).filter(([, value]) => ["string", "number", "boolean"].includes(typeof value)).map(([name, value]) => [name, isNumber(value) ? String(Number(value.toPrecision(6))) : String(value)]),
    ];
    replace(this.#facts, h("dl", { class: "facts-list" }, facts.filter(([, value]) => value !== null).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])));
    replace(this.#links,
      this.#app.may("submit") ? h("a", { href: `#/submit?from=${encodeURIComponent(job.id)}` }, "Submit another one like this") : null,
      job.started_at && isEnded(job) ? h("a", { href: jobPath(job.id, "/report"), target: "_blank", rel: "noopener" }, "Report") : null);
    this.#fill(job);
    this.#askCheckpoints(`${job.state}|${isEnded(job)}`);
  }

  /** What is being typed stays; the rest follows the job. */
  #fill(job) {
    if (job.revision === this.#revision || this.#form.contains(document.activeElement)) return;
    this.#revision = job.revision;
    const now = { name: job.name, priority: String(job.priority), labels: labelsText(job.labels) };
    for (const [name, { input }] of Object.entries(this.#fields)) input.value = now[name];
    this.#fields.priority.row[0].textContent = WAITING.includes(job.state) ? "Priority, 0 to 100" : "Priority, 0 to 100 (decides only which job starts next)";
  }

  async #change(event) {
    event.preventDefault();
    const { job } = this.#feed;
    this.#save.disabled = true;
    try {
      const changes = {};
      const { name, priority, labels } = this.#fields;
      if (name.input.value.trim() !== job.name) changes.name = name.input.value.trim();
      if (priority.input.valueAsNumber !== job.priority) changes.priority = priority.input.valueAsNumber;
      if (labels.input.value.trim() !== labelsText(job.labels)) changes.labels = parseLabels(labels.input.value);
      if (Object.keys(changes).length) {
        this.#feed.take(await patch(jobPath(this.#id), changes));
        this.#say("good", "Saved.");
      } else this.#say("", "Nothing is different.");
    } catch (error) {
      this.#say("error", error.message);
    }
    this.#save.disabled = false;
  }

  #say(tone, text) {
    setAttribute(this.#said, "class", `verdict ${tone}`);
    setText(this.#said, text);
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
