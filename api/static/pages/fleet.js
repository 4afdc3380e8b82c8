// All jobs, newest first, with what each of them is doing.

import { get, jobPath, query } from "../api.js";
import { h, Keyed, setAttribute, setText } from "../dom.js";
import { ago, clock, duration, epoch, many, plural } from "../format.js";
import { Stream } from "../live.js";
import { isEnded, isLive, listed, STATES, tone, WAITING } from "../words.js";

const PAGE = 100; // jobs asked for at once
const AGAIN = 4000; // milliseconds after which the progress of jobs that run is asked for once more
const DETAILS = 30; // jobs whose configuration is asked for: lists come without it

const FILTERS = [
  ["all", () => true],
  ["active", isLive],
  ["waiting", (job) => WAITING.includes(job.state)],
  ["ended", isEnded],
];

export class Fleet {
  #app; #jobs = new Map(); #rows; #stream; #timer; #summary; #filter = "all"; #text = ""; #buttons; #empty; #more; #cursor = null;
  #details = new Map(); #shown = []; #loaded = false; #closed = false; #announced = "";

  constructor(app) {
    this.#app = app;
    app.title("Jobs");
    this.#summary = h("p", { class: "sub" }, "Loading…");
    this.#buttons = FILTERS.map(([name]) => h("button", {
      type: "button", class: "quiet", "aria-pressed": String(name === "all"), on: { click: () => this.#choose(name) },
    }, name));
    const search = h("input", {
      type: "search", placeholder: "Name, label, model", "aria-label": "Search the jobs",
      on: { input: () => { this.#text = search.value.toLowerCase(); this.#show(); } },
    });
    const list = h("ul", { class: "fleet" });
    this.#empty = h("p", { class: "empty", hidden: true });
    this.#more = h("button", { type: "button", class: "quiet", hidden: true, on: { click: () => this.#load(this.#cursor) } }, "Older jobs");
    this.element = h("div", { class: "page" },
      h("div", { class: "page-head" }, h("div", {}, h("h1", {}, "Jobs"), this.#summary),
        app.may("submit") ? h("a", { class: "button primary", href: "#/submit" }, "Submit a job") : null),
      h("div", { class: "filters" }, h("div", { role: "group", "aria-label": "Which jobs", class: "segments" }, this.#buttons), search),
      list, this.#empty, this.#more);
    this.#rows = new Keyed(list, (job) => job.id, (job) => row(job));
    this.#load(null);
    this.#stream = new Stream(() => "/v1/events", ["job", "deleted"], (name, data) => this.#event(name, data), () => this.#load(null));
    this.#timer = setInterval(() => document.hidden || ![...this.#jobs.values()].some(isLive) || this.#load(null), AGAIN);
  }

  close() {
    this.#closed = true;
    this.#stream.close();
    clearInterval(this.#timer);
  }

  async #load(cursor) {
    try {
      const page = await get(`/v1/jobs${query({ limit: PAGE, cursor })}`);
      if (this.#closed) return;
      if (cursor === null && !page.has_more) this.#jobs.clear();
      for (const job of page.data) this.#jobs.set(job.id, job);
      if (cursor !== null || !this.#loaded) this.#cursor = page.next_cursor;
      this.#more.hidden = !this.#cursor;
      this.#loaded = true;
      this.#show();
    } catch (error) {
      if (!this.#loaded && !this.#closed) setText(this.#summary, error.message);
    }
  }

  #event(name, data) {
    if (name === "deleted") this.#jobs.delete(data.id);
    else this.#jobs.set(data.id, data);
    this.#show();
  }

  /** Configuration and summary of the jobs that are shown first: once, and again when the job has changed. */
  async #ask(jobs) {
    for (const { id, revision } of jobs.slice(0, DETAILS)) {
      if (this.#closed) return;
      if (this.#details.get(id)?.revision === revision) continue;
      this.#details.set(id, { ...this.#details.get(id), revision });
      try {
        const { config, summary } = await get(jobPath(id));
        this.#details.set(id, { revision, config, summary });
        this.#shown = this.#shown.map((job) => (job.id === id ? { ...job, config, summary } : job));
        this.#rows.show(this.#shown);
      } catch {
        this.#details.delete(id); // asked for again with the next change
        return;
      }
    }
  }

  #choose(name) {
    this.#filter = name;
    for (const button of this.#buttons) setAttribute(button, "aria-pressed", String(button.textContent === name));
    this.#show();
  }

  #show() {
    const jobs = [...this.#jobs.values()].sort((a, b) => group(a) - group(b) || epoch(b.created_at) - epoch(a.created_at));
    const wanted = FILTERS.find(([name]) => name === this.#filter)[1];
    this.#shown = jobs.map((job) => ({ ...job, ...this.#details.get(job.id), revision: job.revision }))
      .filter((job) => wanted(job) && (!this.#text || searched(job).includes(this.#text)));
    this.#rows.show(this.#shown);
    this.#ask(this.#shown);
    const counts = {};
    for (const job of jobs) counts[job.state] = (counts[job.state] ?? 0) + 1;
    const words = jobs.length ? STATES.filter((state) => counts[state]).map((state) => `${many(counts[state])} ${state}`).join(", ") : "No job yet.";
    setText(this.#summary, words);
    this.#empty.hidden = this.#shown.length > 0 || !this.#loaded;
    setText(this.#empty, jobs.length ? "No job is like that." : "Submit one here, or with asyncflow submit on the command line.");
    if (this.#announced && this.#announced !== words) this.#app.announce(`Jobs: ${words}`);
    this.#announced = words;
  }
}

const group = (job) => (isLive(job) ? 0 : WAITING.includes(job.state) ? 1 : 2);

const searched = (job) => [job.name, job.id, job.state, job.config?.model, job.config?.algorithm, ...Object.entries(job.labels ?? {}).flat()].join(" ").toLowerCase();

function row() {
  const parts = {
    link: h("a", {}), dot: h("span", { class: "dot" }), state: h("span", { class: "state" }), facts: h("p", { class: "facts" }),
    bar: h("i"), steps: h("span", { class: "steps" }), eta: h("span", { class: "eta" }), reason: h("p", { class: "reason" }),
    labels: h("span", { class: "labels" }), outcome: h("span", { class: "outcome" }), when: h("span", { class: "when" }),
  };
  const bar = h("span", { class: "progress", "aria-hidden": "true" }, parts.bar);
  const element = h("li", { class: "job" },
    h("p", { class: "job-state" }, parts.dot, parts.state),
    h("div", { class: "job-name" }, h("h2", {}, parts.link), parts.facts),
    h("div", { class: "job-progress" }, bar, h("p", {}, parts.steps, parts.eta)),
    h("p", { class: "job-outcome" }, parts.outcome, parts.when),
    parts.reason);
  return {
    element,
    update(job) {
      const config = job.config ?? {};
      setText(parts.link, job.name || job.id);
      setAttribute(parts.link, "href", `#/jobs/${encodeURIComponent(job.id)}`);
      setAttribute(parts.dot, "class", `dot ${tone(job.state)}`);
      setText(parts.state, job.state);
      const labels = Object.entries(job.labels ?? {}).map(([key, value]) => `${key}: ${value}`);
      setText(parts.facts, [config.model, String(config.algorithm ?? "").toUpperCase(), `max_staleness ${job.max_staleness ?? "–"}`, ...labels].filter(Boolean).join(" · "));
      const progress = job.progress;
      bar.hidden = !progress;
      if (progress) parts.bar.style.width = `${Math.min(100, (100 * progress.step) / (progress.steps || 1))}%`;
      setText(parts.steps, progress ? `step ${many(progress.step)} of ${many(progress.steps)}` : WAITING.includes(job.state) ? `priority ${job.priority}` : "");
      setText(parts.eta, progress && isLive(job) && progress.eta_seconds ? `${duration(progress.eta_seconds)} left` : "");
      setText(parts.outcome, outcome(job));
      setText(parts.when, when(job));
      setAttribute(parts.when, "title", clock(job.created_at));
      setText(parts.reason, job.reason?.message ?? "");
      parts.reason.hidden = !job.reason;
    },
  };
}

function outcome(job) {
  const { accuracy_before: before, accuracy_after: after } = job.summary ?? {};
  if (typeof before === "number" && typeof after === "number") return `accuracy ${before.toFixed(2)} → ${after.toFixed(2)}`;
  return job.summary?.dropped && listed(job.summary.dropped) ? `dropped ${listed(job.summary.dropped)}` : "";
}

function when(job) {
  if (isEnded(job)) {
    const took = epoch(job.finished_at) - epoch(job.started_at);
    return `${job.started_at && took > 0 ? `took ${duration(took)}, ` : ""}ended ${ago(job.finished_at)}`;
  }
  if (job.started_at) return `started ${ago(job.started_at)}${job.starts > 1 ? `, ${plural(job.starts, "start")}` : ""}`;
  return `submitted ${ago(job.created_at)}`;
}
