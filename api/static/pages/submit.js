// A new job from a configuration in YAML or JSON (which is YAML too), or one that goes on from a job that has ended:
// what the service says of it, and its start.

import { freshKey, get, jobPath, post } from "../api.js";
import { CORE_SCHEMA, dump, load } from "../vendor/js-yaml/js-yaml.mjs";
import { h, replace, setText } from "../dom.js";
import { labelsText, parseLabels } from "../labels.js";

const PLANNING = 180_000; // milliseconds: a process of its own looks at the model and at the data

const EXAMPLE = `# Seconds on any machine: the engines are fakes. See configs/ for real ones.
name: tiny
model: tiny
data:
  train: "reasoning_gym:chain_sum"
  size: 500
  eval_size: 16            # problems that are never trained
reward: digit_share
algorithm: grpo
num_generations: 4         # completions of one problem
train_batch_size: 16       # completions a step
max_new_tokens: 8
learning_rate: 1.0e-3
steps: 6
max_staleness: 1           # policy versions; 0 is synchronous
rollout: {engine: fake, max_concurrency: 16}
learner: {engine: fake}
`;

export class Submit {
  #text; #name; #priority; #labels; #answer; #buttons; #help; #title; #key = null; #before = null;

  constructor(app, search) {
    app.title("Submit a job");
    this.#text = h("textarea", { id: "config", rows: "22", spellcheck: "false", autocapitalize: "off", "aria-describedby": "config-help submit-answer", on: { input: () => this.#edited() } });
    this.#text.value = EXAMPLE;
    this.#name = h("input", { id: "name", type: "text", maxlength: "100", on: { input: () => this.#edited() } });
    this.#priority = h("input", { id: "priority", type: "number", min: "0", max: "100", value: "50", on: { input: () => this.#edited() } });
    this.#labels = h("input", { id: "labels", type: "text", placeholder: "team=maths, try=3", on: { input: () => this.#edited() } });
    this.#answer = h("div", { id: "submit-answer", class: "answer", role: "status" });
    const validate = h("button", { type: "button", on: { click: () => this.#validate() } }, "Validate");
    const submit = h("button", { type: "submit", class: "primary" }, "Submit");
    this.#buttons = [validate, submit];
    this.#title = h("h1", {}, "Submit a job");
    this.#help = h("p", { class: "help", id: "config-help" }, "YAML or JSON, as for ", h("code", {}, "asyncflow run"), ". The service chooses the run directory.");
    this.element = h("div", { class: "page" }, h("div", { class: "page-head" }, this.#title),
      app.may("submit") ? null : h("p", { class: "notice" }, "This token may only read."),
      h("form", { class: "submit-form grid", on: { submit: (event) => this.#submit(event) } },
        h("div", { class: "c8" }, h("label", { for: "config" }, "Configuration"), this.#help, this.#text),
        h("div", { class: "c4 side" },
          h("label", { for: "name" }, "Name"), this.#name,
          h("label", { for: "priority" }, "Priority, 0 to 100"), this.#priority,
          h("label", { for: "labels" }, "Labels"), this.#labels,
          h("p", { class: "row" }, validate, submit), this.#answer)));
    const [from, before] = [search.get("from"), search.get("resume")];
    if (before) {
      this.#before = before;
      validate.hidden = true; // the plan of such a job needs its run, and is made when it is taken in
      this.#goOn(before);
    } else if (from) this.#fill(from);
  }

  close() {}

  async #fill(id) {
    try {
      const job = await get(jobPath(id));
      const config = { ...job.config };
      delete config.run_dir; // the service chooses another one
      this.#text.value = dump(config, { schema: CORE_SCHEMA, lineWidth: 100, noRefs: true });
      this.#described(job);
    } catch (error) {
      this.#say("error", error.message);
    }
  }

  /** A job that goes on with the run of this one: only what changes is written. */
  async #goOn(id) {
    this.#text.value = "";
    try {
      const job = await get(jobPath(id));
      const made = job.config?.steps ?? 0;
      setText(this.#title, `Go on from ${job.name || job.id}`);
      replace(this.#help, "A new job goes on from the last checkpoint of ",
        h("a", { href: `#/jobs/${encodeURIComponent(id)}` }, job.name || job.id), `, which was to make ${made} steps. Write only what changes.`);
      this.#text.value = `steps: ${job.state === "succeeded" ? 2 * made : made}\n`;
      this.#described(job);
    } catch (error) {
      this.#say("error", error.message);
    }
  }

  #described(job) {
    this.#name.value = job.name ?? "";
    this.#priority.value = String(job.priority);
    this.#labels.value = labelsText(job.labels);
  }

  #edited() {
    this.#key = null;
    replace(this.#answer);
  }

  /** The request, or null after saying what is wrong with the text. */
  #body() {
    let config;
    try {
      config = load(this.#text.value, { schema: CORE_SCHEMA });
    } catch (error) {
      const line = error.mark?.line;
      this.#say("error", `This is neither YAML nor JSON: ${error.reason ?? error.message}${line === undefined ? "" : `, in line ${line + 1}`}.`);
      if (line !== undefined) this.#selectLine(line);
      return null;
    }
    if (this.#before !== null) config ??= {}; // nothing changes
    if (config === null || typeof config !== "object" || Array.isArray(config)) {
      this.#say("error", "A configuration is a mapping of settings, such as `model: tiny`.");
      return null;
    }
    let labels;
    try {
      labels = parseLabels(this.#labels.value);
    } catch (error) {
      this.#say("error", error.message);
      return null;
    }
    const body = { config, priority: this.#priority.valueAsNumber };
    if (!Number.isInteger(body.priority)) delete body.priority;
    if (this.#name.value.trim()) body.name = this.#name.value.trim();
    if (Object.keys(labels).length) body.labels = labels;
    if (this.#before !== null) body.resume_from = this.#before;
    return body;
  }

  async #validate() {
    const body = this.#body();
    if (!body) return;
    await this.#busy(async () => {
      const answer = await post("/v1/jobs:validate", { config: body.config }, {}, PLANNING);
      if (answer.ok) this.#say("good", "It can run.", this.#plan(answer.plan));
      else this.#say("error", "It cannot run as it is.", this.#errors(answer.errors));
    });
  }

  async #submit(event) {
    event.preventDefault();
    const body = this.#body();
    if (!body) return;
    // Pressed twice, or sent again after an answer was lost: the same key makes it one job.
    this.#key ??= freshKey();
    await this.#busy(async () => {
      const job = await post("/v1/jobs", body, { "Idempotency-Key": this.#key });
      location.hash = `#/jobs/${encodeURIComponent(job.id)}`;
    });
  }

  async #busy(work) {
    for (const button of this.#buttons) button.disabled = true;
    this.#say("", "Asking the service…");
    try {
      await work();
    } catch (error) {
      const errors = error.errors.length ? error.errors : error.field ? [{ field: error.field, message: error.message }] : [];
      this.#say("error", errors.length ? "The service refuses it." : error.message, this.#errors(errors));
    }
    for (const button of this.#buttons) button.disabled = false;
  }

  #say(tone, text, ...more) {
    replace(this.#answer, h("p", { class: `verdict ${tone}` }, text), ...more);
  }

  #errors(errors) {
    if (!errors?.length) return null;
    return h("ul", { class: "errors" }, errors.map(({ field, message }) => h("li", {},
      field ? h("button", { type: "button", class: "link", on: { click: () => this.#find(field) } }, field) : null, " ", message)));
  }

  /** What the service says it would do. */
  #plan(plan) {
    if (!plan) return null;
    const rows = flat(plan);
    return h("dl", { class: "facts-list" }, rows.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
  }

  #find(field) {
    const key = String(field).split(".").at(-1).replace(/\[\d+\]$/, "");
    const lines = this.#text.value.split("\n");
    const line = lines.findIndex((text) => new RegExp(`(^|[\\s{,"'])${key.replace(/[^\w]/g, "\\$&")}["']?\\s*:`).test(text));
    this.#selectLine(Math.max(0, line));
  }

  #selectLine(line) {
    const lines = this.#text.value.split("\n");
    const start = lines.slice(0, line).reduce((sum, text) => sum + text.length + 1, 0);
    this.#text.focus();
    this.#text.setSelectionRange(start, start + (lines[line]?.length ?? 0));
  }
}

function flat(value, name = "") {
  if (Array.isArray(value) && value.every((item) => typeof item !== "object")) return [[name, value.join(", ") || "none"]];
  if (value !== null && typeof value === "object") {
    return Object.entries(value).flatMap(([key, inner]) => flat(inner, name ? `${name}.${key}` : key));
  }
  return [[name, String(value ?? "–")]];
}
