// The queue of each stage, and who waits for whom.

import { h, Keyed, setAttribute, setText } from "../dom.js";
import { duration, isNumber, many, number, percent } from "../format.js";

const CALM = 10; // seconds from which it is worth saying for how long

const COLUMNS = [
  ["ready", (stage) => many(stage.ready)],
  ["leased", (stage) => many(stage.leased)],
  ["oldest", (stage) => duration(stage.oldest_age_seconds)],
  ["in/s", (stage) => number(stage.in_per_second)],
  ["out/s", (stage) => number(stage.out_per_second)],
  ["empty in", (stage) => (isNumber(stage.time_to_empty_seconds) ? duration(stage.time_to_empty_seconds) : stage.ready ? "never" : "is empty")],
];

export class Stages {
  #rows; #says;

  constructor() {
    const body = h("tbody");
    this.#says = h("p", { class: "says" });
    this.element = h("section", { class: "panel stages" }, h("h3", {}, "Rates and time to empty"), this.#says,
      h("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "Rates of each stage" },
        h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "stage"), COLUMNS.map(([name]) => h("th", { scope: "col", class: "n" }, name)))), body)));
    this.#rows = new Keyed(body, (stage) => stage.name, (stage) => {
      const cells = COLUMNS.map(() => h("td", { class: "n" }));
      return {
        element: h("tr", {}, h("th", { scope: "row" }, stage.name), cells),
        update: (now) => COLUMNS.forEach(([, text], index) => setText(cells[index], text(now))),
      };
    });
  }

  show(queue) {
    this.#rows.show(queue.stages);
    const fullest = queue.stages.reduce((most, stage) => (stage.ready > (most?.ready ?? 0) ? stage : most), null);
    setText(this.#says, fullest ? `Most wait for ${fullest.name}: ${many(fullest.ready)}.` : "Nothing waits for a stage.");
  }
}

export class Workers {
  #rows;

  /** `drain(name, wanted)` asks a worker to take nothing new, or to take again. */
  constructor(drain) {
    const list = h("ul", { class: "workers" });
    this.element = h("section", { class: "panel waits" }, h("h3", {}, "Who waits for whom"),
      h("p", { class: "says" }, "The last minute of each worker, and how much of it was busy. Amber: it had work and could not go on."), list);
    this.#rows = new Keyed(list, (worker) => worker.name, (worker) => this.#row(worker.name, drain));
  }

  show(workers, changeable) {
    this.#rows.show(workers.map((worker) => ({ ...worker, changeable })));
  }

  #row(name, drain) {
    const parts = ["busy", "blocked", "idle"].map((activity) => h("i", { class: activity }));
    const words = h("p", {});
    const share = h("span", { class: "share" });
    const dot = h("span", { class: "dot" });
    const button = h("button", { type: "button", class: "quiet small" });
    let last = null;
    button.addEventListener("click", () => drain(name, !last.drained));
    return {
      element: h("li", {}, h("b", {}, dot, name), h("span", { class: "bar", "aria-hidden": "true" }, parts), share, words, button),
      update(worker) {
        last = worker;
        setAttribute(dot, "class", `dot ${worker.activity}`);
        for (const [index, activity] of ["busy", "blocked", "idle"].entries()) {
          parts[index].style.width = `${(worker.shares?.[activity] ?? 0) * 100}%`;
        }
        setText(share, percent(worker.shares?.busy));
        const since = isNumber(worker.since_seconds) && worker.since_seconds >= CALM ? `, for ${duration(Math.floor(worker.since_seconds))}` : "";
        const silent = isNumber(worker.heartbeat_seconds) && worker.heartbeat_seconds > 10 ? `; silent for ${duration(worker.heartbeat_seconds)}` : "";
        const doing = worker.activity !== "busy" && worker.waits_for ? `waits for ${worker.waits_for}` : worker.activity;
        setText(words, `${doing}${since}${worker.drained ? "; drained: takes nothing new" : ""}${silent}`);
        button.hidden = !worker.changeable || !worker.stage;
        setText(button, worker.drained ? "Undrain" : "Drain");
        setAttribute(button, "aria-label", `${worker.drained ? "Undrain" : "Drain"} ${name}`);
      },
    };
  }
}
