// Versions of the learner, of each engine and of the oldest sample on one scale, with what the bound allows shaded.

import { h, replace, s } from "../dom.js";
import { versionNumber } from "../format.js";
import { Figure } from "./figure.js";

const ROW = 24; // CSS pixels
const BELOW = 20;
const LABEL = 104; // CSS pixels for the names
const MOST_ENGINES = 6;

export class Watermarks {
  #figure; #host; #observer; #last = null; #drawn = "";

  constructor() {
    this.#figure = new Figure({ title: "Version watermarks", className: "watermarks" });
    this.#host = h("div", { class: "marks" });
    this.#figure.body.append(this.#host);
    this.#observer = new ResizeObserver(() => this.#last && this.show(this.#last));
    this.#observer.observe(this.#host);
    this.element = this.#figure.element;
  }

  show(queue) {
    this.#last = queue;
    const marks = marksOf(queue);
    const learner = versionNumber(queue.learner);
    const width = this.#host.clientWidth;
    const key = JSON.stringify([marks, queue.max_staleness, width]);
    if (!width || key === this.#drawn) return;
    this.#drawn = key;
    const known = marks.filter((mark) => mark.n !== null);
    const lag = known.filter((mark) => mark.kind === "engine").reduce((most, mark) => Math.max(most, learner - mark.n), 0);
    const oldest = known.find((mark) => mark.kind === "oldest");
    this.#figure.says(
      learner === null
        ? "The learner has no version yet."
        : `The learner is at ${queue.learner}; ${lag ? `the slowest engine is ${lag} behind` : "every engine serves it"}; `
          + `${oldest ? `the oldest open sample is ${learner - oldest.n} behind` : "no open sample has tokens"}. ${queue.max_staleness} is allowed.`,
    );
    this.#figure.table(() => ({ head: ["what", "version"], rows: marks.map((mark) => [mark.label, mark.version ?? "–"]) }));
    replace(this.#host, learner === null ? [] : this.#draw(marks, learner, queue.max_staleness, width));
  }

  close() {
    this.#observer.disconnect();
  }

  #draw(marks, learner, bound, width) {
    const lowest = marks.reduce((low, mark) => (mark.n === null ? low : Math.min(low, mark.n)), learner);
    const from = Math.min(lowest, learner - bound) - 1;
    const to = learner + 1;
    const x = (n) => LABEL + ((n - from) / (to - from)) * (width - LABEL - 12);
    const height = marks.length * ROW + BELOW;
    const svg = s("svg", {
      width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Version watermarks",
      "aria-describedby": this.#figure.summaryId,
    });
    const half = (x(1) - x(0)) / 2;
    svg.append(s("rect", { class: "allowed", x: x(learner - bound) - half, y: 0, width: x(learner) - x(learner - bound) + half * 2, height: marks.length * ROW, rx: 3 }));
    const every = Math.max(1, Math.ceil(((to - from) * 34) / (width - LABEL)));
    for (let n = Math.max(0, from + 1); n <= to - 1; n += 1) {
      svg.append(s("line", { class: "grid", x1: x(n), x2: x(n), y1: 0, y2: marks.length * ROW }));
      if ((learner - n) % every === 0) svg.append(s("text", { class: "tick", x: x(n), y: height - 5, "text-anchor": "middle" }, n));
    }
    for (const [index, mark] of marks.entries()) {
      const y = index * ROW + ROW / 2;
      svg.append(s("text", { class: "mark-name", x: 0, y: y + 4 }, mark.label));
      if (mark.n !== null) svg.append(s("circle", { class: `mark ${mark.kind} ${learner - mark.n > bound ? "above" : ""}`, cx: x(mark.n), cy: y, r: 5 }));
      else svg.append(s("text", { class: "tick", x: x(learner), y: y + 4, "text-anchor": "middle" }, "none"));
    }
    return svg;
  }
}

function marksOf(queue) {
  const engines = Object.entries(queue.served ?? {});
  const mark = (kind, label, version) => ({ kind, label: short(label), version, n: versionNumber(version) });
  const shown = engines.length <= MOST_ENGINES
    ? engines.map(([name, version]) => mark("engine", name, version))
    : grouped(engines).map(([version, count]) => mark("engine", `${count} engines`, version));
  return [mark("learner", "learner", queue.learner), ...shown, mark("oldest", "oldest sample", queue.oldest)];
}

function grouped(engines) {
  const counts = new Map();
  for (const [, version] of engines) counts.set(version, (counts.get(version) ?? 0) + 1);
  return [...counts];
}

const short = (name) => (name.length > 15 ? `${name.slice(0, 14)}…` : name);
