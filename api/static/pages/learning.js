// What the learner measures of each step. A chart is there when the run writes its numbers.

import { h, replace } from "../dom.js";
import { LineChart } from "../charts/line.js";

const CHARTS = [
  { title: "Reward", lines: [{ name: "reward", label: "reward", tone: "accent", kind: "mean" }] },
  { title: "Held-out accuracy", lines: [{ name: "eval/accuracy", label: "accuracy", tone: "accent", kind: "dots" }], from: [0, 1] },
  { title: "Entropy", lines: [{ name: "entropy", label: "entropy", tone: "accent" }], means: "In nats a token" },
  { title: "KL to the reference", lines: [{ name: "kl", label: "kl", tone: "accent" }], from: [0] },
  {
    title: "Engine mismatch, KL",
    lines: [{ name: "mismatch_kl", label: "mismatch_kl", tone: "accent" }],
    from: [0],
    means: "0: engine and learner are the same policy",
  },
  {
    title: "Staleness of a step",
    lines: [
      { name: "sample/staleness_mean", label: "mean", tone: "accent" },
      { name: "sample/staleness_max", label: "max", tone: "faint" },
    ],
    from: [0],
    means: "In policy versions",
  },
  {
    title: "Behaviour ratio π_prox/μ",
    lines: [
      { name: "ratio/behaviour_mean", label: "mean", tone: "accent" },
      { name: "ratio/behaviour_max", label: "max", tone: "faint" },
    ],
    from: [1],
  },
  {
    title: "Reuse ratio π_θ/π_prox",
    lines: [
      { name: "ratio/proximal_mean", label: "mean", tone: "accent" },
      { name: "ratio/proximal_max", label: "max", tone: "faint" },
    ],
    from: [1],
  },
  {
    title: "Effective sample size",
    lines: [{ name: "ess", label: "ess", tone: "accent" }],
    from: [0, 1],
    means: "1: every token counts fully",
  },
  {
    title: "Clipped",
    lines: [
      { name: "clip_ratio/region_mean", label: "share of tokens", tone: "accent" },
      { name: "ratio/truncated", label: "truncated ratios", tone: "ink" },
    ],
    from: [0],
  },
  { title: "Groups of equal reward", lines: [{ name: "frac_reward_zero_std", label: "share", tone: "accent", kind: "mean" }], from: [0, 1] },
  {
    title: "Length of a completion",
    lines: [{ name: "completions/mean_length", label: "tokens", tone: "accent", kind: "mean" }],
    from: [0],
  },
  { title: "Cut off by max_new_tokens", lines: [{ name: "completions/truncated_frac", label: "share", tone: "accent", kind: "mean" }], from: [0, 1] },
  { title: "Gradient norm", lines: [{ name: "grad_norm", label: "norm", tone: "accent", kind: "mean" }], from: [0] },
  {
    title: "Generated tokens a second",
    lines: [{ name: "rollout/generated_tok_s", label: "tokens/s", tone: "accent", kind: "mean" }],
    from: [0],
  },
  {
    title: "Seconds of a step",
    lines: [
      { name: "step_time", label: "step", tone: "ink" },
      { name: "perf/rollout_wait_s", label: "waiting for samples", tone: "warn" },
      { name: "perf/fwd_bwd_s", label: "forward and backward", tone: "accent" },
      { name: "perf/weight_sync_s", label: "publishing weights", tone: "accent-2" },
    ],
    from: [0],
  },
];

/** The measurements that have a chart of their own. */
export const CHARTED = new Set(CHARTS.flatMap((chart) => chart.lines.map((line) => line.name)));

export class Learning {
  #want; #charts = CHARTS.map((chart) => new LineChart(chart)); #other = null; #select; #place; #names = ""; #series = {}; #empty;

  /** `want(name)`: one more measurement is looked at. */
  constructor(want) {
    this.#want = want;
    this.#select = h("select", { id: "other-metric", on: { change: () => this.#choose() } });
    this.#place = h("div", { class: "other" });
    this.#empty = h("p", { class: "empty" }, "No step has been measured yet.");
    this.element = h("section", { "aria-label": "Learning" }, this.#empty,
      h("div", { class: "charts" }, this.#charts.map((chart) => chart.element)),
      h("p", { class: "chooser" }, h("label", { for: "other-metric" }, "Another measurement "), this.#select), this.#place);
  }

  show(series, names) {
    this.#series = series;
    const shown = this.#charts.map((chart) => chart.show(series));
    this.#empty.hidden = shown.some(Boolean);
    this.#other?.show(series);
    const others = names.filter((name) => !CHARTED.has(name)).sort();
    this.#select.parentElement.hidden = !others.length;
    if (others.join() === this.#names) return;
    this.#names = others.join();
    const chosen = this.#select.value;
    replace(this.#select, h("option", { value: "" }, "choose one"), others.map((name) => h("option", { value: name }, name)));
    this.#select.value = others.includes(chosen) ? chosen : "";
  }

  close() {
    for (const chart of this.#charts) chart.close();
    this.#other?.close();
  }

  #choose() {
    this.#other?.close();
    this.#other = null;
    replace(this.#place);
    const name = this.#select.value;
    if (!name) return;
    this.#other = new LineChart({ title: name, lines: [{ name, label: name, tone: "accent", kind: "mean" }] });
    replace(this.#place, this.#other.element);
    this.#other.show(this.#series);
    this.#want(name);
  }
}
