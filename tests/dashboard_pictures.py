"""Pictures of the dashboard for the documentation, from the run that `dashboard_backend` serves.

python -m tests.dashboard_pictures docs      # needs a Chromium on the path
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from tests.browser import DESKTOP, PHONE, Scheme, Service, arguments, find_chromium, go_to, log_in, open_job
from tests.dashboard_backend import Backend, serving

PICTURES: tuple[tuple[str, str, tuple[int, int], Scheme], ...] = (
    ("fleet", "fleet", DESKTOP, "light"),
    ("job", "job", DESKTOP, "light"),
    ("dark", "job", DESKTOP, "dark"),
    ("phone", "job", PHONE, "dark"),
    ("sample", "sample", DESKTOP, "light"),
    ("sample-phone", "sample", PHONE, "light"),
    ("submit", "submit", DESKTOP, "light"),
    ("events", "events", DESKTOP, "dark"),
)
"""File, place, size, colours."""
TALL = ("job",)
"""Taken whole, not only what the window shows."""


def main(folder: Path) -> None:
    with serving(Backend()) as url, sync_playwright() as playwright:
        service = Service(url=url, token="admin-token", job_id="job_0001", read_token="read-token")
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=arguments())
        for name, place, size, scheme in PICTURES:
            context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
            page = context.new_page()
            page.goto(url)
            log_in(page, service.token)
            go_to(page, place, service)
            if name in TALL:
                everything_drawn(page, service)
            path = folder / f"dashboard-{name}.png"
            page.screenshot(path=path, full_page=name in TALL)
            with Image.open(path) as picture:  # a page has few colours: a third of the bytes, and nobody sees it
                picture.convert("RGB").quantize(
                    128 if name in TALL else 256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
                ).save(path, optimize=True)
            context.close()
        browser.close()


def everything_drawn(page: Page, service: Service) -> None:
    """What is below the window is asked for when it is looked at."""
    open_job(page, service.job_id)
    page.locator(".timeline").scroll_into_view_if_needed()
    page.locator(".timeline .says", has_text="Busy in the last").wait_for()
    page.evaluate("() => scrollTo(0, 0)")
    page.wait_for_function("() => [...document.querySelectorAll('canvas')].every((canvas) => canvas.width > 0)")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
