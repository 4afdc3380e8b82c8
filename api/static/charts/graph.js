// The pipeline as a graph: prompts, then the stages in data order by their role, and the weights on their way back.

import { h, replace, s, setAttribute, setText } from "../dom.js";
import { isNumber, many, number, plural } from "../format.js";
import { Figure } from "./figure.js";

const NODE = { width: 152, height: 74 };
const NARROW = 620; // CSS pixels below which the graph runs downwards
const GAP = 22; // CSS pixels between stages that stand side by side
const BELOW = 44; // CSS pixels for the way of the weights
const ABOVE = 20; // CSS pixels for the word above a stage
const PROMPTS = "feeder";
const COLUMNS = ["prompts", "generate", "score", "train"];

export class Graph {
  #figure; #host; #nodes = new Map(); #edges = []; #weights = null; #structure = ""; #last = null; #observer;

  constructor() {
    this.#figure = new Figure({ title: "Pipeline", className: "pipeline" });
    this.#host = h("div", { class: "graph" });
    this.#figure.body.append(this.#host);
    this.#observer = new ResizeObserver(() => this.#last && this.show(this.#last));
    this.#observer.observe(this.#host);
    this.element = this.#figure.element;
  }

  /** `state`: {queue, workers}, as /live gives them. */
  show(state) {
    this.#last = state;
    const parts = partsOf(state);
    const width = this.#host.clientWidth;
    if (!width) return;
    const structure = `${width}|${parts.map((part) => `${part.name}:${part.role}`).join("|")}`;
    if (structure !== this.#structure) {
      this.#structure = structure;
      this.#build(parts, width);
    }
    for (const part of parts) this.#update(part);
    const { learner, served } = state.queue;
    const engines = [...new Set(Object.values(served ?? {}))].join(", ") || "nothing yet";
    setText(this.#weights, `weights: learner ${learner ?? "–"}, engine serves ${engines}`);
    this.#figure.says(`${parts.map((part) => `${part.name} ${part.doing}`).join("; ")}.`);
    this.#figure.table(() => ({
      head: ["stage", "doing", "waits for", "ready", "leased"],
      rows: parts.map((part) => [part.name, part.activity, part.waitsFor ?? "", many(part.ready), many(part.leased)]),
    }));
  }

  close() {
    this.#observer.disconnect();
  }

  #update(part) {
    const node = this.#nodes.get(part.name);
    setAttribute(node.group, "class", `node ${part.activity.split(" ")[0]} ${part.bottleneck ? "bottleneck" : ""}`);
    setText(node.activity, part.activity);
    setText(node.numbers, part.numbers);
    setText(node.title, `${part.name} ${part.words}`);
    setAttribute(node.flag, "visibility", part.bottleneck ? "visible" : "hidden");
    for (const edge of this.#edges) {
      if (edge.name === part.name) setText(edge.label, isNumber(part[edge.of]) ? `${number(part[edge.of])}/s` : "");
    }
  }

  #build(parts, width) {
    const down = width < NARROW;
    const columns = COLUMNS.map((role) => parts.filter((part) => part.role === role)).filter((column) => column.length);
    const most = Math.max(...columns.map((column) => column.length));
    const size = down
      ? { width, height: ABOVE + columns.length * NODE.height + (columns.length - 1) * 40 + BELOW }
      : { width, height: ABOVE + most * NODE.height + (most - 1) * GAP + BELOW };
    const places = down ? downwards(columns, width) : sideways(columns, width, size.height - BELOW);
    const svg = s("svg", {
      width: size.width, height: size.height, viewBox: `0 0 ${size.width} ${size.height}`, role: "img",
      "aria-label": "Pipeline", "aria-describedby": this.#figure.summaryId,
    });
    svg.append(s("defs", {}, s("marker", {
      id: "arrow", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto-start-reverse",
    }, s("path", { d: "M1 1 7 4 1 7", class: "arrowhead" }))));
    this.#edges = [];
    for (let index = 1; index < columns.length; index += 1) {
      for (const from of columns[index - 1]) for (const to of columns[index]) svg.append(this.#edge(places, from, to, down, columns[index - 1].length > 1));
    }
    svg.append(...this.#back(places, columns, size, down));
    this.#nodes.clear();
    for (const part of parts) svg.append(this.#node(part, places.get(part.name)));
    replace(this.#host, svg);
  }

  #edge(places, from, to, down, several) {
    const [a, b] = [places.get(from.name), places.get(to.name)];
    const start = down ? [a.x + a.width / 2, a.y + NODE.height] : [a.x + a.width, a.y + NODE.height / 2];
    const end = down ? [b.x + b.width / 2, b.y - 2] : [b.x - 2, b.y + NODE.height / 2];
    const [mx, my] = [(start[0] + end[0]) / 2, (start[1] + end[1]) / 2];
    const path = down
      ? `M${start} C${start[0]} ${my} ${end[0]} ${my} ${end}`
      : `M${start} C${mx} ${start[1]} ${mx} ${end[1]} ${end}`;
    // Where ways come together, what each one brings stands at its beginning, else at its end.
    const label = s("text", several ? labelAt(start, end, down, 1) : labelAt(end, start, down, -1));
    this.#edges.push(several ? { name: from.name, of: "rateOut", label } : { name: to.name, of: "rateIn", label });
    return s("g", { class: "edge" }, s("path", { d: path, "marker-end": "url(#arrow)" }), label);
  }

  /** The way of the weights, from the last column to the one that generates. */
  #back(places, columns, size, down) {
    const engine = columns.find((column) => column[0].role === "generate")?.[0];
    const learner = columns.at(-1)[0];
    this.#weights = s("text", { class: "weights-label" });
    if (!engine || learner.role !== "train") return [];
    const [a, b] = [places.get(learner.name), places.get(engine.name)];
    if (down) {
      const y = size.height - 12;
      for (const [key, value] of Object.entries({ x: size.width / 2, y, "text-anchor": "middle" })) this.#weights.setAttribute(key, value);
      const side = 5;
      const path = `M${a.x + a.width / 2} ${a.y + NODE.height} v10 H${side} V${b.y + NODE.height / 2} H${b.x - 2}`;
      return [s("g", { class: "edge back" }, s("path", { d: path, "marker-end": "url(#arrow)" }), this.#weights)];
    }
    const y = size.height - 24;
    const [from, to] = [a.x + a.width / 2, b.x + b.width / 2];
    const path = `M${from} ${a.y + NODE.height} V${y - 10} Q${from} ${y} ${from - 10} ${y} H${to + 10} Q${to} ${y} ${to} ${y - 10} V${b.y + NODE.height + 3}`;
    for (const [key, value] of Object.entries({ x: (from + to) / 2, y: y + 17, "text-anchor": "middle" })) this.#weights.setAttribute(key, value);
    return [s("g", { class: "edge back" }, s("path", { d: path, "marker-end": "url(#arrow)" }), this.#weights)];
  }

  #node(part, place) {
    const title = s("title");
    const activity = s("text", { x: 26, y: 43, class: "activity" });
    const numbers = s("text", { x: 12, y: 62, class: "numbers" });
    const flag = s("text", { x: 0, y: -7, class: "flag", visibility: "hidden" }, "bottleneck");
    const group = s("g", { class: "node", transform: `translate(${place.x} ${place.y})` }, title,
      s("rect", { width: place.width, height: NODE.height, rx: 6 }),
      s("text", { x: 12, y: 22, class: "name" }, part.name),
      s("circle", { cx: 16, cy: 39, r: 4 }), activity, numbers, flag);
    this.#nodes.set(part.name, { group, title, activity, numbers, flag });
    return group;
  }
}

/** Place of a way's label beside its beginning (`sense` 1) or its end (−1), on the side to which it does not bend. */
function labelAt([x, y], other, down, sense) {
  const left = x < other[0];
  if (down) return { x: x + (left ? -8 : 8), y: y + sense * 16 + 4, "text-anchor": left ? "end" : "start" };
  return { x: x + sense * 32, y: y > other[1] ? y + 17 : y - 7, "text-anchor": "middle" };
}

function sideways(columns, width, height) {
  const nodeWidth = Math.min(NODE.width, (width - 34 * (columns.length - 1)) / columns.length);
  const step = columns.length > 1 ? (width - nodeWidth - 2) / (columns.length - 1) : 0;
  const places = new Map();
  for (const [index, column] of columns.entries()) {
    const tall = column.length * NODE.height + (column.length - 1) * GAP;
    const top = ABOVE + (height - ABOVE - tall) / 2;
    for (const [row, part] of column.entries()) {
      places.set(part.name, { x: 1 + index * step, y: top + row * (NODE.height + GAP), width: nodeWidth });
    }
  }
  return places;
}

function downwards(columns, width) {
  const places = new Map();
  for (const [index, column] of columns.entries()) {
    const nodeWidth = Math.min(200, (width - 24 - 12 * (column.length - 1)) / column.length);
    const left = 18 + (width - 18 - column.length * nodeWidth - 12 * (column.length - 1)) / 2;
    for (const [row, part] of column.entries()) {
      places.set(part.name, { x: left + row * (nodeWidth + 12), y: ABOVE + index * (NODE.height + 40), width: nodeWidth });
    }
  }
  return places;
}

/** What the graph shows: the feeder and each stage, with what its workers do. */
function partsOf({ queue, workers }) {
  const feeder = workers.find((worker) => worker.name === "feeder");
  const parts = [];
  if (feeder) parts.push(partOf({ name: PROMPTS, role: "prompts" }, [feeder], queue));
  for (const stage of queue.stages) {
    const own = workers.filter((worker) => worker.stage === stage.name || worker.name === stage.name);
    parts.push(partOf(stage, own, queue));
  }
  return parts;
}

function partOf(stage, workers, queue) {
  const doing = (activity) => workers.filter((worker) => worker.activity === activity);
  const activity = ["busy", "blocked", "idle"].find((name) => doing(name).length) ?? "idle";
  const waitsFor = activity === "busy" ? null : (workers.find((worker) => worker.waits_for)?.waits_for ?? null);
  const several = workers.length > 1 ? ` ${doing(activity).length}/${workers.length}` : "";
  const counted = isNumber(stage.ready);
  const states = queue.states ?? {};
  const waiting = waitsFor ? `, waits for ${waitsFor}` : "";
  const amount = counted ? `, ${many(stage.ready)} ready and ${many(stage.leased)} leased` : "";
  return {
    name: stage.name,
    role: stage.role,
    activity: `${activity}${several}`.trim(),
    waitsFor,
    ready: counted ? stage.ready : queue.counts?.open,
    leased: counted ? stage.leased : states.generating,
    rateIn: stage.in_per_second,
    rateOut: stage.out_per_second,
    numbers: counted ? `${many(stage.ready)} ready · ${many(stage.leased)} leased` : `${plural(queue.counts?.open ?? 0, "sample")} open`,
    bottleneck: queue.bottleneck?.stage === stage.name,
    doing: waitsFor ? `waits for ${waitsFor}` : activity,
    words: `is ${activity}${waiting}${amount}`,
  };
}
