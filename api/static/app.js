// The frame: session, connection, and which page is shown. The address is `#/`, `#/submit`,
// `#/tokens` or `#/jobs/<id>/<tab>`.

import { abandon, get, onLoggedOut, post } from "./api.js";
import { h, replace, setText } from "./dom.js";
import { clock } from "./format.js";
import { closeStreams, onConnection, retryNow } from "./live.js";
import { Fleet } from "./pages/fleet.js";
import { Job } from "./pages/job.js";
import { Login } from "./pages/login.js";
import { Submit } from "./pages/submit.js";
import { Tokens } from "./pages/tokens.js";

const ANNOUNCE_EVERY = 8000; // milliseconds between two sentences to a screen reader

const main = document.getElementById("main");
const top = document.getElementById("top");
const connection = document.getElementById("connection");

const app = {
  me: null,
  title(text) {
    document.title = text ? `${text} · AsyncFlow` : "AsyncFlow";
  },
  /** Say something to who does not see the page: the newest sentence, not too often. */
  announce(text) {
    announcement = text;
    if (!announcing) say();
  },
  /** Whether the session may do this. */
  may(scope) {
    const order = ["read", "submit", "admin"];
    const scopes = this.me?.scopes ?? [this.me?.scope ?? "admin"];
    return scopes.some((own) => order.indexOf(own) >= order.indexOf(scope));
  },
};

let announcement = null;
let announcing = 0;
function say() {
  announcing = 0;
  if (announcement === null) return;
  setText(document.getElementById("announcer"), announcement);
  announcement = null;
  announcing = setTimeout(say, ANNOUNCE_EVERY);
}

let page = null;
let pageKey = null;
let place = null; // page and tab: who goes to another one is taken to its beginning

function parse(hash) {
  const [path, search = ""] = hash.replace(/^#\/?/, "").split("?");
  const parts = path.split("/").filter(Boolean).map((part) => {
    try {
      return decodeURIComponent(part);
    } catch {
      return part;
    }
  });
  return { parts, search: new URLSearchParams(search) };
}

function route({ focus }) {
  if (!app.me) return;
  const { parts, search } = parse(location.hash);
  const [name, id, ...rest] = parts;
  const key = name === "jobs" && id ? `jobs/${id}` : name === "submit" ? `submit?${search}` : name === "tokens" ? "tokens" : "";
  if (page === null || key !== pageKey) {
    page?.close();
    pageKey = key;
    page = key === "" ? new Fleet(app) : name === "submit" ? new Submit(app, search) : name === "tokens" ? new Tokens(app) : new Job(app, id);
    replace(main, page.element);
    scrollTo(0, 0);
  }
  page.go?.(rest, search);
  for (const link of top.querySelectorAll("[data-page]")) {
    const current = link.dataset.page === (key === "" ? "fleet" : name);
    if (current) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const now = `${key}/${rest[0] ?? ""}`;
  if (focus && now !== place) main.focus({ preventScroll: true });
  place = now;
}

// The cookie cannot be read from here: this says whether it is worth asking who we are.
const SESSION = "asyncflow-session";

function showLogin(reason = "") {
  if (page instanceof Login) return;
  closeStreams();
  page?.close();
  app.me = null;
  localStorage.removeItem(SESSION);
  pageKey = null;
  top.hidden = true;
  page = new Login(app, reason, enter);
  replace(main, page.element);
  page.focus();
}

async function enter() {
  app.me = await get("/v1/me");
  localStorage.setItem(SESSION, "there");
  top.hidden = false;
  document.getElementById("tokens-link").hidden = !app.may("admin");
  page?.close();
  page = null;
  route({ focus: true });
}

onLoggedOut(() => app.me && showLogin("The session has ended. Log in again."));

document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the part after # is the address of the page
  main.focus();
});

document.getElementById("logout").addEventListener("click", async () => {
  // Nothing may be asked of the service by the page after the session has ended.
  closeStreams();
  page?.close();
  abandon();
  await post("/v1/logout").catch(() => {});
  showLogin();
});

addEventListener("hashchange", () => route({ focus: true }));

const again = h("button", { type: "button", class: "quiet small", on: { click: retryNow } }, "Try now");
onConnection(({ watching, connected, since }) => {
  connection.className = `connection ${watching ? (connected ? "on" : "off") : ""}`;
  if (!watching) replace(connection);
  else if (connected) replace(connection, "Live");
  else replace(connection, h("span", {}, `Not connected since ${clock(since / 1000)}. What you see may be old.`), again);
  document.body.classList.toggle("stale", watching && !connected);
});

if (localStorage.getItem(SESSION) === null) {
  showLogin();
} else {
  try {
    await enter();
  } catch (error) {
    showLogin(error.status === 401 ? "" : error.message);
  }
}
