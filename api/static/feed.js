// Everything that is known of one job, kept up to date: what the streams say, and what has to be asked for after it.

import { get, jobPath, query } from "./api.js";
import { Stream } from "./live.js";
import { isEnded, isLive } from "./words.js";

const EVENT_TYPES = [
  "state", "step", "eval", "alarm", "checkpoint", "set", "failure", "weights", "served", "resumed", "warning", "job",
  "log", "event",
];
const MOST_EVENTS = 2000; // kept; the service has all of them
const PAGES = 20; // of 100 events, asked for at the start
const STEPS_AGAIN = 8; // steps before the last one that are asked for again: an evaluation is measured late
const AT_MOST_EVERY = { job: 300, metrics: 400, history: 400, engines: 1000, timeline: 1500, queue: 1000 }; // milliseconds

export class JobFeed {
  job = null;
  queue = null;
  workers = [];
  engines = [];
  events = [];
  spans = [];
  series = {};
  names = [];
  #id; #changed; #streams = []; #known = new Set(); #asked = new Map(); #closed = false; #step = null; #cursor = null;

  /** `changed(what)` is called with the name of what is new: job, live, history, metrics, events, engines, timeline. */
  constructor(id, changed) {
    this.#id = id;
    this.#changed = (what) => this.#closed || changed(what);
  }

