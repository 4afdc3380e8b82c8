"""The dashboard in a real browser on the real service, with jobs that really run: it shows the truth of the ledger."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from playwright.sync_api import Browser, Page, expect

from asyncflow.report.audit import Audit, audit
from tests.browser import Opens, Watch, chromium, log_in, open_job, show, violations, visiting
from tests.processes import DEADLINE, wait_until
from tests.running_service import ENDED, RunningService, tiny
from tests.test_follow import SLOWED

pytestmark = pytest.mark.timeout(900)  # each wait has its own deadline, and there are several

LONG = int(DEADLINE * 1000)
"""Milliseconds for what needs a job to start or to end."""
STEPS = 100_000
"""More than anybody waits for."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    home = tmp_path_factory.mktemp("service") / "home"
    service = RunningService(home, "--slots", "1", "--allow-import", "tests.slow_parts")
    yield service
    service.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium(deadline=LONG) as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, service: RunningService) -> Iterator[Page]:
    """Logged in. What runs at the end is cancelled, so that the next one finds its slot."""
    try:
        with visiting(browser, Watch(origin=service.address["url"]), deadline=LONG) as visit:
            yield enter(visit, service)
    finally:
        for job in service.http.get("/v1/jobs").json()["data"]:
            if job["state"] not in ENDED:
                service.http.post(f"/v1/jobs/{job['id']}/cancel")


def enter(visit: Opens, service: RunningService) -> Page:
    page = visit()
    log_in(page, (service.home / "token").read_text())
    return page


def submit(page: Page, config: dict[str, Any]) -> str:
    """In the page, as a person does; the id of the job that runs."""
    show(page, "#/submit")
    page.get_by_role("textbox", name="Configuration").fill(yaml.safe_dump(config))
    page.get_by_role("button", name="Submit", exact=True).click()
    page.wait_for_url("**/#/jobs/job_*")
    expect(state(page)).to_have_text("running")
    return page.url.rpartition("/")[2]


def state(page: Page) -> Any:
    return page.locator(".job-title .state")


def end(page: Page) -> None:
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel the job").click()
    expect(state(page)).to_have_text("cancelled")


# -- reading the page --------------------------------------------------------------------------------------------------


def count(text: str) -> int:
    return int(text.replace(",", ""))


def rows(page: Page, title: str) -> list[list[str]]:
    """The table of a chart: its head, then its rows."""
    button = page.get_by_role("button", name=f"Table: {title}")
    if button.get_attribute("aria-expanded") == "false":
        button.click()
    found: list[list[str]] = page.get_by_role("region", name=f"Table: {title}").evaluate(
        "region => [...region.querySelectorAll('tr')].map((row) => [...row.cells].map((cell) => cell.textContent))"
    )
    return found


def account(page: Page) -> dict[str, int]:
    """What became of all samples: `admitted`, `trained`, … `open`, and the open ones by state."""
    terms = page.locator(".account > div").evaluate_all(
        "all => all.map((term) => [term.querySelector('dt').lastChild.textContent, ...term.querySelectorAll('dd *')]"
        ".map((part) => part.textContent ?? part))"
    )
    counts = {name: count(amount) for name, amount, _ in terms}
    dropped = dict(reversed(part.split(" ", 1)) for part in terms[2][2].split(", ") if part)
    states = dict(reversed(part.split(" ", 1)) for part in terms[4][2].split(", ") if part)
    counts |= {f"dropped: {reason}": count(amount) for reason, amount in dropped.items()}
    return counts | {"open, by state": sum(map(count, states.values()))}


def at_training(page: Page) -> dict[int, int]:
    """Staleness → trained samples."""
    _, *levels = rows(page, "In flight, in the queue, at training")
    return {int(level): count(trained) for level, _, _, trained in levels if count(trained)}


def by_step(page: Page) -> list[tuple[int, int, float, int]]:
    """Step, how many it trained, their staleness on average and at most: of the steps in the heat map's table."""
    _, *steps = rows(page, "Staleness of what each step trained")
    found = []
    for step, _bound, *samples in steps:
        histogram = {level: count(text) for level, text in enumerate(samples) if count(text)}
        trained = sum(histogram.values())
        mean = sum(level * many for level, many in histogram.items()) / trained if trained else 0.0
        found.append((count(step), trained, round(mean, 6), max(histogram, default=0)))
    return found


def shown(page: Page) -> dict[str, Any]:
    bound = page.locator(".histograms .says").inner_text().rpartition("The bound is ")[2].rstrip(".")
    return {
        "account": account(page),
        "at training": at_training(page),
        "bound": int(bound),
        "steps": by_step(page),
    }


