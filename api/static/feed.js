// Everything that is known of one job, kept up to date: what the streams say, and what has to be asked for after it.

import { get, jobPath, query } from "./api.js";
import { Stream } from "./live.js";
import { isLive } from "./words.js";

// An event source only hears the types that it is told of: those of the service, and the kinds of lines of a run.
const EVENT_TYPES = [
  "state", "changed", "deleted", "step", "eval", "alarm", "checkpoint", "set", "failure", "weights", "served", "resumed", "gap",
  "end",
];
const MOST_EVENTS = 2000; // asked for and kept; the service has all of them
const POINTS = 1000; // of a measurement, of the steps that there were when the page was opened: more than a chart has pixels
const BEING_READ = "run_being_read";
const LIVE_AGAIN = 1000; // milliseconds
const TOGETHER = 50; // milliseconds in which events are gathered: a stream begins with all that there were
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
  bounds = new Map(); // step → the bound under which it was trained
  cut = false; // there were more events than we asked for
  reading = ""; // how much of a long ledger the service has read
  #id; #names; #changed; #live = null; #past = null; #last = ""; #bound = null; #fresh = new Set(); #gathered = 0; #again = 0; #asked = new Map(); #closed = false; #step = null;

  /** `names`: of the measurements that are shown from the start. `changed(what)` is called with the name of what is new:
   *  job, live, history, metrics, events, engines, timeline. */
  constructor(id, names, changed) {
    this.#id = id;
    this.#names = new Set(names);
    this.#changed = (what) => this.#closed || changed(what);
  }

  /** Also after `close`. Raises Refused when there is no such job. */
  async start() {
    this.#closed = false;
    this.job = await get(jobPath(this.#id));
    if (this.#closed) return;
    this.#changed("job");
    this.#listen();
    this.#all();
  }

  close() {
    this.#closed = true;
    this.#live?.close();
    this.#past?.close();
    this.#live = this.#past = null;
    clearTimeout(this.#gathered);
    clearTimeout(this.#again);
    this.#gathered = 0;
    for (const { timer } of this.#asked.values()) clearTimeout(timer);
    this.#asked.clear();
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

  /** One more measurement is looked at. */
  want(name) {
    this.#names.add(name);
    this.#askMetrics(null);
  }

  refreshJob() {
    this.#soon("job", async () => this.take(await get(jobPath(this.#id))), null);
  }

  #all() {
    this.#askHistory();
    this.#askMetrics(null);
    this.#askEngines();
    this.#changed("live");
  }

  #listen() {
    const again = () => {
      this.refreshJob();
      this.#all();
    };
    // It begins with the newest of what there was, and is over after the last event of a job that has ended.
    const path = () => jobPath(this.#id, `/events${query(this.#last ? { cursor: this.#last } : { tail: MOST_EVENTS })}`);
    this.#past ??= new Stream(path, EVENT_TYPES, (name, event) => this.#event(name, event), again);
    if (!isLive(this.job)) {
      this.#live?.close();
      this.#live = null;
    } else {
      this.#live ??= new Stream(() => jobPath(this.#id, "/live"), ["live", "end"], (name, now) => this.#now(name, now));
    }
  }

  #now(name, { queue, workers, progress }) {
    if (name === "end") {
      this.#live?.close();
      this.#live = null;
      this.refreshJob();
      this.#again = setTimeout(() => this.#closed || this.#listen(), LIVE_AGAIN); // a run that begins may say so too early
      return;
    }
    const first = this.queue === null;
    if (queue) this.queue = { ...queue, history: this.queue?.history };
    if (workers) this.workers = workers;
    if (progress) this.job = { ...this.job, progress };
    if (queue && queue.max_staleness !== this.job.max_staleness) {
      this.job = { ...this.job, max_staleness: queue.max_staleness };
      this.refreshJob();
    }
    this.#changed("live");
    if (progress && progress.step !== this.#step) this.#stepped(progress.step);
    else if (first && queue) this.#all();
  }

  #stepped(step) {
    this.#step = step;
    this.#askHistory();
    this.#askMetrics(this.#lastStep());
    this.#askEngines();
  }

  #event(name, event) {
    if (name === "end") {
      this.#past?.close();
      return;
    }
    // Ids only grow, and a stream that was opened again may tell what is known.
    if (!event.id || (this.#last && compareIds(event.id, this.#last) <= 0)) return;
    if (!this.#last) this.cut = compareIds(event.id, "0.1") > 0 && compareIds(event.id, "1.0") > 0;
    this.#last = event.id;
    this.events.push(event);
    this.#fresh.add(event.type);
    if (event.type === "set") this.#bound = event.data?.max_staleness ?? this.#bound;
    const bound = this.#bound ?? (this.cut ? undefined : this.job.config?.max_staleness);
    if (event.type === "step" && bound !== undefined) this.bounds.set(event.data?.step, bound);
    if (this.events.length > 2 * MOST_EVENTS) this.events = this.events.slice(-MOST_EVENTS);
    this.#gathered ||= setTimeout(() => this.#told(), TOGETHER);
  }

  /** What has come together, all at once. */
  #told() {
    this.#gathered = 0;
    const types = this.#fresh;
    this.#fresh = new Set();
    if (["state", "set", "changed"].some((type) => types.has(type))) this.refreshJob();
    if (types.has("weights") || types.has("served")) this.#askEngines();
    if (types.has("resumed")) this.#askMetrics(null);
    else if (types.has("step") || types.has("eval")) this.#stepped(this.#step);
    this.#changed("events");
  }

  #askHistory() {
    if (!this.#hasRun()) return;
    this.#soon("history", async () => {
      const [queue, workers] = await Promise.all([get(jobPath(this.#id, "/queue")), get(jobPath(this.#id, "/workers"))]);
      this.queue = queue;
      this.workers = workers.data;
      this.#changed("live");
    });
  }

  #askEngines() {
    if (!this.#hasRun()) return;
    this.#soon("engines", async () => {
      const engines = await get(jobPath(this.#id, "/engines"));
      this.engines = engines.data;
    });
  }

  #askMetrics(since) {
    if (!this.#hasRun()) return;
    this.#soon("metrics", async () => {
      const from = since === null ? null : Math.max(0, since - STEPS_AGAIN);
      const asked = { names: [...this.#names].join(), since_step: from, points: from === null ? POINTS : null };
      const answer = await get(jobPath(this.#id, `/metrics${query(asked)}`));
      this.names = answer.names;
      this.series = from === null ? answer.series : merged(this.series, answer.series);
    });
  }

  /** A run that begins has nothing to be asked for until its first picture has come by itself. */
  #hasRun() {
    return isLive(this.job) ? this.queue !== null : this.job.started_at !== null;
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
        if (what === "history") this.reading = "";
        if (say) this.#changed(say);
      } catch (error) {
        this.#failed(error);
        if (error.code === BEING_READ) last.next ??= now;
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
    if (error.code === BEING_READ) {
      this.reading = error.message;
      this.#changed("job");
    }
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
