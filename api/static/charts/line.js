// Lines over steps: one uPlot each, with a cursor that all of them share.

import uPlot from "../vendor/uplot/uPlot.esm.js";
import { h, replace, setText } from "../dom.js";
import { isNumber, number, plural, telling } from "../format.js";
import { colours, onTheme } from "../theme.js";
import { Figure } from "./figure.js";

const HEIGHT = 132; // CSS pixels
const ROLLING_FROM = 24; // points from which a noisy line gets its mean drawn over it
const SYNC = uPlot.sync("steps");

/** One chart. `lines`: [{name, label, tone, kind}], kind `line` (default), `mean` (faint, with its rolling mean over it)
 *  or `dots`. `from`: values that the y axis always has. `means`: what the number means, to end its sentence. */
export class LineChart {
  #lines; #told = []; #figure; #plot = null; #host; #legend; #data = null; #observer; #unlisten; #from; #means; #key = "";

  constructor({ title, lines, from = [], means = "", wide = false }) {
    this.#lines = lines;
    this.#from = from;
    this.#means = means;
    this.#figure = new Figure({ title, wide, className: "line" });
    this.#legend = h("ul", { class: "legend" });
    this.#host = h("div", { class: "plot", role: "img", "aria-label": title, "aria-describedby": this.#figure.summaryId });
    this.#figure.body.append(this.#legend, this.#host);
    this.#observer = new ResizeObserver(() => this.#resize());
    this.#observer.observe(this.#host);
    this.#unlisten = onTheme(() => this.#remake());
    this.element = this.#figure.element;
  }

