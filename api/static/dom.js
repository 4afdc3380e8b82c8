// Making and changing elements. Text only ever becomes text: nothing here takes markup.

const SVG = "http://www.w3.org/2000/svg";

/** A new element. `attributes`: class, on (event → listener), css (property → value), data (name → value), others as
 *  they are; null, undefined and false are left out. Children are nodes, strings and numbers. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function s(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (name === "css") for (const [key, amount] of Object.entries(value)) element.style.setProperty(key, amount);
    else if (name === "data") Object.assign(element.dataset, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(2).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Change the text only when it is another one, so that nothing blinks and screen readers stay calm. */
export function setText(element, text) {
  const wanted = String(text);
  if (element.textContent !== wanted) element.textContent = wanted;
}

/** Change an attribute only when it is another one; null takes it away. */
export function setAttribute(element, name, value) {
  if (value === null || value === undefined || value === false) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

/** Put the children in place of what is there. */
export function replace(element, ...children) {
  element.replaceChildren(...children.flat(2).filter((child) => child !== null && child !== undefined && child !== false));
}

/** Keep one child for each item, in order: `make(item)` gives {element, update(item)}. Focus inside stays where it is. */
export class Keyed {
  #parent; #key; #make; #parts = new Map();

  constructor(parent, key, make) {
    this.#parent = parent;
    this.#key = key;
    this.#make = make;
  }

  show(items) {
    const wanted = new Map(items.map((item) => [this.#key(item), item]));
    for (const [key, part] of this.#parts) {
      if (!wanted.has(key)) {
        part.element.remove();
        this.#parts.delete(key);
      }
    }
    let place = this.#parent.firstElementChild;
    for (const [key, item] of wanted) {
      if (!this.#parts.has(key)) this.#parts.set(key, this.#make(item));
      const part = this.#parts.get(key);
      part.update(item);
      if (part.element === place) place = place.nextElementSibling;
      else this.#parent.insertBefore(part.element, place);
    }
  }
}

let ids = 0;

/** An id that no other element of the page has. */
export function freshId(stem) {
  ids += 1;
  return `${stem}-${ids}`;
}
