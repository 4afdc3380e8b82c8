// What a run does now and did so far, the most urgent first.

import { jobPath, post } from "../api.js";
import { Graph } from "../charts/graph.js";
import { Heatmap } from "../charts/heatmap.js";
import { Histograms } from "../charts/histograms.js";
import { Timeline } from "../charts/timeline.js";
import { Watermarks } from "../charts/watermarks.js";
import { h, replace, setText } from "../dom.js";
import { clock, many } from "../format.js";
import { isEnded, isLive } from "../words.js";
import { Account } from "./account.js";
import { Learning } from "./learning.js";
import { Stages, Workers } from "./stages.js";
import { Weights } from "./weights.js";

const TIMELINE_SECONDS = 60;
const SHOWN_ALARMS = 4;

export class Overview {
  #app; #id; #feed; #bottleneck; #alarms; #account; #running; #waiting; #graph; #heatmap; #histograms; #watermarks;
  #stages; #workers; #timeline; #learning; #weights; #near = false; #observer; #error;

  constructor(app, id, feed) {
    this.#app = app;
    this.#id = id;
    this.#feed = feed;
    this.#bottleneck = h("p", { class: "bottleneck" });
    this.#alarms = h("ul", { class: "alarms", hidden: true });
    this.#account = new Account();
    this.#error = h("p", { class: "error", role: "alert" });
    this.#waiting = h("p", { class: "empty" });
    this.#graph = new Graph();
    this.#heatmap = new Heatmap();
    this.#histograms = new Histograms();
    this.#watermarks = new Watermarks();
    this.#stages = new Stages();
    this.#workers = new Workers((name, wanted) => this.#drain(name, wanted));
    this.#timeline = new Timeline();
    this.#learning = new Learning((name) => this.#feed.want(name));
    this.#weights = new Weights();
    this.#running = h("div", { class: "overview" },
      h("h2", { class: "unseen" }, "Now"), this.#bottleneck, this.#alarms,
      h("section", { class: "grid", "aria-label": "Now" },
        h("div", { class: "c8" }, this.#graph.element), h("div", { class: "c4" }, this.#watermarks.element, this.#account.element)),
      h("h2", {}, "Staleness"),
      h("section", { class: "grid", "aria-label": "Staleness" },
        h("div", { class: "c8" }, this.#heatmap.element), h("div", { class: "c4" }, this.#histograms.element)),
      h("h2", {}, "Who waits"), this.#error,
      h("section", { class: "grid", "aria-label": "Who waits" },
        h("div", { class: "c6" }, this.#workers.element), h("div", { class: "c6" }, this.#stages.element),
        h("div", { class: "c12" }, this.#timeline.element)),
      h("h2", {}, "Learning"), this.#learning.element,
      h("h2", {}, "Weights"), this.#weights.element);
    this.element = h("div", {}, this.#waiting, this.#running);
    this.#observer = new IntersectionObserver((entries) => {
      this.#near = entries.at(-1).isIntersecting;
      if (this.#near && this.#feed.job) this.#askTimeline();
    }, { rootMargin: "300px" });
    this.#observer.observe(this.#timeline.element);
  }

  close() {
    this.#observer.disconnect();
    for (const part of [this.#graph, this.#heatmap, this.#histograms, this.#watermarks, this.#timeline, this.#learning]) part.close();
  }

  show(what) {
    const { job, queue, workers } = this.#feed;
    this.#running.hidden = !queue;
    this.#waiting.hidden = Boolean(queue);
    if (!queue) {
      setText(this.#waiting, this.#feed.reading ? this.#feed.reading : job.started_at || isLive(job) ? "The run is starting." : isEnded(job) ? "This job ended before its run began." : "Waiting for a free slot. What the run does shows up here as soon as it begins.");
      return;
    }
    if (what === "live" || what === "all" || what === "job") this.#live(queue, workers);
    if (["history", "live", "events", "all"].includes(what)) this.#heatmap.show(queue, this.#feed.bounds, job.config?.max_staleness);
    if (what === "metrics" || what === "all") this.#learning.show(this.#feed.series, this.#feed.names);
    if (what === "engines" || what === "events" || what === "all") this.#weights.show(this.#feed.engines, this.#feed.events);
    if (what === "events" || what === "all") this.#showAlarms();
    if (what === "timeline" || what === "all") this.#timeline.show(this.#feed.spans, TIMELINE_SECONDS, workers.map((worker) => worker.name));
    if (this.#near && what !== "timeline" && (isLive(job) || what === "all")) this.#askTimeline();
  }

  #askTimeline() {
    this.#feed.askTimeline(TIMELINE_SECONDS);
  }

  #live(queue, workers) {
    setText(this.#bottleneck, queue.bottleneck?.text ?? (queue.live ? "Nothing holds the run up for long." : "The run has ended."));
    this.#graph.show({ queue, workers });
    this.#watermarks.show(queue);
    this.#histograms.show(queue.staleness, queue.max_staleness);
    this.#stages.show(queue);
    this.#workers.show(workers, this.#app.may("submit") && isLive(this.#feed.job));
    this.#account.show(queue);
  }

  #showAlarms() {
    const alarms = this.#feed.events.filter((event) => event.type === "alarm" || event.level === "error");
    this.#alarms.hidden = !alarms.length;
    const shown = alarms.slice(-SHOWN_ALARMS).reverse();
    const key = alarms.at(-1)?.id ?? "";
    if (this.#alarms.dataset.last === key) return;
    const first = this.#alarms.dataset.last === undefined;
    this.#alarms.dataset.last = key;
    if (!first && shown.length) this.#app.announce(shown[0].message);
    const more = alarms.length - shown.length;
    replace(this.#alarms, shown.map((event) => h("li", { class: event.level }, h("time", { datetime: event.created_at }, clock(event.created_at)), ` ${event.message}`)),
      more > 0 ? h("li", { class: "more" }, h("a", { href: `#/jobs/${encodeURIComponent(this.#id)}/events` }, `${many(more)} earlier`)) : null);
  }

  async #drain(name, wanted) {
    setText(this.#error, "");
    try {
      await post(jobPath(this.#id, `/workers/${encodeURIComponent(name)}/${wanted ? "drain" : "undrain"}`));
    } catch (error) {
      setText(this.#error, error.message);
    }
  }
}
