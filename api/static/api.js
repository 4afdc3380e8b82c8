// Requests to the service, with the cookie of the session. What the service refuses is thrown as a Refused, in its words.

/** An answer that is not a success: problem+json, or a sentence about why there is no answer. */
export class Refused extends Error {
  constructor({ status = 0, title = "", detail = "", code = "", field = null, errors = [], retryAfter = null }) {
    super(detail || title || `The service answered with status ${status}.`);
    Object.assign(this, { status, title, code, field, errors: errors ?? [], retryAfter });
  }
}

const DEADLINE = 30_000; // milliseconds

let whenLoggedOut = () => {};
let asked = new AbortController();

/** Whom to call when the session has ended. */
export function onLoggedOut(listener) {
  whenLoggedOut = listener;
}

/** Nobody waits any more for what has been asked. */
export function abandon() {
  asked.abort();
  asked = new AbortController();
}

async function send(method, path, { body, headers = {}, as = "json", deadline = DEADLINE } = {}) {
  const options = {
    method,
    headers: { Accept: as === "json" ? "application/json" : "text/plain", ...headers },
    credentials: "same-origin",
    signal: AbortSignal.any([asked.signal, AbortSignal.timeout(deadline)]),
  };
  if (method !== "GET") options.headers["X-CSRF"] = "1";
  if (body !== undefined) {
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let answer;
  let content;
  try {
    answer = await fetch(path, options);
    content = await answer.text();
  } catch (error) {
    const late = error.name === "TimeoutError";
    throw new Refused({ detail: late ? "The service did not answer in time." : "The service cannot be reached." });
  }
  if (!answer.ok) throw refusal(answer, content, path);
  if (as === "text") return content;
  return content ? JSON.parse(content) : null;
}

function refusal(answer, content, path) {
  let problem = {};
  try {
    problem = JSON.parse(content) ?? {};
  } catch {
    problem = { detail: content.slice(0, 500) };
  }
  if (answer.status === 401 && path !== "/v1/login") whenLoggedOut();
  return new Refused({ ...problem, status: answer.status, retryAfter: Number(answer.headers.get("Retry-After")) || null });
}

/** Path of a job or of something below it. */
export const jobPath = (id, rest = "") => `/v1/jobs/${encodeURIComponent(id)}${rest}`;

/** A query string of what is given; empty values are left out. */
export function query(values) {
  const given = Object.entries(values).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  return given.length ? `?${new URLSearchParams(given)}` : "";
}

export const get = (path) => send("GET", path);
export const getText = (path) => send("GET", path, { as: "text" });
export const post = (path, body, headers, deadline) => send("POST", path, { body, headers, deadline });
export const remove = (path, headers) => send("DELETE", path, { headers });
export const patch = (path, body, headers) => send("PATCH", path, { body, headers });

/** Whether the service answers at all, soon. */
export async function answers() {
  try {
    await send("GET", "/healthz", { deadline: 5000 });
    return true;
  } catch (error) {
    return error.status > 0;
  }
}

/** A key that no other request has. */
export function freshKey() {
  const random = crypto.getRandomValues(new Uint8Array(16));
  return [...random].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
