"""A real browser for the tests: the Chromium of the distribution, and what has to hold on every page."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import BrowserContext, ConsoleMessage, Page, Request

NAMES = ("chromium", "chromium-browser", "google-chrome")
NO_BROWSER = "ASYNCFLOW_NO_BROWSER"
AXE = Path(__file__).parent / "vendor" / "axe-core" / "axe.min.js"


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


SEEN = """([selector, text]) => {
    window.seen = new Promise((resolve) => {
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
    page.evaluate(SEEN, [selector, text])


def seen_at(page: Page) -> float:
    """Seconds since the epoch."""
    return float(page.evaluate("window.seen"))