  /** Raises Refused when there is no such job. */
  async start() {
    this.job = await get(jobPath(this.#id));
    if (this.#closed) return;
    this.#changed("job");
    this.#listen();
    this.#all();
  }

  close() {
    this.#closed = true;
    for (const stream of this.#streams) stream.close();
    for (const { timer } of this.#asked.values()) clearTimeout(timer);
  }

  /** A newer version of the job, from an answer to a change. */
  take(job) {
    if (this.job && job.revision < this.job.revision) return;
    const before = this.job;
    this.job = job;
    this.#changed("job");
    if (before && before.state !== job.state) {
      this.#listen();
      if (isLive(job) !== isLive(before)) this.#all();
    }
  }

  /** The spans of the last seconds: only asked for while somebody looks at them. */
  askTimeline(seconds) {
    this.#soon("timeline", async () => {
      this.spans = (await get(jobPath(this.#id, `/timeline${query({ seconds })}`))).spans;
    });
  }

  refreshJob() {
    this.#soon("job", async () => this.take(await get(jobPath(this.#id))), null);
  }

  #all() {
    this.#askHistory();
    this.#askMetrics(null);
    this.#askEngines();
    this.#pastEvents();
    this.#changed("live");
  }

  #listen() {
    const wanted = isEnded(this.job) ? 0 : isLive(this.job) ? 2 : 1;
    while (this.#streams.length > wanted) this.#streams.pop().close();
    const again = () => {
      this.refreshJob();
      this.#all();
    };
    if (this.#streams.length < 1 && wanted > 0) {
      this.#streams.push(new Stream(jobPath(this.#id, "/events"), EVENT_TYPES, (_, event) => this.#event(event), again));
    }
    if (this.#streams.length < 2 && wanted > 1) {
      this.#streams.push(new Stream(jobPath(this.#id, "/live"), ["live"], (_, live) => this.#live(live)));
    }
  }

  #live({ queue, workers, progress }) {
    if (queue) this.queue = { ...queue, history: this.queue?.history };
    if (workers) this.workers = workers.data ?? workers;
    if (progress) this.job = { ...this.job, progress };
    if (queue && queue.max_staleness !== this.job.max_staleness) {
      this.job = { ...this.job, max_staleness: queue.max_staleness };
      this.refreshJob();
    }
    this.#changed("live");
    if (progress && progress.step !== this.#step) this.#stepped(progress.step);
  }

  #stepped(step) {
    this.#step = step;
    this.#askHistory();
    this.#askMetrics(this.#lastStep());
    this.#askEngines();
  }

  #event(event) {
    if (!event.id || this.#known.has(event.id)) return;
    this.#keep([event]);
    if (event.type === "state" || event.type === "set" || event.type === "job") this.refreshJob();
    if (event.type === "step" || event.type === "eval") this.#stepped(event.data?.step ?? this.#step);
    if (event.type === "weights" || event.type === "served") this.#askEngines();
    if (event.type === "resumed") this.#askMetrics(null);
    this.#changed("events");
  }

  #keep(events) {
    for (const event of events) {
      if (this.#known.has(event.id)) continue;
      this.#known.add(event.id);
      this.events.push(event);
    }
    this.events.sort((a, b) => compareIds(a.id, b.id));
    for (const event of this.events.splice(0, Math.max(0, this.events.length - MOST_EVENTS))) this.#known.delete(event.id);
  }

  async #pastEvents() {
    try {
      for (let page = 0; page < PAGES && !this.#closed; page += 1) {
        const answer = await get(jobPath(this.#id, `/events${query({ limit: 100, cursor: this.#cursor })}`));
        this.#keep(answer.data);
        this.#changed("events");
        if (answer.next_cursor) this.#cursor = answer.next_cursor;
        if (!answer.has_more) break;
      }
    } catch (error) {
      this.#failed(error);
    }
  }

  #askHistory() {
    if (!this.#hasRun()) return;
    this.#soon("history", async () => {
      const [queue, workers] = await Promise.all([get(jobPath(this.#id, "/queue")), get(jobPath(this.#id, "/workers"))]);
      this.queue = queue;
      this.workers = workers.data ?? workers;
      this.#changed("live");
    });
  }

  #askEngines() {
    if (!this.#hasRun()) return;
    this.#soon("engines", async () => {
      const engines = await get(jobPath(this.#id, "/engines"));
      this.engines = engines.data ?? engines;
    });
  }

  #askMetrics(since) {
    if (!this.#hasRun()) return;
    this.#soon("metrics", async () => {
      const from = since === null ? null : Math.max(0, since - STEPS_AGAIN);
      let answer = await get(jobPath(this.#id, `/metrics${query({ since_step: from })}`));
      if (answer.names.length && !Object.keys(answer.series).length) {
        answer = await get(jobPath(this.#id, `/metrics${query({ names: answer.names.join(","), since_step: from })}`));
      }
      this.names = answer.names;
      this.series = from === null ? answer.series : merged(this.series, answer.series);
    });
  }

  #hasRun() {
    return this.job.started_at !== null;
  }

  #lastStep() {
    const steps = this.series.reward?.step ?? Object.values(this.series)[0]?.step ?? [];
    return steps.at(-1) ?? null;
  }

  /** Ask now, or when the last time is long enough ago; what asks meanwhile is answered by that. */
  #soon(what, ask, say = what) {
    const last = this.#asked.get(what) ?? { at: -Infinity, timer: 0, busy: false };
    this.#asked.set(what, last);
    last.next = ask;
    if (last.timer || last.busy || this.#closed) return;
    const run = async () => {
      Object.assign(last, { timer: 0, busy: true, at: performance.now() });
      const now = last.next;
      last.next = null;
      try {
        await now();
        if (say) this.#changed(say);
      } catch (error) {
        this.#failed(error);
      }
      last.busy = false;
      if (last.next && !this.#closed) this.#soon(what, last.next, say);
    };
    const wait = last.at + AT_MOST_EVERY[what] - performance.now();
    if (wait <= 0) run();
    else last.timer = setTimeout(run, wait);
  }

  /** Part of the service did not answer: the connection says so already, and a run that has not begun has no queue. */
  #failed(error) {
    if (error.status === 429) return;
    if (error.status === 0 || error.status === 401 || error.status === 404 || error.status === 409) return;
    this.error = error;
    this.#changed("error");
  }
}

function compareIds(a, b) {
  const [left, right] = [a, b].map((id) => String(id).split(".").map(Number));
  return left[0] + (left[1] ?? 0) - (right[0] + (right[1] ?? 0)) || left[0] - right[0];
}

/** Series with newer points in place of the older ones of the same steps. */
function merged(before, after) {
  const series = { ...before };
  for (const [name, points] of Object.entries(after)) {
    const old = before[name];
    if (!old || !points.step.length) {
      series[name] = old ?? points;
      continue;
    }
    const kept = old.step.findIndex((step) => step >= points.step[0]);
    const until = kept < 0 ? old.step.length : kept;
    series[name] = Object.fromEntries(["step", "time", "value"].map((key) => [key, [...(old[key] ?? []).slice(0, until), ...(points[key] ?? [])]]));
  }
  return series;
}
