// What things are called in a sentence; the same words as in `asyncflow/report/bottleneck.py`.

export const ENDED = ["succeeded", "failed", "cancelled"];
export const WAITING = ["validating", "queued"];
export const STATES = [
  "validating", "queued", "starting", "running", "pausing", "paused", "resuming", "cancelling", ...ENDED,
];

/** What may be asked of a job in which state. */
export const MAY = {
  pause: ["starting", "running", "resuming"],
  resume: ["paused", "pausing"],
  cancel: STATES.filter((state) => !ENDED.includes(state) && state !== "cancelling"),
  change: STATES.filter((state) => !ENDED.includes(state) && state !== "cancelling"),
};

export const isEnded = (job) => ENDED.includes(job.state);
/** The job has a process, so that it can be watched. */
export const isLive = (job) => !ENDED.includes(job.state) && !WAITING.includes(job.state);

/** Tone of a state: what the eye should do with it. */
export function tone(state) {
  if (state === "running" || state === "starting" || state === "resuming") return "busy";
  if (state === "failed") return "bad";
  if (state === "succeeded") return "good";
  if (state === "pausing" || state === "paused" || state === "cancelling") return "blocked";
  return "idle";
}

const NAMES = {
  actor_update: "the learner",
  learner: "the learner",
  rollout: "rollouts",
  feeder: "prompts",
  weights: "the weight update",
  bound: "the learner: the staleness bound is reached",
  pause: "somebody to let the run go on",
  end: "nothing: all samples of the run are there",
};

/** What is waited for, to stand after `waits for`. */
export function inWords(cause) {
  return NAMES[cause] ?? (/^[a-z_]+$/.test(cause ?? "") ? `the ${cause} stage` : cause);
}

export const SAMPLE_STATES = [
  "prompted", "generating", "generated", "rewarded", "training", "trained", "dropped", "quarantined",
];

/** Counts, largest first, as words: `12 stale, 3 timeout`. */
export function listed(counts) {
  return Object.entries(counts ?? {})
    .filter(([, count]) => count > 0)
    .sort((a, b) => b[1] - a[1])
    .map(([name, count]) => `${count.toLocaleString("en-US")} ${name}`)
    .join(", ");
}
