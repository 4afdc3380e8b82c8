// What every worker did in the last minute, and below it each completion by itself: the long tail.

import { h, setText } from "../dom.js";
import { clock, duration, epoch, percent, plural } from "../format.js";
import { colours, onTheme } from "../theme.js";
import { inWords } from "../words.js";
import { Canvas, Figure } from "./figure.js";

const ROW = 20; // CSS pixels of a worker
const LANE = 4; // CSS pixels of a completion
const MOST_LANES = 64;
const TAIL = 3; // times the median from which a completion belongs to the long tail
const BELOW = 20;
const LEFT = 104;

export class Timeline {
  #figure; #canvas; #readout; #workers = []; #lanes = []; #from = 0; #to = 1; #median = 0;

  constructor() {
    this.#figure = new Figure({ title: "Worker timeline", wide: true, className: "timeline" });
    this.#canvas = new Canvas({
      label: "Worker timeline", describedBy: this.#figure.summaryId, className: "gantt",
      draw: (context, width, height) => this.#draw(context, width, height), onTheme,
    });
    this.#readout = h("p", { class: "readout", "aria-hidden": "true" });
    const legend = h("ul", { class: "legend" },
      [["accent", "busy"], ["warn-fill", "blocked: has work and may not go on"], ["faint", "idle"], ["accent-2", "a completion"], ["ink", `one that takes ${TAIL} times the median or more`]].map(([tone, text]) =>
        h("li", {}, h("span", { class: `key fill tone-${tone}` }), text)));
    this.#figure.body.append(legend, this.#canvas.element, this.#readout);
    this.#canvas.element.addEventListener("pointermove", (event) => this.#point(event));
    this.#canvas.element.addEventListener("pointerleave", () => setText(this.#readout, ""));
    this.element = this.#figure.element;
  }

  /** `spans`: as /timeline gives them. A worker whose name has a slash (`generation/3`) is a lane of completions.
   *  `order`: names of workers, as they should stand. */
  show(spans, seconds, order) {
    const known = spans
      .map((span) => ({ ...span, start: epoch(span.start), end: epoch(span.end) }))
      .filter((span) => span.start !== null && span.end !== null && span.end >= span.start);
    this.#to = known.reduce((last, span) => Math.max(last, span.end), -Infinity);
    if (!known.length) {
      this.#workers = this.#lanes = [];
      this.#figure.says("Nothing was recorded in this time.");
      this.#figure.table(() => ({ head: [], rows: [] }));
      return;
    }
    this.#from = Math.max(this.#to - seconds, known.reduce((first, span) => Math.min(first, span.start), Infinity));
    this.#workers = rowsOf(known.filter((span) => !span.worker.includes("/"))).sort((a, b) => order.indexOf(a.name) - order.indexOf(b.name));
    this.#lanes = rowsOf(known.filter((span) => span.worker.includes("/") && span.end > this.#from))
      .sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true })).slice(0, MOST_LANES);
    const lasted = this.#lasted();
    this.#median = lasted[Math.floor(lasted.length / 2)] ?? 0;
    const lanes = this.#lanes.length ? this.#lanes.length * LANE + 14 : 0;
    this.#canvas.element.style.height = `${this.#workers.length * ROW + lanes + BELOW}px`;
    this.#figure.says(this.#sentence());
    this.#figure.table(() => ({
      head: ["worker", "from", "for", "doing", "why"],
      rows: known.slice().sort((a, b) => a.start - b.start).map((span) => [
        span.worker, clock(span.start), duration(span.end - span.start), span.activity, span.cause ? inWords(span.cause) : "",
      ]),
    }));
    this.#canvas.redraw();
  }

  close() {
    this.#canvas.close();
  }

  /** Seconds of all completions, the shortest first. */
  #lasted() {
    return this.#lanes.flatMap((lane) => lane.spans.map((span) => span.end - span.start)).sort((a, b) => a - b);
  }

  #sentence() {
    const window = this.#to - this.#from || 1;
    const shares = this.#workers.map(({ name, spans }) => {
      const busy = spans.filter((span) => span.activity === "busy").reduce((sum, span) => sum + span.end - Math.max(span.start, this.#from), 0);
      return `${name} ${percent(Math.min(1, busy / window))}`;
    });
    const lasted = this.#lasted();
    const tail = lasted.length
      ? ` Half of ${plural(lasted.length, "completion")} took less than ${duration(this.#median)}, the longest ${duration(lasted.at(-1))}.`
      : "";
    return `Busy in the last ${duration(window)}: ${shares.join(", ")}.${tail}`;
  }

  #draw(context, width, height) {
    if (!this.#workers.length && !this.#lanes.length) return;
    const tones = colours();
    const x = (at) => LEFT + ((Math.max(at, this.#from) - this.#from) / (this.#to - this.#from || 1)) * (width - LEFT);
    context.textBaseline = "middle";
    for (const [index, { name, spans }] of this.#workers.entries()) {
      const middle = index * ROW + ROW / 2;
      context.fillStyle = tones.soft;
      context.textAlign = "right";
      context.fillText(name, LEFT - 10, middle, LEFT - 12);
      context.fillStyle = tones.rule;
      context.fillRect(LEFT, middle - 0.5, width - LEFT, 1);
      for (const span of spans) {
        if (span.end < this.#from) continue;
        const wide = Math.max(0.75, x(span.end) - x(span.start));
        if (span.activity === "busy") {
          context.fillStyle = tones.accent;
          context.fillRect(x(span.start), middle - 6, wide, 12);
        } else if (span.activity === "blocked") {
          context.fillStyle = tones["warn-fill"];
          context.fillRect(x(span.start), middle - 2.5, wide, 5);
        } else {
          context.fillStyle = tones.faint;
          context.fillRect(x(span.start), middle - 1, wide, 2);
        }
      }
    }
    const top = this.#workers.length * ROW + 10;
    if (this.#lanes.length) {
      context.fillStyle = tones.soft;
      context.textAlign = "right";
      context.fillText("completions", LEFT - 10, top + 6);
      for (const [index, { spans }] of this.#lanes.entries()) {
        for (const span of spans) {
          context.fillStyle = span.end - span.start >= TAIL * this.#median ? tones.ink : tones["accent-2"];
          context.fillRect(x(span.start), top + index * LANE, Math.max(0.75, x(span.end) - x(span.start) - 0.5), LANE - 1);
        }
      }
    }
    context.fillStyle = tones.soft;
    context.textBaseline = "alphabetic";
    const ticks = Math.max(2, Math.min(6, Math.floor((width - LEFT) / 90)));
    for (let tick = 0; tick <= ticks; tick += 1) {
      const share = tick / ticks;
      context.textAlign = tick === 0 ? "left" : tick === ticks ? "right" : "center";
      const before = (1 - share) * (this.#to - this.#from);
      context.fillText(tick === ticks ? clock(this.#to) : `−${duration(before > 10 ? Math.round(before) : before)}`, LEFT + share * (width - LEFT), height - 4);
    }
  }

  #point(event) {
    const { clientWidth: width } = this.#canvas.element;
    const at = this.#from + ((event.offsetX - LEFT) / (width - LEFT)) * (this.#to - this.#from);
    const row = Math.floor(event.offsetY / ROW);
    const lane = this.#lanes[Math.floor((event.offsetY - this.#workers.length * ROW - 10) / LANE)];
    const span = (this.#workers[row] ?? lane)?.spans.find((other) => other.start <= at && at <= other.end);
    if (!span) setText(this.#readout, "");
    else {
      const why = span.cause ? `, waits for ${inWords(span.cause)}` : "";
      setText(this.#readout, `${span.worker}: ${span.activity} for ${duration(span.end - span.start)}${span.worker.includes("/") ? "" : why}`);
    }
  }
}

function rowsOf(spans) {
  const rows = new Map();
  for (const span of spans) {
    if (!rows.has(span.worker)) rows.set(span.worker, []);
    rows.get(span.worker).push(span);
  }
  return [...rows].map(([name, own]) => ({ name, spans: own }));
}
