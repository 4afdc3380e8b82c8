// Every admitted sample ends in one way, and the counts add up: the ledger's account.

import { h, replace } from "../dom.js";
import { bytes, many } from "../format.js";
import { listed } from "../words.js";

export class Account {
  #terms; #drawn = ""; #says;

  constructor() {
    this.#terms = h("dl", { class: "account" });
    this.#says = h("p", { class: "says" });
    this.element = h("section", { class: "panel" }, h("h3", {}, "Account of all samples"), this.#says, this.#terms);
  }

  show({ counts, states, bytes: held }) {
    const text = JSON.stringify([counts, states, held]);
    if (text === this.#drawn) return;
    this.#drawn = text;
    const dropped = Object.values(counts.dropped ?? {}).reduce((sum, count) => sum + count, 0);
    const rest = counts.trained + dropped + counts.quarantined + counts.open;
    const row = (sign, count, name, aside = "") => h("div", {},
      h("dt", {}, h("span", {}, sign), name), h("dd", {}, h("b", {}, many(count)), h("span", {}, aside)));
    const again = [["generated again", counts.requeued], ["restored", counts.restored]].filter(([, amount]) => amount);
    replace(this.#terms,
      row("", counts.admitted, "admitted", again.map(([name, amount]) => `${many(amount)} ${name}`).join(", ")),
      row(counts.admitted === rest ? "=" : "≠", counts.trained, "trained", counts.masked ? `${many(counts.masked)} with masked tokens` : ""),
      row("+", dropped, "dropped", reasons(counts.dropped)),
      row("+", counts.quarantined, "quarantined"),
      row("+", counts.open, "open", listed(states)));
    replace(this.#says, counts.admitted === rest ? `It adds up. ${bytes(held)} are in the store.` : `It does not add up: ${many(rest)} of ${many(counts.admitted)}.`);
  }
}

const reasons = (dropped) => listed(dropped).replaceAll("_", " ");
