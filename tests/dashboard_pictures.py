"""Pictures of the dashboard for the documentation, of a real run on the real service.

    python -m tests.dashboard_pictures docs                            # configs/quickstart.yaml on vLLM: ten minutes
    python -m tests.dashboard_pictures /tmp/look --config configs/tiny.yaml
    python -m tests.dashboard_pictures /tmp/look --home my-service     # of the job that runs there

Needs a Chromium on the path.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml
from PIL import Image
from playwright.sync_api import Page, expect

from tests.browser import DESKTOP, PHONE, Scheme, Service, chromium, go_to, log_in, open_job
from tests.conftest import ROOT
from tests.processes import wait_until
from tests.running_service import RunningService, tiny

PICTURES: tuple[tuple[str, str, tuple[int, int], Scheme], ...] = (
    ("fleet", "fleet", DESKTOP, "light"),
    ("job", "job", DESKTOP, "light"),
    ("dark", "job", DESKTOP, "dark"),
    ("phone", "job", PHONE, "dark"),
    ("sample", "sample", DESKTOP, "light"),
    ("sample-phone", "sample", PHONE, "light"),
    ("submit", "submit", DESKTOP, "light"),
    ("events", "events", DESKTOP, "dark"),
    ("tokens", "tokens", DESKTOP, "light"),
)
"""File, place, size, colours."""
TALL = ("job",)
"""Taken whole, not only what the window shows."""
PATIENCE = 3600.0
"""Seconds until the run has made its steps: it trains a language model on whatever else there is to do."""

LATEST = 300_000
"""Milliseconds for what has to appear: the run needs the processors as well."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--step", type=int, default=20, help="that the run must have made")
    parser.add_argument("--home", type=Path, help="of a service that runs, with one job that does")
    given = parser.parse_args()
    with attached(given.home) if given.home else started(given.config) as service:
        with service.api() as api:
            wait_until(lambda: step_of(api, service.job_id) >= given.step, within=PATIENCE)
        take(given.folder, service)


@contextlib.contextmanager
def started(config: Path) -> Iterator[Service]:
    """A service with one job that has ended, one that was cancelled, one that runs, and one that waits."""
    values: dict[str, Any] = yaml.safe_load(config.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        running = RunningService(Path(folder) / "home")
        try:
            running.wait(running.submit(tiny(name="first-try"), labels={"team": "maths"}), "succeeded")
            running.http.post(f"/v1/jobs/{running.submit(tiny(name='second-try'))}/cancel")
            # Steps enough that it still runs when the last picture is taken.
            job_id = running.submit(values | {"steps": 10 * values["steps"]}, labels={"team": "maths", "try": "2"})
            running.submit(tiny(name="nightly"), priority=80)
            running.http.post("/v1/tokens", json={"name": "notebook", "scope": "read", "expires_in": 30 * 86400})
            url, token = running.address["url"], (running.home / "token").read_text()
            yield Service(url=url, token=token, job_id=job_id)
        finally:
            running.close()


@contextlib.contextmanager
def attached(home: Path) -> Iterator[Service]:
    url, token = json.loads((home / "service.json").read_text())["url"], (home / "token").read_text()
    service = Service(url=url, token=token, job_id="")
    with service.api() as api:
        (job,) = api.get("/v1/jobs", params={"state": "running"}).json()["data"]
    yield Service(url=url, token=token, job_id=job["id"])


def step_of(api: httpx.Client, job_id: str) -> int:
    job = api.get(f"/v1/jobs/{job_id}").json()
    assert job["state"] in ("validating", "queued", "starting", "running"), job["reason"]
    return int(job["progress"]["step"]) if job["progress"] else 0


def take(folder: Path, service: Service) -> None:
    with chromium(deadline=LATEST) as browser:
        for name, place, size, scheme in PICTURES:
            context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
            context.set_default_timeout(LATEST)
            page = context.new_page()
            page.goto(service.url)
            log_in(page, service.token)
            go_to(page, place, service)
            if place == "job":
                everything_drawn(page, service)
            page.mouse.move(0, 0)
            path = folder / f"dashboard-{name}.png"
            page.screenshot(path=path, full_page=name in TALL)
            with Image.open(path) as picture:  # a page has few colours: a third of the bytes, and nobody sees it
                small = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
                small.save(path, optimize=True)
            context.close()


def everything_drawn(page: Page, service: Service) -> None:
    """What is below the window is asked for when it is looked at."""
    open_job(page, service.job_id)
    page.get_by_role("region", name="Weight updates").locator("tbody tr").first.wait_for()
    page.locator(".timeline").scroll_into_view_if_needed()
    expect(page.locator(".timeline .says")).to_contain_text("Busy in the last")
    page.evaluate("() => scrollTo(0, 0)")
    page.wait_for_function("() => [...document.querySelectorAll('canvas')].every((canvas) => canvas.width > 0)")


if __name__ == "__main__":
    main()
