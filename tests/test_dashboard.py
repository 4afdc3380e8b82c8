"""The dashboard in a real browser.

`service` is what the page talks to: an address, tokens, and a job that runs. The tests that take only this hold for any
service with the contract's routes; those that take `backend` make it do what a real one seldom does.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from asyncflow_api.routes.dashboard import STATIC, make_router
from fastapi import FastAPI
from fastapi.testclient import TestClient
from playwright.sync_api import Browser, Page, Response, Route, expect
from playwright.sync_api import Error as PlaywrightError

from tests.browser import (
    DESKTOP,
    NO_BROWSER,
    PHONE,
    PLACES,
    Opens,
    Scheme,
    Service,
    Watch,
    chromium,
    find_chromium,
    go_to,
    log_in,
    open_job,
    seen_at,
    show,
    violations,
    visiting,
    watch_for,
)
from tests.dashboard_backend import Backend, serving
from tests.dashboard_run import HOSTILE, MovingRun

pytestmark = pytest.mark.timeout(900)  # each wait has its own deadline, and there are several
REFUSED = "401 (Unauthorized)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def backend() -> Backend:
    return Backend()


@pytest.fixture
def service(backend: Backend) -> Iterator[Service]:
    with serving(backend) as url:
        yield Service(url=url, token="admin-token", job_id="job_0001", read_token="read-token")


@pytest.fixture
def watch(service: Service) -> Watch:
    return Watch(origin=service.url)


@pytest.fixture
def opens(browser: Browser, watch: Watch) -> Iterator[Opens]:
    with visiting(browser, watch) as visit:
        yield visit


@pytest.fixture
def visit(opens: Opens, service: Service) -> Opens:
    """Opens the dashboard and logs in."""

    def enter(*, token: str = service.token, **how: Any) -> Page:
        page = opens(**how)
        log_in(page, token)
        return page

    return enter


# -- the files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def files() -> TestClient:
    app = FastAPI()
    app.include_router(make_router())
    return TestClient(app)


def test_every_file_comes_with_a_policy_that_allows_nothing_from_elsewhere_and_nothing_inline(
    files: TestClient,
) -> None:
    for path in ("/", "/static/app.js", "/static/nothing.js"):
        policy = files.get(path).headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy


def test_files_are_asked_for_again_cheaply(files: TestClient) -> None:
    first = files.get("/static/app.js")
    again = files.get("/static/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static//etc/passwd",
        "/static/vendor/README.md",
        "/static/vendor",
        "/static/",
    ],
)
def test_nothing_else_is_served(files: TestClient, path: str) -> None:
    assert files.get(path).status_code == 404


def test_everything_that_the_page_loads_is_there(files: TestClient) -> None:
    pattern = re.compile(r"""(?:from\s+|import\s*\(?|href=|src=)["']([^"']+\.(?:js|mjs|css|svg))["']""")
    for name in [path for path in STATIC.rglob("*") if path.suffix in (".js", ".html") and "vendor" not in path.parts]:
        for target in pattern.findall(name.read_text(encoding="utf-8")):
            path = (
                target
                if target.startswith("/")
                else "/static/" + str((name.parent / target).resolve().relative_to(STATIC.resolve()))
            )
            assert files.get(path).status_code == 200, (name, target)


def test_our_scripts_never_turn_a_string_into_markup_or_code() -> None:
    sinks = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|\beval\(|new Function"
    )
    for path in STATIC.rglob("*.js"):
        if "vendor" not in path.parts:
            assert not sinks.search(path.read_text(encoding="utf-8")), path


def test_vendored_code_is_as_it_was_published() -> None:
    lines = (STATIC / "vendor" / "README.md").read_text(encoding="utf-8").splitlines()
    digests = {
        name: digest for digest, name in (line.split() for line in lines if re.match(r" {4}[0-9a-f]{64} ", line))
    }
    code = {
        path.relative_to(STATIC / "vendor").as_posix(): path
        for path in (STATIC / "vendor").rglob("*")
        if path.suffix in (".js", ".mjs", ".css")
    }
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in code.items()} == digests


# -- the checks themselves ---------------------------------------------------------------------------------------------


def test_a_missing_browser_is_said_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"):
        find_chromium({"PATH": str(tmp_path)})
    with pytest.raises(pytest.skip.Exception):
        find_chromium({"PATH": str(tmp_path), NO_BROWSER: "1"})


def test_what_no_page_may_do_is_seen(opens: Opens, watch: Watch) -> None:
    page = opens()
    page.get_by_label("Token").wait_for()
    page.evaluate("() => fetch('http://elsewhere.invalid/').catch(() => {})")
    page.evaluate("() => { document.querySelector('label').remove() }")
    assert any("label" in line for line in violations(page))
    assert any("elsewhere.invalid" in line for line in watch.wrong)
    watch.wrong.clear()


def test_not_even_a_script_of_this_page_can_make_markup_of_text(opens: Opens, watch: Watch) -> None:
    page = opens()
    watch.expected += ("TrustedHTML",)
    with pytest.raises(PlaywrightError, match="TrustedHTML"):
        page.evaluate("() => { document.body.innerHTML = '<b>text</b>' }")


# -- login -------------------------------------------------------------------------------------------------------------


def test_who_shows_a_wrong_token_gets_a_sentence_and_nothing_else(opens: Opens, service: Service, watch: Watch) -> None:
    watch.expected += (REFUSED,)
    page = opens()
    page.get_by_label("Token").fill("wrong")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("alert")).to_contain_text("not known")
    expect(page.get_by_role("navigation", name="Pages")).to_be_hidden()


def test_the_session_is_out_of_reach_of_scripts_and_ends_with_log_out(visit: Opens, service: Service) -> None:
    page = visit()
    assert page.evaluate("document.cookie") == ""
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_label("Token")).to_be_focused()
    page.reload()
    expect(page.get_by_label("Token")).to_be_visible()


def test_who_may_only_read_gets_no_controls(visit: Opens, service: Service) -> None:
    page = visit(token=service.read_token)
    expect(page.get_by_role("link", name="Submit a job")).to_have_count(0)
    open_job(page, service.job_id)
    expect(page.locator(".graph svg")).to_be_visible()
    expect(page.get_by_role("button", name="Pause")).to_be_hidden()
    expect(page.get_by_label("max_staleness")).to_be_hidden()


# -- what it shows -----------------------------------------------------------------------------------------------------


def test_the_fleet_shows_every_job_with_its_state(visit: Opens, service: Service) -> None:
    page = visit()
    with service.api() as api:
        jobs = api.get("/v1/jobs", params={"limit": 100}).json()["data"]
    for job in jobs:
        row = page.locator(".job").filter(has=page.get_by_role("link", name=job["name"], exact=True))
        expect(row.locator(".state")).to_have_text(job["state"])
    page.get_by_role("button", name="ended").click()
    expect(page.locator(".job")).to_have_count(
        sum(job["state"] in ("succeeded", "failed", "cancelled") for job in jobs)
    )


def test_a_change_in_the_fleet_comes_to_the_page(visit: Opens, backend: Backend) -> None:
    page = visit()
    row = page.locator(".job").filter(has_text="sums-long").locator(".state")
    expect(row).to_have_text("running")
    watch_for(page, ".job .state", "cancelling")
    backend.change("job_0002", state="cancelling")
    seen_at(page)


CHARTS = (
    "Pipeline",
    "Version watermarks",
    "Staleness of what each step trained",
    "In flight, in the queue, at training",
)


def test_a_job_names_its_bottleneck_and_draws_every_chart(visit: Opens, service: Service) -> None:
    page = visit()
    open_job(page, service.job_id)
    with service.api() as api:
        sentence = api.get(f"/v1/jobs/{service.job_id}/queue").json()["bottleneck"]["text"]
    expect(page.locator(".bottleneck").first).to_have_text(sentence)
    for title in CHARTS:
        expect(
            page.locator("figure").filter(has=page.get_by_role("heading", name=title)).locator(".says")
        ).not_to_be_empty()
    page.locator(".timeline").scroll_into_view_if_needed()
    expect(page.locator(".timeline .says")).to_contain_text("Busy in the last")
    page.wait_for_function(
        "() => [...document.querySelectorAll('canvas')].filter((canvas) => canvas.offsetParent).every(inked)" + INKED
    )
    assert page.locator(".charts figure:visible").count() >= 10


INKED = """
function inked(canvas) {
    const {width, height} = canvas;
    return width > 0 && canvas.getContext('2d').getImageData(0, 0, width, height).data.some((value) => value > 0);
}
"""


def test_the_numbers_are_those_of_the_service(visit: Opens, service: Service, backend: Backend) -> None:
    page = visit()
    paused = "job_0003"
    show(page, f"#/jobs/{paused}")
    with service.api() as api:
        queue = api.get(f"/v1/jobs/{paused}/queue").json()
    counts = queue["counts"]
    terms = [
        counts["admitted"],
        counts["trained"],
        sum(counts["dropped"].values()),
        counts["quarantined"],
        counts["open"],
    ]
    account = page.locator(".account b")
    expect(account).to_have_count(len(terms))
    assert [int(text.replace(",", "")) for text in account.all_inner_texts()] == terms

    page.get_by_role("button", name="Table: Staleness of what each step trained").click()
    cells = page.locator(".heatmap tbody tr").evaluate_all(
        "rows => rows.map((row) => [...row.cells].map((cell) => cell.textContent))"
    )
    history = queue["history"]
    assert [int(row[0]) for row in cells] == history["step"]
    assert [[int(text) for text in row[2:]] for row in cells] == [
        [histogram.get(str(level), 0) for level in range(len(cells[0]) - 2)] for histogram in history["histogram"]
    ]


def test_a_change_by_somebody_else_comes_to_the_page(visit: Opens, service: Service) -> None:
    page = visit()
    open_job(page, service.job_id)
    expect(page.locator(".graph svg")).to_be_visible()
    took = []
    with service.api() as api:
        for bound in (3, 4, 5, 3, 4):
            watch_for(page, ".histograms .says", f"The bound is {bound}.")
            began = time.time()
            assert api.patch(f"/v1/jobs/{service.job_id}", json={"max_staleness": bound}).status_code == 200
            took.append(seen_at(page) - began)
    # How long it takes is told and not asserted: it is that of the machine with whatever else runs on it.
    print(f"A change was on the page after {statistics.median(took):.3f} s, at most {max(took):.3f} s.")


def test_a_lowered_bound_does_not_make_what_was_trained_before_look_like_a_breach(
    visit: Opens, service: Service
) -> None:
    page = visit()
    open_job(page, service.job_id)
    expect(page.locator(".heatmap .says")).to_contain_text("none above the bound of 2")
    with service.api() as api:
        api.patch(f"/v1/jobs/{service.job_id}", json={"max_staleness": 0})
    expect(page.locator(".histograms .says")).to_contain_text("The bound is 0.")
    expect(page.locator(".heatmap .says")).to_contain_text("none above the bound of its time")


def test_steps_and_measurements_come_in_as_they_are_made(visit: Opens, service: Service) -> None:
    page = visit()
    open_job(page, service.job_id)
    heat, reward = page.locator(".heatmap .says"), page.locator(".charts figure").first.locator(".says")
    expect(reward).to_contain_text("points")
    before = [heat.inner_text(), reward.inner_text()]
    expect(heat).not_to_have_text(before[0])
    expect(reward).not_to_have_text(before[1])


def test_each_chart_has_its_numbers_in_a_table(visit: Opens, service: Service) -> None:
    page = visit()
    open_job(page, service.job_id)
    page.locator(".timeline").scroll_into_view_if_needed()
    expect(page.locator(".timeline .says")).to_contain_text("Busy")
    figures = page.locator("figure:visible")
    for index in range(figures.count()):
        figure = figures.nth(index)
        figure.locator(".table-button").click()
        expect(figure.locator(".table-region tbody tr").first).to_be_visible()
        expect(figure.locator(".table-button")).to_have_attribute("aria-expanded", "true")


def test_a_run_of_a_week_is_as_quick_to_open_and_as_easy_to_read_as_one_of_an_hour(
    visit: Opens, backend: Backend
) -> None:
    steps = 10_000
    week = MovingRun(tick=steps * 12 - 60, steps=steps + 500, bound=2, now=time.time())
    job_id = backend.add("a-week", "running", run=week)["id"]
    page = visit()
    answers: list[Response] = []
    page.on("response", lambda answer: answers.append(answer) if "/metrics" in answer.url else None)
    open_job(page, job_id)

    expect(page.locator(".heatmap .says")).to_contain_text("The last 500 of 9,99")
    expect(page.locator(".charts figure").first.locator(".says")).to_contain_text("points")
    assert 0 < len(answers[0].body()) < 3_000_000
    assert all(len(one["step"]) <= 1002 for one in answers[0].json()["series"].values())
    # None of the numbers has run out of its place.
    for part in (".account dd", ".stages", ".job-meter"):
        assert (
            page.locator(part).evaluate_all(
                "all => all.filter((one) => one.offsetParent && one.scrollWidth > one.clientWidth + 1).length"
            )
            == 0
        ), part
    show(page, f"#/jobs/{job_id}/events")
    expect(page.locator(".says")).to_contain_text("last 2,000 lines")
    page.get_by_label("every step").check()
    expect(page.locator(".events li")).to_have_count(300)


def test_there_is_no_box_for_alarms_where_there_is_none(visit: Opens, service: Service, watch: Watch) -> None:
    page = visit()
    watch.expected += ("net::ERR_FAILED",)
    page.route("**/v1/jobs/*/events*", lambda route: route.abort())  # nothing is known of them yet
    open_job(page, service.job_id)
    expect(page.locator(".graph svg")).to_be_visible()
    expect(page.locator(".alarms")).to_be_hidden()


def test_a_long_ledger_is_told_to_be_read_and_then_shown(visit: Opens, watch: Watch) -> None:
    watch.expected += ("409 (Conflict)",)
    page = visit()
    text, left = "the ledger of this run is long and being read, 40% so far: ask again", [3]
    problem = {"code": "run_being_read", "status": 409, "detail": text}

    def answer(route: Route) -> None:
        left[0] -= 1
        if left[0] < 0:
            route.continue_()
        else:
            route.fulfill(status=409, headers={"Content-Type": "application/problem+json"}, body=json.dumps(problem))

    page.route("**/v1/jobs/job_0006/queue", answer)
    watch_for(page, ".empty", text)
    show(page, "#/jobs/job_0006")
    seen_at(page)
    expect(page.locator(".heatmap .says")).to_contain_text("40 steps")


def test_a_connection_that_is_lost_is_said_and_comes_back(
    visit: Opens, service: Service, backend: Backend, watch: Watch
) -> None:
    page = visit()
    watch.expected += ("503 (Service Unavailable)", "EventSource", "net::ERR")
    open_job(page, service.job_id)
    expect(page.locator("#connection")).to_have_text("Live")
    backend.refuse(True)
    expect(page.locator("#connection")).to_contain_text("Not connected since")
    backend.refuse(False)
    expect(page.locator("#connection")).to_have_text("Live")
    watch_for(page, ".histograms .says", "The bound is 5.")
    backend.change(service.job_id, max_staleness=5)
    seen_at(page)


def test_a_session_that_ends_leads_to_the_login(visit: Opens, service: Service, watch: Watch) -> None:
    watch.expected += (REFUSED,)
    page = visit()
    open_job(page, service.job_id)
    page.context.clear_cookies()  # the next step is asked for without it
    expect(page.get_by_role("alert")).to_contain_text("session has ended")


# -- samples -----------------------------------------------------------------------------------------------------------


def test_a_sample_is_found_and_shows_its_tokens_versions_and_life(visit: Opens, service: Service) -> None:
    page = visit()
    with service.api() as api:
        found = api.get(f"/v1/jobs/{service.job_id}/samples", params={"state": "trained", "limit": 100}).json()["data"]
        short = next(sample for sample in found if len(sample["versions"]) > 1 and int(sample["id"]) % 5 == 0)
        sample = api.get(f"/v1/jobs/{service.job_id}/samples/{short['id']}").json()
    open_job(page, service.job_id, "/samples")
    page.get_by_label("State").select_option("trained")
    page.get_by_role("spinbutton", name="Group").fill(str(sample["group_id"]))
    link = page.locator(".sample-list a").filter(has_text=f"#{sample['id']}")
    expect(link).to_have_count(1)
    link.click()
    article = page.locator("article.sample")
    expect(article.get_by_role("heading", name=f"Sample {sample['id']}")).to_be_visible()
    expect(article.locator(".token")).to_have_count(len(sample["tokens"]))
    expect(article.locator(".token.masked")).to_have_count(sum(token["masked"] for token in sample["tokens"]))
    for version in sample["versions"]:
        expect(article.locator(".legend")).to_contain_text(f"version {version}:")
    expect(article.locator(".life li")).to_have_count(len(sample["events"]))
    article.locator(".tokens").focus()
    page.keyboard.press("End")
    expect(article.locator(".readout")).to_contain_text(f"token {len(sample['tokens'])} of {len(sample['tokens'])}")


def test_text_of_a_model_is_text_whatever_it_is(visit: Opens, service: Service) -> None:
    page = visit()
    open_job(page, service.job_id, "/samples?q=%3Cscript%3E")
    page.locator(".sample-list a").first.click()
    shown = page.locator("article.sample .tokens")
    expect(shown).to_contain_text("<script>")
    expect(shown).to_contain_text("⟨U+202E⟩")
    assert "owned" not in page.title()
    assert page.locator("article.sample img, article.sample script").count() == 0
    assert HOSTILE.startswith("<script>")


# -- controls ----------------------------------------------------------------------------------------------------------


def test_the_bound_is_changed_on_the_page(visit: Opens, service: Service) -> None:
    page = visit()
    open_job(page, service.job_id)
    bound = page.get_by_label("max_staleness")
    expect(bound).not_to_have_value("")
    expect(page.get_by_role("button", name="Apply")).to_be_disabled()
    bound.fill("4")
    page.get_by_role("button", name="Apply").click()
    expect(page.locator(".histograms .says")).to_contain_text("The bound is 4.")
    with service.api() as api:
        assert api.get(f"/v1/jobs/{service.job_id}").json()["max_staleness"] == 4


def test_a_refusal_of_the_service_is_said_in_its_words(visit: Opens, service: Service, watch: Watch) -> None:
    page = visit()
    watch.expected += ("422 (Unprocessable",)
    open_job(page, service.job_id)
    page.get_by_label("max_staleness").fill("900")
    page.get_by_role("button", name="Apply").click()
    expect(page.get_by_role("alert").filter(has_text="max_staleness cannot be 900")).to_be_visible()


def test_a_job_is_paused_and_goes_on(visit: Opens, service: Service) -> None:
    page = visit()
    open_job(page, service.job_id)
    state = page.locator(".job-title .state")
    page.get_by_role("button", name="Pause").click()
    expect(state).to_have_text("paused")
    page.get_by_role("button", name="Resume").click()
    expect(state).to_have_text("running")


def test_a_job_is_cancelled_only_after_a_question(visit: Opens, service: Service) -> None:
    page = visit()
    open_job(page, service.job_id)
    state = page.locator(".job-title .state")
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.get_by_role("button", name="Keep it running").click()
    expect(state).to_have_text("running")
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel the job").click()
    expect(state).to_have_text("cancelled")
    expect(page.get_by_role("button", name="Pause")).to_be_hidden()


def test_a_worker_is_drained(visit: Opens, service: Service) -> None:
    page = visit()
    open_job(page, service.job_id)
    page.locator(".workers").get_by_role("button", name="Drain").first.click()
    expect(page.locator(".workers").get_by_role("button", name="Undrain")).to_have_count(1)


# -- submit ------------------------------------------------------------------------------------------------------------


def test_a_configuration_is_validated_and_submitted(visit: Opens, service: Service, watch: Watch) -> None:
    page = visit()
    watch.expected += ("422 (Unprocessable",)
    page.get_by_role("link", name="Submit a job").click()
    text = page.get_by_role("textbox", name="Configuration")
    good = text.input_value()

    text.fill("model: [tiny")
    page.get_by_role("button", name="Validate").click()
    expect(page.locator(".answer")).to_contain_text("neither YAML nor JSON")

    text.fill(f"{good}\nstepz: 3\n")
    page.get_by_role("button", name="Validate").click()
    expect(page.locator(".answer .errors")).to_contain_text("stepz")
    page.locator(".answer").get_by_role("button", name="stepz").click()
    assert (
        page.evaluate(
            "() => { const a = document.activeElement; return a.value.slice(a.selectionStart, a.selectionEnd) }"
        )
        == "stepz: 3"
    )

    text.fill(good)
    page.get_by_role("button", name="Validate").click()
    expect(page.locator(".answer")).to_contain_text("It can run.")
    page.get_by_label("Name").fill("from-the-browser")
    page.get_by_role("button", name="Submit", exact=True).click()
    expect(page.locator("h1")).to_have_text("from-the-browser")
    with service.api() as api:
        assert "from-the-browser" in [job["name"] for job in api.get("/v1/jobs", params={"limit": 100}).json()["data"]]


def test_a_job_that_has_ended_is_gone_on_from(visit: Opens, service: Service) -> None:
    page = visit()
    open_job(page, "job_0006")
    page.get_by_role("link", name="Go on from this job").click()
    expect(page.locator("h1")).to_have_text("Go on from baseline")
    text = page.get_by_role("textbox", name="Configuration")
    expect(text).to_have_value("steps: 80\n")
    expect(page.get_by_role("button", name="Validate")).to_be_hidden()
    text.fill("steps: 90")
    page.get_by_label("Name").fill("baseline-2")
    page.get_by_label("Priority").fill("70")
    page.get_by_label("Labels").fill("team=maths")
    page.get_by_role("button", name="Submit", exact=True).click()
    expect(page.locator("h1")).to_have_text("baseline-2")
    with service.api() as api:
        job = api.get("/v1/jobs", params={"limit": 1}).json()["data"][0]
        config = api.get(f"/v1/jobs/{job['id']}").json()["config"]
    assert (job["name"], job["resume_from"], job["priority"]) == ("baseline-2", "job_0006", 70)
    assert (config["steps"], job["labels"]) == (90, {"team": "maths"})


def test_nobody_goes_on_from_a_job_without_a_checkpoint(visit: Opens) -> None:
    page = visit()
    for without in ("job_0007", "job_0008"):
        open_job(page, without)
        expect(page.get_by_role("button", name="Delete")).to_be_visible()
        expect(page.get_by_role("link", name="Go on from this job")).to_be_hidden()


def test_a_job_that_has_ended_is_deleted_only_after_a_question(visit: Opens, service: Service) -> None:
    page = visit()
    open_job(page, service.job_id)
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    expect(page.get_by_role("button", name="Delete")).to_be_hidden()
    open_job(page, "job_0006")
    expect(page.locator("h1")).to_have_text("baseline")
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Keep it").click()
    expect(page.locator("h1")).to_have_text("baseline")
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete the job").click()
    expect(page.get_by_role("heading", name="Jobs", exact=True)).to_be_visible()
    expect(page.locator(".job").filter(has_text="sums-grpo")).to_have_count(1)
    expect(page.locator(".job").filter(has_text="baseline")).to_have_count(0)
    with service.api() as api:
        assert api.get("/v1/jobs/job_0006").status_code == 404


def test_nothing_is_asked_about_a_job_once_it_has_been_deleted(visit: Opens, service: Service) -> None:
    page = visit()
    asked: list[Route] = []

    def leave_open(route: Route) -> None:
        asked.append(route)

    page.route("**/v1/jobs/job_0006/metrics*", leave_open)
    open_job(page, "job_0006")
    with page.expect_request_finished(lambda request: request.method == "DELETE"):
        page.get_by_role("button", name="Delete").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete the job").click()
    expect(page.get_by_role("heading", name="Jobs", exact=True)).to_be_visible()
    assert asked, "nothing was on its way while the job was deleted"
    assert {route.request.failure for route in asked} == {"net::ERR_ABORTED"}


def test_a_job_that_cannot_be_deleted_is_asked_about_again(visit: Opens, watch: Watch, backend: Backend) -> None:
    watch.expected = ("503 (Service Unavailable)",)
    page = visit()
    open_job(page, "job_0006")

    def refuse(route: Route) -> None:
        if route.request.method == "DELETE":
            backend.change("job_0006", name="another name")
            route.fulfill(status=503, json={"title": "busy", "detail": "The disk is busy. Try again."})
        else:
            route.continue_()

    page.route("**/v1/jobs/job_0006", refuse)
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete the job").click()
    expect(page.get_by_role("alert").filter(has_text="The disk is busy")).to_be_visible()
    expect(page.locator("h1")).to_have_text("another name")


def test_who_has_left_a_job_that_cannot_be_deleted_does_not_follow_it(visit: Opens, watch: Watch) -> None:
    watch.expected = ("503 (Service Unavailable)",)
    page = visit()
    open_job(page, "job_0006")
    deletions: list[Route] = []

    def hold(route: Route) -> None:
        if route.request.method == "DELETE":
            deletions.append(route)
        else:
            route.continue_()

    page.route("**/v1/jobs/job_0006", hold)
    with page.expect_request(lambda request: request.method == "DELETE"):
        page.get_by_role("button", name="Delete").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete the job").click()
    show(page, "#/")
    expect(page.get_by_role("heading", name="Jobs", exact=True)).to_be_visible()
    followed: list[str] = []
    page.on("request", lambda request: followed.append(request.url))
    with page.expect_response(lambda response: response.request.method == "DELETE"):
        deletions[0].fulfill(status=503, json={"title": "busy", "detail": "The disk is busy. Try again."})
    for _ in range(5):  # answers take their turns: one that is asked for later comes later
        page.evaluate("fetch('/v1/jobs/job_0006')")
    assert followed, "the page's requests are not seen"
    assert [url for url in followed if "job_0006/events" in url] == []


def test_name_priority_and_labels_of_a_job_are_changed(visit: Opens, service: Service) -> None:
    page = visit()
    open_job(page, "job_0005", "/config")
    expect(page.get_by_label("Priority")).to_have_value("50")
    page.get_by_label("Priority").fill("90")
    page.get_by_label("Labels").fill("team=maths, try")
    page.get_by_role("button", name="Save").click()
    expect(page.locator(".verdict")).to_have_text("The label try has no value: write key=value.")
    page.get_by_label("Labels").fill("team=maths, try=2")
    page.get_by_label("Name").fill("nightly-2")
    page.get_by_role("button", name="Save").click()
    expect(page.locator(".verdict")).to_have_text("Saved.")
    expect(page.locator("h1")).to_have_text("nightly-2")
    with service.api() as api:
        job = api.get("/v1/jobs/job_0005").json()
    assert (job["name"], job["priority"], job["labels"]) == ("nightly-2", 90, {"team": "maths", "try": "2"})


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_a_token_is_made_shown_once_and_revoked(visit: Opens, backend: Backend) -> None:
    page = visit()
    page.get_by_role("link", name="Tokens").click()
    page.get_by_label("Name").fill("ci")
    page.get_by_label("Scope").select_option("submit")
    page.get_by_label("Expires after days").fill("7")
    page.get_by_role("button", name="Make the token").click()
    expect(page.locator(".token-text")).to_have_text("af_" + "x" * 43)
    row = page.locator("tbody tr").filter(has_text="ci")
    expect(row).to_contain_text("submit")
    made = backend.tokens["tok_3"]
    assert datetime.fromisoformat(made["expires_at"]) - datetime.fromisoformat(made["created_at"]) == timedelta(days=7)
    page.reload()
    expect(row).to_have_count(1)
    expect(page.locator(".token-text")).to_have_count(0)

    page.get_by_role("button", name="Revoke ci").click()
    page.get_by_role("button", name="Keep it").click()
    expect(row).to_have_count(1)
    page.get_by_role("button", name="Revoke ci").click()
    page.get_by_role("dialog", name="Revoke the token ci?").get_by_role("button", name="Revoke the token").click()
    expect(row).to_have_count(0)
    assert [token["name"] for token in backend.tokens.values()] == ["first", "notebook"]


def test_only_who_may_make_tokens_sees_the_page_for_it(visit: Opens, service: Service) -> None:
    page = visit(token=service.read_token)
    expect(page.get_by_role("link", name="Jobs", exact=True)).to_be_visible()
    expect(page.get_by_role("link", name="Tokens")).to_be_hidden()
    show(page, "#/tokens")
    expect(page.locator(".notice")).to_contain_text("scope admin")


# -- for everybody -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_and_nothing_runs_over_the_edge(
    opens: Opens, service: Service, size: tuple[int, int], scheme: Scheme
) -> None:
    page = opens(size=size, scheme=scheme)
    for place in PLACES:
        if place == "fleet":
            log_in(page, service.token)
        go_to(page, place, service)
        assert violations(page) == [], place
        assert page.evaluate("document.scrollingElement.scrollWidth") <= size[0], place


def test_everything_can_be_done_with_the_keyboard_alone(opens: Opens, service: Service) -> None:
    page = opens()
    keys = page.keyboard

    def tab_to(role: str, name: str) -> None:
        target = page.get_by_role(role, name=name, exact=True).first  # type: ignore[arg-type]
        target.wait_for()
        for _ in range(150):
            if target.evaluate("element => element === document.activeElement"):
                assert target.evaluate("element => getComputedStyle(element).outlineStyle") != "none", (
                    "focus is not seen"
                )
                return
            keys.press("Tab")
        pytest.fail(f"Tab does not reach the {role} {name}")

    expect(page.get_by_label("Token")).to_be_focused()
    keys.type(service.token)
    keys.press("Enter")
    tab_to("link", "sums-grpo")
    keys.press("Enter")
    tab_to("spinbutton", "max_staleness")
    keys.press("ControlOrMeta+a")
    keys.type("3")
    keys.press("Enter")
    expect(page.locator(".histograms .says")).to_contain_text("The bound is 3.")
    tab_to("button", "Table: Pipeline")
    keys.press("Space")
    expect(page.locator(".pipeline .table-region tbody tr").first).to_be_visible()
    keys.press("Home")
    page.locator("#skip").focus()
    tab_to("link", "Samples")
    keys.press("Enter")
    page.locator(".sample-list a").first.wait_for()
    for _ in range(100):
        if page.evaluate("document.activeElement.matches('.sample-list a')"):
            break
        keys.press("Tab")
    keys.press("Enter")
    expect(page.locator("article.sample")).to_be_visible()
    page.locator("#skip").focus()
    tab_to("button", "Cancel")
    keys.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    keys.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.get_by_role("button", name="Cancel", exact=True)).to_be_focused()


def test_who_wants_less_motion_gets_none(visit: Opens, service: Service) -> None:
    for still, moves in ((True, False), (False, True)):
        page = visit(still=still)
        duration = page.locator(".progress i").first.evaluate("bar => getComputedStyle(bar).transitionDuration")
        assert (duration != "0s") == moves


def test_a_page_that_is_left_lets_go_of_its_streams(visit: Opens, service: Service, backend: Backend) -> None:
    page = visit()
    open_job(page, service.job_id)
    expect(page.locator("#connection")).to_have_text("Live")
    page.get_by_role("link", name="Submit", exact=True).click()
    expect(page.locator("#connection")).to_be_empty()
