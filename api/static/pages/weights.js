// What engines serve, whether that is attested, and the newest versions on their way from the learner to the engines.

import { h, replace } from "../dom.js";
import { table } from "../charts/figure.js";
import { clock, compareVersions, duration, many, plural } from "../format.js";

const SHOWN = 8; // versions

export class Weights {
  #engines; #updates; #drawn = "";

  constructor() {
    this.#engines = h("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "Engines" });
    this.#updates = h("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "Weight updates" });
    this.element = h("section", { class: "grid", "aria-label": "Weights" },
      h("div", { class: "c6" }, h("div", { class: "panel" }, h("h3", {}, "Engines"), this.#engines)),
      h("div", { class: "c6" }, h("div", { class: "panel" }, h("h3", {}, "Weight updates"), this.#updates)));
  }

  show(engines, events) {
    const updates = updatesOf(events);
    const text = JSON.stringify([engines, updates]);
    if (text === this.#drawn) return;
    this.#drawn = text;
    replace(this.#engines, engines.length
      ? table(["engine", "serves", "digest", "attested", "in flight"], engines.map((engine) => [
        `${engine.name} (${engine.kind})`, engine.served ?? "–", digest(engine.digest),
        engine.attested === true ? "yes" : engine.attested === false ? "NO" : "not yet", many(engine.in_flight),
      ]), "Engines")
      : h("p", { class: "empty" }, "No engine is connected."));
    replace(this.#updates, updates.length
      ? table(["version", "published", "took", "digest", "loaded by engines"], updates.map((update) => [
        update.version, clock(update.at), duration(update.seconds), digest(update.digest), loaded(update),
      ]), "Weight updates")
      : h("p", { class: "empty" }, "No version has been published yet."));
  }
}

function loaded({ served, digest: published }) {
  if (!served.length) return "not yet";
  const wrong = served.filter((line) => published && line.digest && line.digest !== published);
  const took = served.map((line) => line.update_s).filter((seconds) => typeof seconds === "number");
  const within = took.length ? ` in ${duration(Math.max(...took))}` : "";
  return wrong.length ? `${plural(wrong.length, "engine")} with ANOTHER digest` : `${many(served.length)}${within}`;
}

/** The newest published versions with who serves them, newest first. */
function updatesOf(events) {
  const versions = new Map();
  for (const event of events) {
    const { version } = event.data ?? {};
    if (!version) continue;
    if (event.type === "weights") {
      versions.set(version, { version, at: event.created_at, seconds: event.data.publish_s, digest: event.data.digest, served: versions.get(version)?.served ?? [] });
    } else if (event.type === "served") {
      if (!versions.has(version)) versions.set(version, { version, at: null, seconds: null, digest: null, served: [] });
      const { served } = versions.get(version);
      if (!served.some((line) => line.engine === event.data.engine)) served.push(event.data);
    }
  }
  return [...versions.values()].sort((a, b) => compareVersions(b.version, a.version)).slice(0, SHOWN);
}

const digest = (text) => (text ? text.slice(0, 8) : "–");
