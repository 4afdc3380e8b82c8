// One job: its head with the controls, and the tabs below it.

import { abandon, get, jobPath, patch, post, remove } from "../api.js";
import { h, replace, setAttribute, setText } from "../dom.js";
import { clock, duration, epoch, many } from "../format.js";
import { JobFeed } from "../feed.js";
import { Question } from "../question.js";
import { isEnded, isLive, MAY, tone } from "../words.js";
import { ConfigTab } from "./config.js";
import { EventsTab } from "./events.js";
import { CHARTED } from "./learning.js";
import { Overview } from "./overview.js";
import { SamplesTab } from "./samples.js";

const TABS = [
  ["", "Overview", Overview],
  ["samples", "Samples", SamplesTab],
  ["events", "Events", EventsTab],
  ["config", "Configuration", ConfigTab],
];

export class Job {
  #app; #id; #feed; #parts; #tabs; #tab = null; #tabName = null; #place; #notice; #pending = null; #timer; #said = {}; #checkpointed = false;

  constructor(app, id) {
    this.#app = app;
    this.#id = id;
    this.#place = h("div", { class: "tab" });
    this.#notice = h("p", { class: "notice", role: "alert", hidden: true });
    this.#tabs = TABS.map(([name, title]) => h("a", { href: `#/jobs/${encodeURIComponent(id)}${name ? `/${name}` : ""}` }, title));
    this.#parts = this.#head();
    this.element = h("div", { class: "page job-page" }, this.#parts.element, this.#notice,
      h("nav", { class: "tabs", "aria-label": "Of this job" }, this.#tabs), this.#place);
    this.#feed = new JobFeed(id, CHARTED, (what) => this.#show(what));
    this.#feed.start().catch((error) => {
      this.#say(error.status === 404 ? "There is no such job." : error.message);
      setText(this.#parts.name, id);
      app.title("No such job");
    });
    this.#timer = setInterval(() => this.#feed.job && this.#facts(), 1000);
  }

  go(parts, search) {
    const [name = "", ...rest] = parts;
    const known = TABS.find(([own]) => own === name) ?? TABS[0];
    if (this.#tabName !== known[0]) {
      this.#tab?.close();
      this.#tabName = known[0];
      this.#tab = new known[2](this.#app, this.#id, this.#feed);
      replace(this.#place, this.#tab.element);
    }
    for (const [index, [own]] of TABS.entries()) setAttribute(this.#tabs[index], "aria-current", own === known[0] ? "page" : null);
    this.#tab.go?.(rest, search);
    if (this.#feed.job) this.#tab.show("all");
  }

  close() {
    clearInterval(this.#timer);
    this.#feed.close();
    this.#tab?.close();
  }

  #head() {
    const parts = {
      name: h("h1", {}, "…"), dot: h("span", { class: "dot" }), state: h("span", { class: "state" }), facts: h("p", { class: "facts" }),
      reason: h("p", { class: "reason", hidden: true }), bar: h("i"), steps: h("b"), times: h("span"),
    };
    const button = (text, action, extra = "") => h("button", { type: "button", class: extra, on: { click: action } }, text);
    parts.pause = button("Pause", () => this.#ask("pause"));
    parts.resume = button("Resume", () => this.#ask("resume"), "primary");
    parts.bound = h("input", { id: "bound", type: "number", min: "0", max: "1000", step: "1", inputmode: "numeric", required: true, "aria-describedby": "bound-now" });
    parts.apply = h("button", { type: "submit" }, "Apply");
    parts.boundNow = h("span", { class: "unseen", id: "bound-now" });
    parts.boundForm = h("form", { class: "bound", on: { submit: (event) => this.#changeBound(event) } },
      h("label", { for: "bound" }, "max_staleness"), parts.bound, parts.apply, parts.boundNow);
    parts.bound.addEventListener("input", () => this.#buttons());
    const cancelling = new Question({
      title: "Cancel this job?", no: "Keep it running", yes: "Cancel the job", done: () => this.#ask("cancel"),
      text: "It stops in order and leaves a checkpoint, from which another job can go on. What is being generated is lost.",
    });
    parts.cancel = button("Cancel", () => cancelling.ask(), "danger");
    const deleting = new Question({
      title: "Delete this job?", no: "Keep it", yes: "Delete the job", done: () => this.#delete(),
      text: "Its samples, checkpoints, weights, events and log are removed, and nothing brings them back.",
    });
    parts.delete = button("Delete", () => deleting.ask(), "danger");
    parts.goOn = h("a", { class: "button", href: `#/submit?resume=${encodeURIComponent(this.#id)}` }, "Go on from this job");
    parts.controls = h("div", { class: "controls" }, parts.boundForm,
      h("div", { class: "row" }, parts.pause, parts.resume, parts.cancel, parts.goOn, parts.delete));
    parts.element = h("header", { class: "job-head" },
      h("div", { class: "job-title" }, parts.name, h("p", { class: "job-state" }, parts.dot, parts.state)),
      parts.facts, parts.controls,
      h("div", { class: "job-meter" }, h("span", { class: "progress", "aria-hidden": "true" }, parts.bar), h("p", {}, parts.steps, parts.times)),
      parts.reason, cancelling.element, deleting.element);
    return parts;
  }

  #show(what) {
    const { job, queue } = this.#feed;
    if (what === "error") {
      this.#say(this.#feed.error.message);
      return;
    }
    if (what === "job" || what === "live") {
      this.#facts();
      this.#buttons();
    }
    if (what === "job") {
      if (this.#said.state && this.#said.state !== job.state) this.#app.announce(`The job is ${job.state}.`);
      if (this.#said.state !== job.state) this.#askCheckpoints();
      this.#said.state = job.state;
    }
    const stage = queue?.bottleneck?.stage;
    if (what === "live" && stage !== this.#said.stage) {
      if (this.#said.stage !== undefined && stage) this.#app.announce(queue.bottleneck.text);
      this.#said.stage = stage;
    }
    this.#tab?.show(what);
  }

  #facts() {
    const parts = this.#parts;
    const { job } = this.#feed;
    const config = job.config ?? {};
    setText(parts.name, job.name || job.id);
    setAttribute(parts.dot, "class", `dot ${tone(job.state)}`);
    setText(parts.state, job.state);
    setText(parts.facts, [
      config.model, String(config.algorithm ?? "").toUpperCase(),
      config.train_batch_size ? `${many(config.train_batch_size)} samples a step` : "",
      config.num_generations ? `groups of ${config.num_generations}` : "",
      ...Object.entries(job.labels ?? {}).map(([key, value]) => `${key}: ${value}`),
    ].filter(Boolean).join(" · "));
    const { progress } = job;
    this.#app.title(`${job.name || job.id} ${progress ? `${progress.step}/${progress.steps}` : job.state}`);
    parts.bar.style.width = progress ? `${Math.min(100, (100 * progress.step) / (progress.steps || 1))}%` : "0";
    setText(parts.steps, progress ? `Step ${many(progress.step)} of ${many(progress.steps)}` : isEnded(job) ? "" : `Priority ${job.priority}`);
    setText(parts.times, times(job));
    parts.reason.hidden = !job.reason;
    setText(parts.reason, job.reason?.message ?? "");
  }

  #buttons() {
    const parts = this.#parts;
    const { job } = this.#feed;
    if (!job) return;
    const may = (action) => this.#app.may("submit") && MAY[action].includes(job.state);
    const pausing = MAY.resume.includes(job.state);
    const ended = isEnded(job);
    parts.controls.hidden = !this.#app.may("submit");
    parts.boundForm.hidden = parts.cancel.hidden = ended;
    parts.pause.hidden = ended || pausing;
    parts.resume.hidden = ended || !pausing;
    parts.delete.hidden = !ended;
    parts.goOn.hidden = !ended || !this.#checkpointed;
    for (const name of ["pause", "resume", "cancel"]) parts[name].disabled = !may(name) || this.#pending !== null;
    parts.delete.disabled = this.#pending !== null;
    const known = String(job.max_staleness ?? "");
    // Whoever is about to type keeps what was typed; a change of somebody else is shown beside it.
    if (document.activeElement !== parts.bound && (parts.bound.value === "" || parts.bound.value === this.#said.bound)) parts.bound.value = known;
    this.#said.bound = known;
    setText(parts.boundNow, `The bound is ${known}.`);
    parts.bound.disabled = !may("change");
    parts.apply.disabled = !may("change") || this.#pending !== null || parts.bound.value === known || !parts.bound.validity.valid;
  }

  /** Whether another job can go on from this one. */
  async #askCheckpoints() {
    if (this.#checkpointed || !isEnded(this.#feed.job) || !this.#feed.job.started_at) return;
    try {
      const { data } = await get(jobPath(this.#id, "/checkpoints?limit=1"));
      this.#checkpointed = data.length > 0;
      this.#buttons();
    } catch {
      // the tab of the configuration says why there are none
    }
  }

  async #delete() {
    await this.#change("delete", async () => {
      // Nothing may be asked about the job by the page once it has gone.
      this.#feed.close();
      abandon();
      try {
        await remove(jobPath(this.#id));
      } catch (error) {
        if (this.element.isConnected) this.#feed.start().catch(() => {}); // why it cannot is about to be said
        throw error;
      }
      if (this.element.isConnected) location.hash = "#/";
    });
  }

  async #ask(action) {
    await this.#change(action, () => post(jobPath(this.#id, `/${action}`)));
  }

  async #changeBound(event) {
    event.preventDefault();
    const bound = this.#parts.bound.valueAsNumber;
    if (!Number.isInteger(bound) || bound < 0) return;
    await this.#change("bound", () => patch(jobPath(this.#id), { max_staleness: bound }, { "If-Match": `"${this.#feed.job.revision}"` }));
    this.#parts.bound.value = String(this.#feed.job.max_staleness);
    this.#buttons();
  }

  async #change(what, request) {
    this.#pending = what;
    this.#notice.hidden = true;
    this.#buttons();
    try {
      const job = await request();
      if (job?.object === "job") this.#feed.take(job);
    } catch (error) {
      if (error.status === 412) {
        this.#feed.refreshJob();
        this.#say("Somebody else has changed the job meanwhile. Look at what it is now, and try again.");
      } else this.#say(error.message);
    }
    this.#pending = null;
    this.#buttons();
  }

  #say(text) {
    setText(this.#notice, text);
    this.#notice.hidden = !text;
  }
}

function times(job) {
  if (!job.started_at) return `, submitted ${clock(job.created_at)}`;
  const seconds = (epoch(job.finished_at) ?? Date.now() / 1000) - epoch(job.started_at);
  if (isEnded(job)) return `${job.progress ? ", took " : "Took "}${duration(seconds)}, ended ${clock(job.finished_at)}`;
  const left = isLive(job) && job.progress?.eta_seconds ? `, about ${duration(job.progress.eta_seconds)} left` : "";
  return `${job.progress ? ", " : ""}${duration(Math.floor(seconds))} so far${left}`;
}
