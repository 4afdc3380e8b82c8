// The colours of the style sheet, for what is drawn on a canvas.

const NAMES = ["paper", "ink", "soft", "faint", "rule", "wash", "accent", "accent-2", "accent-3", "warn", "warn-fill", "bad"];
const dark = matchMedia("(prefers-color-scheme: dark)");
const listeners = new Set();
let known = null;

/** Name of a colour → its value, of the scheme that is on. */
export function colours() {
  if (known === null) {
    const style = getComputedStyle(document.documentElement);
    known = Object.fromEntries(NAMES.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  }
  return known;
}

/** Call `listener` when the scheme changes; what comes back ends that. */
export function onTheme(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

dark.addEventListener("change", () => {
  known = null;
  for (const listener of listeners) listener();
});

const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

/** A colour between two of `#rrggbb`, at `share` of the way. */
export function between(from, to, share) {
  const [a, b] = [channels(from), channels(to)];
  return `rgb(${a.map((value, index) => Math.round(value + (b[index] - value) * share)).join(" ")})`;
}
