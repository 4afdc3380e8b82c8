// Numbers, times and foreign text, as they are shown.

const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

export const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** Three significant digits; a dash for what is not there. */
export function number(value) {
  if (!isNumber(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  if (size < 0.001) return value.toExponential(1).replace("e-", "e−").replace(/^-/, "−");
  return String(Number(value.toPrecision(3))).replace(/^-/, "−");
}

/** As many digits, up to six, as tell these two apart; never fewer than three. */
export function telling(low, high) {
  if (!isNumber(low) || !isNumber(high) || low === high) return number;
  const digits = Math.ceil(Math.log10(Math.max(Math.abs(low), Math.abs(high)) / (high - low))) + 2;
  if (digits <= 3) return number;
  return (value) => (isNumber(value) ? String(Number(value.toPrecision(Math.min(6, digits)))).replace(/^-/, "−") : "–");
}

export const many = (count) => (isNumber(count) ? count.toLocaleString("en-US") : "–");

/** 1 sample, 2 samples. */
export const plural = (count, one, more = `${one}s`) => `${many(count)} ${count === 1 ? one : more}`;

export const percent = (share) => (isNumber(share) ? `${Math.round(share * 100)}%` : "–");

/** Seconds in the units in which a person would say them. */
export function duration(seconds) {
  if (!isNumber(seconds)) return "–";
  if (seconds < 0) return "0 s";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const whole = Math.round(seconds);
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${String(whole % 60).padStart(2, "0")} s`;
  const minutes = Math.round(whole / 60);
  if (minutes < 1440) return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
  const hours = Math.round(minutes / 60);
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

export function bytes(count) {
  if (!isNumber(count)) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let place = 0;
  let value = count;
  while (value >= 1000 && place < units.length - 1) {
    value /= 1000;
    place += 1;
  }
  return `${number(value)} ${units[place]}`;
}

/** Seconds since the epoch of an RFC 3339 time or of a number that is that already; null when it is neither. */
export function epoch(time) {
  if (isNumber(time)) return time;
  const parsed = typeof time === "string" ? Date.parse(time) : NaN;
  return Number.isNaN(parsed) ? null : parsed / 1000;
}

/** Time of day, with the date when it is not today's, in the reader's zone. */
export function clock(time, { seconds = true } = {}) {
  const at = epoch(time);
  if (at === null) return "–";
  const date = new Date(at * 1000);
  const two = (value) => String(value).padStart(2, "0");
  const day = date.toDateString() === new Date().toDateString() ? "" : `${date.getDate()} ${MONTHS[date.getMonth()]} `;
  return `${day}${two(date.getHours())}:${two(date.getMinutes())}${seconds ? `:${two(date.getSeconds())}` : ""}`;
}

/** How long ago a time is. */
export function ago(time) {
  const at = epoch(time);
  if (at === null) return "–";
  const seconds = Date.now() / 1000 - at;
  return seconds < 5 ? "just now" : `${duration(Math.round(seconds))} ago`;
}

/** The n of a policy version `incarnation.n`; null when there is none. */
export function versionNumber(version) {
  const found = /^\d+\.(\d+)$/.exec(version ?? "");
  return found ? Number(found[1]) : null;
}

/** Order of two versions: by publication, then by incarnation. */
export function compareVersions(a, b) {
  const [left, right] = [a, b].map((version) => String(version).split(".").map(Number));
  return left[1] - right[1] || left[0] - right[0];
}

const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\uffff]/g;

/** Text of a model with what cannot be seen, or would turn what stands around it, written out: U+202E. */
export function visible(text) {
  return String(text ?? "").replace(HIDDEN, (found) => `⟨U+${found.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}