  /** `series`: name → {step, value}, as /metrics gives them. Returns whether there is anything to show. */
  show(series) {
    const present = this.#lines.filter((line) => series[line.name]?.step.length);
    this.element.hidden = !present.length;
    if (!present.length) return false;
    this.#data = aligned(present, series);
    this.#told = this.#data.columns.slice(1).map((column) => telling(...extent(column.filter(isNumber))));
    const key = this.#data.drawn.map((line) => line.label).join("|");
    if (this.#plot === null || key !== this.#key) {
      this.#key = key;
      this.#remake();
    } else {
      this.#plot.setData(this.#data.columns);
    }
    this.#figure.says(this.#sentence(present, series));
    this.#readout(null);
    this.#figure.table(() => ({
      head: ["step", ...present.map((line) => line.label)],
      rows: this.#data.steps.map((step, index) => [
        number(step), ...present.map((line) => number(this.#data.raw.get(line.name)[index] ?? NaN)),
      ]),
    }));
    return true;
  }

  close() {
    this.#observer.disconnect();
    this.#unlisten();
    this.#plot?.destroy();
    this.#plot = null;
  }

  #sentence(present, series) {
    const first = present[0];
    const values = series[first.name].value.filter(isNumber);
    if (!values.length) return "No value yet.";
    const [low, high] = extent(values);
    const told = telling(low, high);
    const span = values.length > 1
      ? `${told(values[0])} → ${told(values.at(-1))} in ${plural(values.length, "point")}, ${told(low)} to ${told(high)}`
      : `${number(values[0])} once`;
    const others = present.slice(1).map((line) => `${line.label} ${number(series[line.name].value.at(-1))}`);
    return `${[span, ...others].join("; ")}${this.#means ? `. ${this.#means}` : ""}.`;
  }

  /** The numbers under the cursor, or the last ones. */
  #readout(index) {
    const { drawn, columns, steps } = this.#data;
    const at = index ?? steps.length - 1;
    const shown = drawn.map((line, place) => {
      let row = at;
      while (index === null && row > 0 && columns[place + 1][row] === null) row -= 1;
      return this.#told[place](columns[place + 1][row] ?? NaN);
    });
    const main = drawn.findIndex((line) => !line.faint);
    this.#figure.value(index === null ? shown[main] : `step ${steps[at]}: ${shown[main]}`);
    for (const [place, item] of [...this.#legend.children].entries()) setText(item.lastElementChild, shown[place]);
  }

  #remake() {
    if (this.#data === null) return;
    this.#plot?.destroy();
    const tones = colours();
    const { drawn, columns } = this.#data;
    replace(this.#legend, drawn.length > 1 ? drawn.map((line) => h("li", {},
      h("span", { class: `key ${line.dots ? "dots" : ""} tone-${line.tone}` }), `${line.label} `, h("b", {}))) : []);
    this.#legend.hidden = drawn.length < 2;
    const axis = { stroke: tones.soft, font: "11px system-ui, sans-serif", ticks: { show: false } };
    this.#plot = new uPlot({
      width: this.#host.clientWidth || 300,
      height: HEIGHT,
      padding: [8, 8, 0, 0],
      legend: { show: false },
      cursor: { sync: { key: SYNC.key, scales: ["x", null] }, y: false, drag: { x: false, y: false }, points: { size: 6 } },
      scales: { x: { time: false }, y: { range: (_, low, high) => this.#range(low, high) } },
      axes: [
        { ...axis, size: 22, gap: 2, space: 60, grid: { show: false } },
        { ...axis, size: 44, gap: 4, space: 30, grid: { stroke: tones.rule, width: 1 }, values: (_, ticks) => ticks.map(telling(ticks[0], ticks[1])) },
      ],
      series: [{}, ...drawn.map((line) => ({
        stroke: tones[line.tone],
        width: line.faint ? 1 : 1.75,
        spanGaps: true,
        paths: line.dots ? uPlot.paths.linear() : undefined,
        points: { show: line.dots || ((plot) => plot.data[0].length < 2), size: 7, fill: tones[line.tone] },
      }))],
      hooks: { setCursor: [(plot) => this.#readout(plot.cursor.idx ?? null)] },
    }, columns, this.#host);
    this.#plot.root.setAttribute("aria-hidden", "true");
  }

  #range(low, high) {
    const values = [low, high, ...this.#from].filter(isNumber);
    if (!values.length) return [0, 1];
    const [bottom, top] = [Math.min(...values), Math.max(...values)];
    const wide = (Math.abs(top) || 1) * 0.1; // of a line that never moves
    if (bottom === top) return [this.#from.includes(bottom) ? bottom : bottom - wide, top + wide];
    const room = (top - bottom) * 0.06;
    return [this.#from.includes(bottom) ? bottom : bottom - room, top + room];
  }

  #resize() {
    const width = this.#host.clientWidth;
    if (this.#plot && width && width !== this.#plot.width) this.#plot.setSize({ width, height: HEIGHT });
  }
}

/** All lines on the union of their steps, as uPlot wants them: a column each, null where a line has no value. */
function aligned(lines, series) {
  const steps = [...new Set(lines.flatMap((line) => series[line.name].step))].sort((a, b) => a - b);
  const raw = new Map(lines.map((line) => {
    const known = new Map(series[line.name].step.map((step, index) => [step, series[line.name].value[index]]));
    return [line.name, steps.map((step) => (isNumber(known.get(step)) ? known.get(step) : null))];
  }));
  const drawn = [];
  const columns = [steps];
  for (const line of lines) {
    const column = raw.get(line.name);
    const noisy = line.kind === "mean" && column.filter(isNumber).length >= ROLLING_FROM;
    drawn.push({ label: noisy ? `${line.label} of a step` : line.label, tone: noisy ? "faint" : line.tone, faint: noisy, dots: line.kind === "dots" });
    columns.push(column);
    if (noisy) {
      const width = Math.max(5, Math.round(column.length / 20));
      drawn.push({ label: `mean of ${width} steps`, tone: line.tone, faint: false, dots: false });
      columns.push(rolling(column, width));
    }
  }
  return { steps, raw, drawn, columns };
}

const extent = (values) => values.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [Infinity, -Infinity]);

function rolling(values, width) {
  const window = [];
  let sum = 0;
  return values.map((value) => {
    if (!isNumber(value)) return null;
    window.push(value);
    sum += value;
    if (window.length > width) sum -= window.shift();
    return window.length === width ? sum / width : null;
  });
}