def told(books: Audit, steps: int) -> dict[str, Any]:
    """The same from `asyncflow audit`, which reads the ledger and nothing else; so many of the last steps."""
    counts = {
        "admitted": books.admitted,
        "trained": books.trained,
        "dropped": sum(books.dropped.values()),
        "quarantined": books.quarantined,
        "open": books.open,
        "open, by state": books.open,
    }
    made = [
        (step.version.n, step.trained, round(step.staleness_mean, 6), step.staleness_max if step.trained else 0)
        for step in books.steps
    ]
    return {
        "account": counts | {f"dropped: {why.replace('_', ' ')}": many for why, many in books.dropped.items()},
        "at training": dict(books.staleness),
        "bound": books.terms.max_staleness,
        "steps": made[-steps:],
    }


def agrees(page: Page, run_dir: Path) -> None:
    """The page comes to show what the audit of the run says, which nothing changes meanwhile."""
    before = audit(run_dir)
    assert before.ok, before.violations
    seen: dict[str, Any] = {}

    def same() -> bool:
        seen.update(shown(page))
        return seen == told(before, len(seen["steps"])) and len(seen["steps"]) > 0

    try:
        wait_until(same, within=DEADLINE / 3)
    except AssertionError:
        assert seen == told(before, len(seen["steps"]))
        raise
    assert audit(run_dir).events == before.events, "the run has gone on meanwhile"


# -- the tests ---------------------------------------------------------------------------------------------------------


def test_a_job_is_submitted_watched_steered_and_ended_and_the_page_shows_what_the_ledger_says(
    page: Page, service: RunningService
) -> None:
    config = tiny(
        name="by-hand",
        steps=STEPS,
        truncated="mask",
        weights={"update": "in_flight"},
        rollout={"engine": "tests.slow_parts:SlowRollout", "max_concurrency": 16},
    )

    job_id = submit(page, config)
    run_dir = service.home / "jobs" / job_id / "run"

    # It is live: charts grow without a touch, and the stage that was slowed is named.
    reward = page.locator(".charts figure").first.locator(".says")
    expect(reward).to_contain_text("points")
    first = reward.inner_text()
    expect(reward).not_to_have_text(first)
    expect(page.locator(".node.bottleneck .name")).to_have_text("rollout")
    expect(page.locator(".bottleneck").first).to_contain_text("rollout")
    assert violations(page) == []

    # A sample that the loss has not seen: its text, and each token with its version.
    masked = masked_sample(service, job_id)
    show(page, f"#/jobs/{job_id}/samples/{masked['id']}")
    article = page.locator("article.sample")
    expect(article.locator(".token")).to_have_count(len(masked["tokens"]))
    expect(article.locator(".token.masked")).to_have_count(sum(token["masked"] for token in masked["tokens"]))
    assert article.locator(".token").all_inner_texts() == [token["text"] for token in masked["tokens"]]
    for version in masked["versions"]:
        expect(article.locator(".legend")).to_contain_text(f"version {version}:")
    assert violations(page) == []

    # Another bound is the ledger's.
    open_job(page, job_id)
    page.get_by_label("max_staleness").fill("2")
    page.get_by_role("button", name="Apply").click()
    expect(page.locator(".histograms .says")).to_contain_text("The bound is 2.")
    assert audit(run_dir).terms.max_staleness == 2

    # While it rests, page and ledger say the same; and when it is over.
    page.get_by_role("button", name="Pause").click()
    expect(state(page)).to_have_text("paused")
    agrees(page, run_dir)
    page.get_by_role("button", name="Resume").click()
    expect(state(page)).to_have_text("running")
    end(page)
    agrees(page, run_dir)
    assert violations(page) == []


def masked_sample(service: RunningService, job_id: str) -> dict[str, Any]:
    """One that was cut off and therefore left out of the loss, once there is one."""
    found: dict[str, Any] = {}

    def there() -> bool:
        query = {"state": "trained", "limit": "20"}
        for sample in service.http.get(f"/v1/jobs/{job_id}/samples", params=query).json()["data"]:
            found.update(service.http.get(f"/v1/jobs/{job_id}/samples/{sample['id']}").json())
            if found["finish_reason"] == "length":
                return True
        return False

    wait_until(there, service.process)
    assert all(token["masked"] for token in found["tokens"])
    return found


NAMED = {
    "rollout": "Generation is the bottleneck",
    "reward": "for the reward stage",
    "reference": "for the reference stage",
    "actor_update": "The learner is the bottleneck",
    "weights": "for the weight update",
}
"""Stage that was slowed → what the page has to say."""


@pytest.mark.long
@pytest.mark.parametrize("stage", SLOWED)
def test_the_stage_that_was_slowed_is_named_on_the_page(page: Page, service: RunningService, stage: str) -> None:
    config = tiny(name=f"slow-{stage}", steps=STEPS)
    for setting in SLOWED[stage]:
        name, _, value = setting.partition("=")
        section, _, key = name.partition(".")
        config |= {section: config.get(section, {}) | {key: value}} if key else {name: yaml.safe_load(value)}

    submit(page, config)

    expect(page.locator(".bottleneck").first).to_contain_text(NAMED[stage])
    if stage != "weights":  # which is no stage of the samples' way
        expect(page.locator(".node.bottleneck .name")).to_have_text(stage)
    end(page)
