// What every chart has: a title, one sentence that says what it shows, and its numbers in a table behind a button.

import { freshId, h, replace, setText } from "../dom.js";

const TABLE_EVERY = 2000; // milliseconds between two updates of an open table: it has to stay readable
const MOST_ROWS = 200;

export class Figure {
  #table = null; #button; #region; #summary; #value; #timer = 0; #body;

  /** `wide`: of a grid's whole width. `value`: there is a number beside the title. */
  constructor({ title, wide = false, className = "", level = 3 }) {
    const summaryId = freshId("says");
    const regionId = freshId("table");
    this.#summary = h("p", { class: "says", id: summaryId });
    this.#value = h("span", { class: "now" });
    this.#button = h("button", {
      type: "button", class: "quiet small table-button", "aria-expanded": "false", "aria-controls": regionId,
      "aria-label": `Table: ${title}`, on: { click: () => this.#toggle() },
    }, "Table");
    this.#region = h("div", {
      class: "scroll table-region", id: regionId, role: "region", tabindex: "0", hidden: true,
      "aria-label": `Table: ${title}`,
    });
    this.#body = h("div", { class: "figure-body" });
    this.title = title;
    this.summaryId = summaryId;
    this.element = h("figure", { class: `panel ${wide ? "wide" : ""} ${className}` },
      h("figcaption", {},
        h("div", { class: "figure-head" }, h(`h${level}`, {}, title), this.#value, this.#button),
        this.#summary),
      this.#body, this.#region);
  }

  /** Where the picture goes. */
  get body() {
    return this.#body;
  }

  /** The sentence below the title. It is the picture's description for who does not see it. */
  says(text) {
    setText(this.#summary, text);
  }

  /** The number beside the title. */
  value(text) {
    setText(this.#value, text);
  }

  /** `rows()` gives {head: […], rows: [[…]]}; it is asked only while the table is open. */
  table(rows) {
    this.#table = rows;
    if (!this.#region.hidden && !this.#timer) {
      this.#timer = setTimeout(() => {
        this.#timer = 0;
        this.#fill();
      }, TABLE_EVERY);
    }
  }

  #toggle() {
    const open = this.#region.hidden;
    this.#region.hidden = !open;
    this.#button.setAttribute("aria-expanded", String(open));
    if (open) this.#fill();
  }

  #fill() {
    const { head, rows } = this.#table?.() ?? { head: [], rows: [] };
    if (!rows.length) {
      replace(this.#region, h("p", { class: "empty" }, "There is nothing yet."));
      return;
    }
    const left = rows.length - MOST_ROWS;
    replace(this.#region, table(head, rows.slice(-MOST_ROWS),
      left > 0 ? `${this.title}: the last ${MOST_ROWS} of ${rows.length} rows` : this.title));
  }
}

/** A table of texts; cells that are numbers stand to the right. */
export function table(head, rows, caption) {
  const numeric = head.map((_, index) => rows.every((row) => /^[−\d–][\d.,e−%]*$/.test(String(row[index]))));
  const place = (index) => (numeric[index] ? "n" : null);
  return h("table", {},
    h("caption", { class: "unseen" }, caption),
    h("thead", {}, h("tr", {}, head.map((name, index) => h("th", { scope: "col", class: place(index) }, name)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell, index) => h("td", { class: place(index) }, cell))))));
}

/** A canvas of sharp pixels that is drawn again when its size or the colour scheme changes. */
export class Canvas {
  #draw; #observer; #frame = 0; #unlisten;

  /** `draw(context, width, height)` in CSS pixels. `describedBy`: id of the sentence that says what it shows. */
  constructor({ label, describedBy, className, draw, onTheme }) {
    this.element = h("canvas", { class: className, role: "img", "aria-label": label, "aria-describedby": describedBy });
    this.#draw = draw;
    this.#observer = new ResizeObserver(() => this.redraw());
    this.#observer.observe(this.element);
    this.#unlisten = onTheme(() => this.redraw());
  }

  /** Draw in the next frame, however often this is asked before it. */
  redraw() {
    if (!this.#frame) this.#frame = requestAnimationFrame(() => this.#paint());
  }

  close() {
    cancelAnimationFrame(this.#frame);
    this.#observer.disconnect();
    this.#unlisten();
  }

  #paint() {
    this.#frame = 0;
    const { clientWidth: width, clientHeight: height } = this.element;
    if (!width || !height) return;
    const ratio = devicePixelRatio || 1;
    const [wide, high] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (this.element.width !== wide || this.element.height !== high) Object.assign(this.element, { width: wide, height: high });
    const context = this.element.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    context.font = "11px system-ui, sans-serif";
    this.#draw(context, width, height);
  }
}
