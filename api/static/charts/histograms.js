// Staleness of what is in flight, in the queue, and at training, side by side on one scale, with the bound between rows.

import { h, replace, setText } from "../dom.js";
import { many, percent, plural } from "../format.js";
import { Figure } from "./figure.js";

const PLACES = [
  ["in_flight", "in flight", "being generated"],
  ["in_queue", "in the queue", "generated, not trained"],
  ["at_training", "at training", "trained so far"],
];

export class Histograms {
  #figure; #columns;

  constructor() {
    this.#figure = new Figure({ title: "In flight, in the queue, at training", className: "histograms" });
    this.#columns = PLACES.map(([key, title, means]) => {
      const total = h("b", {});
      const rows = h("div", { class: "rows" });
      return { key, total, rows, element: h("div", { class: "histogram" }, h("h4", { title: means }, `${title} `, total), rows) };
    });
    this.#figure.body.append(h("div", { class: "three", "aria-hidden": "true" }, this.#columns.map((column) => column.element)));
    this.element = this.#figure.element;
  }

  show(staleness, bound) {
    const seen = PLACES.flatMap(([key]) => Object.keys(staleness?.[key] ?? {}).map(Number));
    const highest = seen.reduce((a, b) => Math.max(a, b), bound);
    const levels = Array.from({ length: highest + 1 }, (_, index) => highest - index);
    const says = [];
    for (const { key, total, rows } of this.#columns) {
      const counts = staleness?.[key] ?? {};
      const sum = Object.values(counts).reduce((a, b) => a + b, 0);
      setText(total, many(sum));
      if (rows.childElementCount !== levels.length || rows.dataset.bound !== String(bound)) {
        rows.dataset.bound = bound;
        replace(rows, levels.map((level) => h("div", {
          class: `row ${level === bound ? "at-bound" : ""} ${level > bound ? "above" : ""}`,
        }, h("span", {}, level), h("i", {}, h("u", {})), h("span", {}))));
      }
      for (const [index, level] of levels.entries()) {
        const row = rows.children[index];
        const share = sum ? (counts[level] ?? 0) / sum : 0;
        row.children[1].firstElementChild.style.width = `${share * 100}%`;
        setText(row.children[2], counts[level] ? percent(share) : "");
      }
      const name = PLACES.find(([other]) => other === key)[1];
      const worst = Object.entries(counts).filter(([, count]) => count).reduce((a, [level]) => Math.max(a, Number(level)), -1);
      says.push(sum ? `${plural(sum, "sample")} ${name}, at most ${worst}` : `none ${name}`);
    }
    this.#figure.says(`${says.join("; ")}. The bound is ${bound}.`);
    this.#figure.table(() => ({
      head: ["staleness", ...PLACES.map(([, title]) => title)],
      rows: levels.toReversed().map((level) => [String(level), ...PLACES.map(([key]) => many(staleness?.[key]?.[level] ?? 0))]),
    }));
  }

  close() {}
}
