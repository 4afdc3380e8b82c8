// Staleness over time: a column for each step, a row for each staleness, darker where more of the step's samples are.

import { many, number, percent, plural, versionNumber } from "../format.js";
import { between, colours, onTheme } from "../theme.js";
import { h, setText } from "../dom.js";
import { Canvas, Figure } from "./figure.js";

const LEFT = 30; // CSS pixels for the numbers of the rows
const BELOW = 18; // … and of the steps
const WIDEST = 26; // CSS pixels of a column at most: a few steps do not fill the whole width

export class Heatmap {
  #figure; #canvas; #steps = []; #histograms = []; #bounds = []; #bound = 0; #made = 0; #readout; #bins = [];

  constructor() {
    this.#figure = new Figure({ title: "Staleness of what each step trained", className: "heatmap" });
    this.#canvas = new Canvas({
      label: "Heat map of staleness over steps", describedBy: this.#figure.summaryId, className: "heat",
      draw: (context, width, height) => this.#draw(context, width, height), onTheme,
    });
    this.#readout = h("p", { class: "readout", "aria-hidden": "true" });
    this.#figure.body.append(this.#canvas.element, this.#readout);
    this.#canvas.element.addEventListener("pointermove", (event) => this.#point(event.offsetX));
    this.#canvas.element.addEventListener("pointerleave", () => setText(this.#readout, ""));
    this.element = this.#figure.element;
  }

  /** `queue`: its `history` has the last steps. `bounds`: step → what the bound was then, for the steps of which that is
   *  known; `first`: what it was at first. What is not known is taken as the highest: nothing may look like a breach that
   *  was none. */
  show({ history, learner, max_staleness: bound }, bounds, first) {
    this.#steps = history?.step ?? [];
    this.#histograms = history?.histogram ?? [];
    const highest = [...bounds.values()].reduce((most, value) => Math.max(most, value), Math.max(bound, first ?? 0));
    this.#made = versionNumber(learner) ?? 0;
    this.#bounds = this.#steps.map((step) => bounds.get(step) ?? highest);
    this.#bound = bound;
    this.#figure.says(this.#sentence());
    this.#figure.table(() => {
      const rows = this.#rows();
      return {
        head: ["step", "bound", ...rows.map((staleness) => `samples at ${staleness}`)],
        rows: this.#steps.map((step, index) => [
          number(step), number(this.#bounds[index]), ...rows.map((staleness) => number(this.#histograms[index][staleness] ?? 0)),
        ]),
      };
    });
    this.#canvas.redraw();
  }

  close() {
    this.#canvas.close();
  }

  /** From 0 to whatever was trained, and one above the bound, so that its line has both sides. */
  #rows() {
    const seen = this.#histograms.flatMap((histogram) => Object.keys(histogram).map(Number));
    const highest = seen.reduce((a, b) => Math.max(a, b), Math.max(this.#bound, ...this.#bounds, 0) + 1);
    return Array.from({ length: highest + 1 }, (_, staleness) => staleness);
  }

  #sentence() {
    if (!this.#steps.length) return "No step has been trained yet.";
    let [samples, weighted, highest, above] = [0, 0, 0, 0];
    for (const [index, histogram] of this.#histograms.entries()) {
      for (const [text, count] of Object.entries(histogram)) {
        const staleness = Number(text);
        samples += count;
        weighted += staleness * count;
        if (count) highest = Math.max(highest, staleness);
        if (staleness > this.#bounds[index]) above += count;
      }
    }
    const verdict = above
      ? `${plural(above, "sample")} above the bound`
      : `none above the bound${this.#bounds.some((own) => own !== this.#bound) ? " of its time" : ` of ${this.#bound}`}`;
    const steps = this.#made > this.#steps.length ? `The last ${many(this.#steps.length)} of ${many(this.#made)} steps` : plural(this.#steps.length, "step");
    return `${steps}: on average ${number(weighted / (samples || 1))} policy versions, `
      + `at most ${highest}, ${verdict}.`;
  }

  #draw(context, width, height) {
    const tones = colours();
    const rows = this.#rows();
    const [wide, high] = [width - LEFT, height - BELOW];
    const rowHeight = high / rows.length;
    const y = (staleness) => high - (staleness + 1) * rowHeight;
    this.#bins = binned(this.#steps, this.#histograms, this.#bounds, Math.floor(wide / 3));
    const columnWidth = Math.min(WIDEST, wide / Math.max(1, this.#bins.length));
    const x = (index) => LEFT + index * columnWidth;
    context.textBaseline = "middle";
    context.textAlign = "right";
    context.fillStyle = tones.soft;
    const every = Math.max(1, Math.ceil(14 / rowHeight));
    for (const staleness of rows) {
      if (staleness % every === 0) context.fillText(String(staleness), LEFT - 8, y(staleness) + rowHeight / 2);
    }
    context.fillStyle = tones.wash;
    context.fillRect(LEFT, 0, Math.max(columnWidth * this.#bins.length, wide), high);
    const gap = columnWidth > 6 ? 1 : 0;
    for (const [index, bin] of this.#bins.entries()) {
      const total = Object.values(bin.histogram).reduce((a, b) => a + b, 0) || 1;
      for (const [text, count] of Object.entries(bin.histogram)) {
        if (!count) continue;
        const staleness = Number(text);
        const tone = staleness > bin.bound ? tones.bad : tones.accent;
        context.fillStyle = between(tones.wash, tone, 0.15 + 0.85 * Math.sqrt(count / total));
        context.fillRect(x(index), y(staleness), columnWidth - gap, rowHeight - (rowHeight > 6 ? 1 : 0));
      }
    }
    this.#drawBound(context, tones, { x, y, width, rowHeight });
    context.fillStyle = tones.soft;
    context.textBaseline = "alphabetic";
    let free = 0;
    for (const [index, bin] of this.#bins.entries()) {
      const text = index === 0 ? `step ${bin.first}` : String(bin.first);
      const round = index === 0 || bin.first % niceEvery(this.#bins, columnWidth) === 0;
      const at = x(index) + columnWidth / 2;
      const half = context.measureText(text).width / 2;
      if (!round || (index > 0 && at - half < free) || at + half > width) continue;
      context.textAlign = index === 0 ? "left" : "center";
      context.fillText(text, index === 0 ? LEFT : at, height - 4);
      free = (index === 0 ? LEFT + half * 2 : at + half) + 16;
    }
  }

  #drawBound(context, tones, { x, y, width, rowHeight }) {
    context.strokeStyle = context.fillStyle = tones.ink;
    context.lineWidth = 1.5;
    context.setLineDash([4, 3]);
    context.beginPath();
    const level = (bound) => y(bound) - 0.5;
    let last = level(this.#bins[0]?.bound ?? this.#bound);
    context.moveTo(LEFT, last);
    for (const [index, bin] of this.#bins.entries()) {
      if (level(bin.bound) !== last) {
        context.lineTo(x(index), last);
        last = level(bin.bound);
        context.lineTo(x(index), last);
      }
    }
    const end = x(this.#bins.length);
    if (level(this.#bound) !== last && end < width) {
      context.lineTo(end, last);
      last = level(this.#bound);
      context.lineTo(end, last);
    }
    context.lineTo(width, last);
    context.stroke();
    context.setLineDash([]);
    context.textAlign = "right";
    context.textBaseline = rowHeight > 14 ? "bottom" : "alphabetic";
    context.fillText(`bound ${this.#bound}`, width - 2, last - 3);
  }

  #point(offset) {
    const width = this.#canvas.element.clientWidth - LEFT;
    const columnWidth = Math.min(WIDEST, width / Math.max(1, this.#bins.length));
    const bin = this.#bins[Math.floor((offset - LEFT) / columnWidth)];
    if (!bin) {
      setText(this.#readout, "");
      return;
    }
    const total = Object.values(bin.histogram).reduce((a, b) => a + b, 0) || 1;
    const parts = Object.entries(bin.histogram).filter(([, count]) => count).map(([staleness, count]) => `${percent(count / total)} at ${staleness}`);
    setText(this.#readout, `${bin.first === bin.last ? `Step ${bin.first}` : `Steps ${bin.first} to ${bin.last}`}: ${parts.join(", ")}`);
  }
}

/** Neighbouring steps together where there are more of them than columns. */
function binned(steps, histograms, bounds, columns) {
  const size = Math.max(1, Math.ceil(steps.length / Math.max(1, columns)));
  const bins = [];
  for (let at = 0; at < steps.length; at += size) {
    const histogram = {};
    for (const part of histograms.slice(at, at + size)) {
      for (const [staleness, count] of Object.entries(part)) histogram[staleness] = (histogram[staleness] ?? 0) + count;
    }
    const last = Math.min(at + size, steps.length) - 1;
    bins.push({ first: steps[at], last: steps[last], histogram, bound: bounds[last] });
  }
  return bins;
}

function niceEvery(bins, columnWidth) {
  const perColumn = bins.length > 1 ? bins[1].first - bins[0].first : 1;
  const wanted = (perColumn * 70) / columnWidth;
  const nice = [1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2000, 5000, 10000].find((value) => value >= wanted);
  return nice ?? 50000;
}
