// Server-sent events, and whether we are connected. A browser opens at most six connections to one server over HTTP/1.1,
// so a page that nobody looks at lets go of its streams, and takes them up again when it is looked at.

import { answers, get } from "./api.js";

const HIDDEN_FOR = 30_000; // milliseconds without a look until the streams are closed
const SILENT_FOR = 20_000; // milliseconds without a message after which we ask whether the service is there
const BROWSER_WAIT = 3000; // milliseconds until a browser tries again by itself, about
const FIRST_WAIT = 500; // milliseconds before the first new try of ours; doubled up to
const LONGEST_WAIT = 15_000;

const streams = new Set();
const listeners = new Set();

/** Call `listener` with {connected, since, retryAt} whenever it changes; `since` is when the connection was lost. */
export function onConnection(listener) {
  listeners.add(listener);
  listener(connection());
}

function connection() {
  const lost = [...streams].filter((stream) => stream.lostAt !== null);
  return {
    watching: streams.size > 0,
    connected: lost.length === 0,
    since: lost.length ? Math.min(...lost.map((stream) => stream.lostAt)) : null,
    retryAt: lost.length ? Math.min(...lost.map((stream) => stream.retryAt ?? Infinity)) : null,
  };
}

function changed() {
  const now = connection();
  for (const listener of listeners) listener(now);
}

/** A stream that stays: it connects again when it was lost. */
export class Stream {
  #path; #names; #take; #back; #source = null; #timer = 0; #watch = 0; #wait = FIRST_WAIT; #heard = 0; #closed = false;
  lostAt = null;
  retryAt = null;

  /** `path()` is where it is; `take(name, data)` gets each event of these names; `back()` is called when a lost connection is there again:
   *  what the page shows may have missed something. */
  constructor(path, names, take, back = () => {}) {
    this.#path = path;
    this.#names = names;
    this.#take = take;
    this.#back = back;
    streams.add(this);
    this.#open();
    this.#watch = setInterval(() => this.#listen(), 5000);
    changed();
  }

  close() {
    if (this.#closed) return;
    this.#closed = true;
    this.#drop();
    clearInterval(this.#watch);
    streams.delete(this);
    changed();
  }

  /** Let go for a while, without being lost. */
  sleep() {
    this.#drop();
  }

  wake() {
    if (!this.#closed && this.#source === null) {
      this.#open();
      this.#back();
    }
  }

  /** Try now instead of later. */
  retry() {
    if (this.lostAt !== null) this.#open();
  }

  #drop() {
    clearTimeout(this.#timer);
    this.#source?.close();
    this.#source = null;
  }

  #open() {
    this.#drop();
    const source = new EventSource(this.#path());
    this.#source = source;
    this.#heard = Date.now();
    source.onopen = () => {
      this.#heard = Date.now();
      this.#wait = FIRST_WAIT;
      if (this.lostAt !== null) {
        this.lostAt = this.retryAt = null;
        changed();
        this.#back();
      }
    };
    source.onerror = () => this.#lost(source.readyState === EventSource.CONNECTING);
    for (const name of ["message", ...this.#names]) {
      source.addEventListener(name, (event) => {
        this.#heard = Date.now();
        let data;
        try {
          data = JSON.parse(event.data);
        } catch {
          return;
        }
        this.#take(name, data);
      });
    }
  }

  /** `browser`: it tries again by itself, and says with Last-Event-ID where it was. It does not after a refusal. */
  #lost(browser) {
    this.lostAt ??= Date.now();
    if (browser) {
      this.retryAt = Date.now() + BROWSER_WAIT;
    } else {
      this.#drop();
      this.retryAt = Date.now() + this.#wait;
      this.#timer = setTimeout(() => this.#open(), this.#wait);
      this.#wait = Math.min(this.#wait * 2, LONGEST_WAIT);
      get("/v1/me").catch(() => {}); // an event source does not say why; when the session has ended, this does
    }
    changed();
  }

  /** A connection can die without a word: when it is silent for long, ask. */
  async #listen() {
    if (this.#source === null || this.lostAt !== null || Date.now() - this.#heard < SILENT_FOR) return;
    this.#heard = Date.now();
    const source = this.#source;
    if (!(await answers()) && this.#source === source) this.#lost(false);
  }
}

/** Forget all connections: the session has ended. */
export function closeStreams() {
  for (const stream of [...streams]) stream.close();
}

/** Try all lost connections now. */
export function retryNow() {
  for (const stream of streams) stream.retry();
}

let sleeping = 0;
document.addEventListener("visibilitychange", () => {
  clearTimeout(sleeping);
  if (document.hidden) sleeping = setTimeout(() => streams.forEach((stream) => stream.sleep()), HIDDEN_FOR);
  else streams.forEach((stream) => stream.wake());
});
addEventListener("online", retryNow);
