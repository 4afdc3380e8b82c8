"""A real browser for the tests: the Chromium of the distribution, and what has to hold on every page."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
NO_BROWSER = "ASYNCFLOW_NO_BROWSER"
AXE = Path(__file__).parent / "vendor" / "axe-core" / "axe.min.js"
DEADLINE = 60_000
"""Milliseconds for what has to appear at all."""
DESKTOP, PHONE = (1440, 900), (390, 844)

Scheme = Literal["light", "dark"]
Opens = Callable[..., Page]


def find_chromium(environment: Mapping[str, str] = os.environ) -> str:
    """Path of a Chromium; skips where the user has said that there is none, and fails where nobody has."""
    if found := next((path for name in NAMES if (path := shutil.which(name, path=environment.get("PATH")))), None):
        return found
    if environment.get(NO_BROWSER) == "1":
        pytest.skip(f"{NO_BROWSER}=1: no browser is wanted")
    pytest.fail(
        "The dashboard is tested in Chromium, and none is on the path. Install the one of the distribution "
        f"(apt-get install chromium), or leave these tests out with {NO_BROWSER}=1."
    )


def arguments() -> list[str]:
    """Chromium's sandbox does not start as root, as which containers run."""
    return ["--no-sandbox"] if os.geteuid() == 0 else []


@contextlib.contextmanager
def chromium(*, deadline: int = DEADLINE) -> Iterator[Browser]:
    """A browser in which everything has so many milliseconds to appear."""
    path = find_chromium()
    expect.set_options(timeout=deadline)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments())
        yield browser
        browser.close()


@dataclass
class Watch:
    """What a page did that no page may do."""

    origin: str
    expected: tuple[str, ...] = ()
    """Parts of console messages that belong to the test: a refusal that it provokes."""
    wrong: list[str] = field(default_factory=list)

    def over(self, context: BrowserContext) -> None:
        context.on("page", self._page)

    def _page(self, page: Page) -> None:
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.wrong.append(f"uncaught: {error}"))
        page.on("request", self._request)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not any(part in message.text for part in self.expected):
            self.wrong.append(f"console {message.type}: {message.text}")

    def _request(self, request: Request) -> None:
        address = urlsplit(request.url)
        if f"{address.scheme}://{address.netloc}" != self.origin:
            self.wrong.append(f"a request to {request.url}")


@contextlib.contextmanager
def visiting(browser: Browser, watch: Watch, *, deadline: int = DEADLINE) -> Iterator[Opens]:
    """Opens the dashboard as a new visitor; at the end, no page may have complained or asked anybody else."""
    contexts = []

    def visit(size: tuple[int, int] = DESKTOP, scheme: Scheme = "light", still: bool = False) -> Page:
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]},
            color_scheme=scheme,
            reduced_motion="reduce" if still else "no-preference",
            has_touch=size == PHONE,
        )
        contexts.append(context)
        context.set_default_timeout(deadline)
        watch.over(context)
        page = context.new_page()
        page.goto(watch.origin)
        return page

    try:
        yield visit
    finally:
        for context in contexts:
            context.close()
    assert watch.wrong == []


def violations(page: Page) -> list[str]:
    """What axe-core finds, a line each."""
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found, passed = page.evaluate(
        "async () => { const found = await axe.run(document); return [found.violations, found.passes.length] }"
    )
    assert passed > 10, "axe-core has looked at next to nothing"
    return [
        f"{rule['id']} ({rule['impact']}): {rule['help']}: {node['html'][:160]} {node['any'][:1]}"
        for rule in found
        for node in rule["nodes"]
    ]


SEEN = """([selector, text, deadline]) => {
    window.seen = new Promise((resolve, reject) => {
        setTimeout(() => reject(new Error(`${selector} never said: ${text}`)), deadline);
        const look = () => {
            const all = [...document.querySelectorAll(selector)];
            const there = all.some((element) => element.textContent.includes(text));
            if (there) resolve(Date.now() / 1000);
        };
        new MutationObserver(look).observe(document, {subtree: true, childList: true, characterData: true});
        look();
    });
}"""


def watch_for(page: Page, selector: str, text: str) -> None:
    """Note when this text comes to be in such an element; `seen_at` gives the time."""
    page.evaluate(SEEN, [selector, text, DEADLINE])


def seen_at(page: Page) -> float:
    """Seconds since the epoch."""
    return float(page.evaluate("window.seen"))


# -- going about -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Service:
    """Something that answers at `url`."""

    url: str
    token: str
    job_id: str
    """A job that runs."""
    read_token: str = ""

    def api(self) -> httpx.Client:
        """Another client than the page."""
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.token}"}, timeout=30)


def log_in(page: Page, token: str) -> None:
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("heading", name="Jobs", exact=True)).to_be_visible()


def show(page: Page, address: str) -> None:
    """Go to a page of the dashboard as a link would."""
    page.evaluate("address => { location.hash = address }", address)


def open_job(page: Page, job_id: str, tab: str = "") -> None:
    show(page, f"#/jobs/{job_id}{tab}")
    expect(page.locator("h1")).not_to_have_text("…")


PLACES = {
    "login": None,
    "fleet": "#/",
    "job": "#/jobs/{job}",
    "samples": "#/jobs/{job}/samples",
    "sample": "#/jobs/{job}/samples/{sample}",
    "events": "#/jobs/{job}/events",
    "configuration": "#/jobs/{job}/config",
    "submit": "#/submit",
    "tokens": "#/tokens",
}
READY = {
    "login": ".login input",
    "fleet": ".job",
    "job": ".charts canvas",
    "samples": ".sample-list a",
    "sample": ".token",
    "events": ".events li",
    "configuration": ".facts-list dd",
    "submit": "textarea",
    "tokens": "tbody tr",
}


def go_to(page: Page, place: str, service: Service) -> None:
    """To one of the places, with everything on it."""
    if address := PLACES[place]:
        with service.api() as api:
            samples = api.get(f"/v1/jobs/{service.job_id}/samples", params={"state": "trained", "limit": 100}).json()[
                "data"
            ]
        sample = max(samples, key=lambda item: (len(item["versions"]) > 1, item["reward"] or 0))
        show(page, address.format(job=service.job_id, sample=sample["id"]))
    page.locator(READY[place]).first.wait_for()
