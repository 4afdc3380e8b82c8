"""Jobs as a client of the service sees them: real processes with fake engines, over real HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from asyncflow_api.jobs.events import Cursor
from asyncflow_api.jobs.lifecycle import TRANSITIONS, State

from asyncflow.runtime.control import ControlClient
from tests.processes import DEADLINE, wait_until
from tests.running_service import ENDLESS, RunningService, tiny

pytestmark = pytest.mark.timeout(900)  # each wait has its own deadline, and there are several


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    service = RunningService(tmp_path_factory.mktemp("service") / "home", "--slots", "2")
    yield service
    service.close()


@pytest.fixture(scope="module")
def finished(service: RunningService) -> str:
    """A job that went through."""
    job_id = service.submit(tiny(), name="first", labels={"team": "a"})
    service.wait(job_id, "succeeded")
    return job_id


def events(service: RunningService, job_id: str, **query: str) -> list[dict[str, Any]]:
    """All of them, page by page."""
    found: list[dict[str, Any]] = []
    cursor = None
    while True:
        parameters = {"limit": "7", **query} | ({"cursor": cursor} if cursor else {})
        page = service.http.get(f"/v1/jobs/{job_id}/events", params=parameters).json()
        found += page["data"]
        if not page["has_more"]:
            return found
        cursor = page["next_cursor"]


def stream(service: RunningService, path: str, *, after: str | None = None, most: int = 10_000) -> list[dict[str, str]]:
    """What a stream says until it ends with `end`, or has said so much."""
    headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": after} if after else {})
    found: list[dict[str, str]] = []
    with service.http.stream("GET", path, headers=headers, timeout=DEADLINE) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        event: dict[str, str] = {}
        for line in answer.iter_lines():
            name, _, value = line.partition(": ")
            if line and name:
                event[name] = value
            elif not line and "event" in event:
                found.append(event)
                if event["event"] == "end" or len(found) == most:
                    break
                event = {}
    return found


def test_a_job_goes_from_submission_to_its_end(service: RunningService, finished: str) -> None:
    job = service.job(finished)

    assert job["name"] == "first"
    assert (job["starts"], service.starts(finished)) == (1, 1)
    assert job["reason"] is None
    assert job["progress"]["step"] == job["progress"]["steps"] == 2
    assert job["summary"]["outcome"] == "finished"
    assert job["config"]["checkpoint"]["every"] == 20  # what the plan derived
    assert job["created_at"] < job["started_at"] < job["finished_at"]
    assert job["max_staleness"] == 1
    moves = [State(e["data"]["to"]) for e in events(service, finished) if e["type"] == "state"]
    assert moves == [State.validating, State.queued, State.starting, State.running, State.succeeded]
    assert all(pair in TRANSITIONS for pair in pairwise(moves))


def test_a_list_has_jobs_by_label_and_state_the_newest_first(service: RunningService, finished: str) -> None:
    found = service.http.get("/v1/jobs", params={"label": "team=a", "state": "succeeded"}).json()

    assert [job["id"] for job in found["data"]] == [finished]
    assert "config" not in found["data"][0]
    assert service.http.get("/v1/jobs", params={"label": "team=b"}).json()["data"] == []


def test_events_and_their_stream_tell_the_same_and_resume_anywhere(service: RunningService, finished: str) -> None:
    paged = events(service, finished)
    streamed = stream(service, f"/v1/jobs/{finished}/events")

    assert {"state", "step", "eval", "checkpoint"} <= {event["type"] for event in paged}
    assert [json.loads(event["data"]) for event in streamed[:-1]] == paged
    assert streamed[-1]["event"] == "end"
    cursors = [Cursor.parse(event["id"]) for event in paged]
    assert all(a.own <= b.own and a.lines <= b.lines and a != b for a, b in pairwise(cursors))
    for place in (0, len(paged) // 2, len(paged) - 1):
        rest = stream(service, f"/v1/jobs/{finished}/events", after=paged[place]["id"])
        assert [event.get("id") for event in rest[:-1]] == [event["id"] for event in paged[place + 1 :]]


def test_a_stream_can_begin_with_the_newest_lines_of_the_run(service: RunningService, finished: str) -> None:
    paged = events(service, finished)
    own = [event for event in paged if event["type"] in ("state", "changed")]
    lines = [event for event in paged if event not in own]

    streamed = [json.loads(one["data"]) for one in stream(service, f"/v1/jobs/{finished}/events?tail=2")[:-1]]

    assert sorted(event["message"] for event in streamed) == sorted(event["message"] for event in own + lines[-2:])
    assert [event["id"] for event in streamed if event in lines] == [event["id"] for event in lines[-2:]]
    again = stream(service, f"/v1/jobs/{finished}/events?tail=2", after=streamed[-1]["id"])
    assert [event["event"] for event in again] == ["end"]


def test_the_log_is_there_whole_in_pieces_and_as_a_stream(service: RunningService, finished: str) -> None:
    log = service.home / "jobs" / finished / "log"
    with log.open("a") as file:
        file.write("one\ntwo\nthree\n")

    whole = service.http.get(f"/v1/jobs/{finished}/logs")
    tail = service.http.get(f"/v1/jobs/{finished}/logs?tail=2")
    after = service.http.get(f"/v1/jobs/{finished}/logs?offset={whole.headers['x-next-offset']}")

    assert whole.headers["content-type"].startswith("text/plain")
    assert whole.text == log.read_text()
    assert (tail.text, after.text) == ("two\nthree\n", "")
    text = "".join(json.loads(event["data"]).get("text", "") for event in stream(service, f"/v1/jobs/{finished}/logs"))
    assert text == whole.text


def test_checkpoints_and_the_report_are_served(service: RunningService, finished: str) -> None:
    (checkpoint,) = service.http.get(f"/v1/jobs/{finished}/checkpoints").json()["data"]
    report = service.http.get(f"/v1/jobs/{finished}/report")

    assert (checkpoint["id"], checkpoint["step"], checkpoint["version"]) == ("step-000002", 2, "0.2")
    assert checkpoint["bytes"] > 1000
    assert report.text.startswith("<!doctype html>")
    assert "sandbox" in report.headers["content-security-policy"]


def test_a_run_rests_takes_another_bound_goes_on_and_is_cancelled(service: RunningService) -> None:
    job_id = service.submit(ENDLESS)
    running = service.wait(job_id, "running")
    assert service.http.post(f"/v1/jobs/{job_id}/resume").status_code == 202  # it does already

    assert service.http.post(f"/v1/jobs/{job_id}/pause").json()["state"] in ("pausing", "paused")
    paused = service.wait(job_id, "paused")
    control = ControlClient(Path(paused["run_dir"]))
    assert control.status()["phase"] == "paused"
    assert service.http.post(f"/v1/jobs/{job_id}/pause").json()["state"] == "paused"

    stale = service.http.patch(f"/v1/jobs/{job_id}", json={"max_staleness": 3}, headers={"If-Match": '"1"'})
    assert (stale.status_code, stale.json()["code"]) == (412, "changed")
    tag = service.http.get(f"/v1/jobs/{job_id}").headers["etag"]
    changed = service.http.patch(
        f"/v1/jobs/{job_id}", json={"max_staleness": 3, "priority": 9, "labels": {"a": "b"}}, headers={"If-Match": tag}
    )
    assert changed.status_code == 200, changed.text
    assert changed.headers["etag"] != tag
    assert (changed.json()["max_staleness"], changed.json()["priority"]) == (3, 9)
    assert control.status()["max_staleness"] == 3

    service.http.post(f"/v1/jobs/{job_id}/resume")
    service.wait(job_id, "running")
    told = [event for event in events(service, job_id) if event["type"] in ("set", "changed")]
    assert [(event["type"], event["data"]) for event in told] == [
        ("set", {"max_staleness": 3}),
        ("changed", {"priority": 9, "labels": {"a": "b"}}),
    ], "each change is one event"

    # Somebody steers the run without the service.
    control.pause()
    service.wait(job_id, "paused")
    control.resume()
    service.wait(job_id, "running")
    control.set_max_staleness(2)
    wait_until(lambda: service.job(job_id)["max_staleness"] == 2)
    service.http.patch(f"/v1/jobs/{job_id}", json={"max_staleness": 4})
    assert service.job(job_id)["max_staleness"] == 4
    told = [event for event in events(service, job_id) if event["type"] in ("set", "changed")]
    assert [event["data"] for event in told[2:]] == [{"max_staleness": 2}, {"max_staleness": 4}]
    assert service.http.delete(f"/v1/jobs/{job_id}").status_code == 409
    assert service.http.post(f"/v1/jobs/{job_id}/cancel").json()["state"] == "cancelling"
    ended = service.wait(job_id, "cancelled")
    assert ended["reason"]["code"] == "cancelled"
    assert ended["summary"]["outcome"] == "stopped"
    assert ended["starts"] == 1
    assert ended["revision"] > running["revision"]
    late = service.http.patch(f"/v1/jobs/{job_id}", json={"max_staleness": 1})
    assert (late.status_code, late.json()["code"]) == (409, "not_possible_now")
    refused = service.http.post(f"/v1/jobs/{job_id}/pause")
    assert (refused.status_code, refused.json()["code"]) == (409, "illegal_state")


def test_an_ended_job_goes_on_as_a_new_one_and_stays_as_it_was(service: RunningService, finished: str) -> None:
    job_id = service.submit({"steps": 4}, resume_from=finished)
    ended = service.wait(job_id, "succeeded")

    assert (ended["summary"]["steps"], ended["summary"]["incarnation"]) == (4, 1)
    assert ended["resume_from"] == finished
    assert service.job(finished)["summary"]["steps"] == 2
    assert "resumed" in {event["type"] for event in events(service, job_id)}


def test_a_job_that_cannot_run_fails_with_what_to_change(service: RunningService) -> None:
    job_id = service.submit(tiny(max_new_tokens=5000))

    job = service.wait(job_id, "failed")

    assert job["reason"]["code"] == "invalid_config"
    assert "max_new_tokens (5000) leaves no room" in job["reason"]["message"]
    assert job["starts"] == service.starts(job_id) == 0


def test_a_configuration_is_looked_at_without_starting_anything(service: RunningService) -> None:
    before = service.http.get("/v1/jobs").json()["data"]

    good = service.http.post("/v1/jobs:validate", json={"config": tiny()}).json()
    shape = service.http.post("/v1/jobs:validate", json={"config": tiny(steps=0, lr=1)}).json()
    late = service.http.post("/v1/jobs:validate", json={"config": tiny(max_new_tokens=5000)}).json()

    assert good["ok"]
    assert good["errors"] == []
    assert good["config"]["rollout"]["max_model_len"] > 0
    assert {"model", "staleness", "memory", "step"} <= good["plan"].keys()
    assert {error["field"] for error in shape["errors"]} == {"steps", "lr"}
    assert [error["field"] for error in late["errors"]] == ["max_new_tokens"]
    assert service.http.get("/v1/jobs").json()["data"] == before


def test_a_repeated_submission_is_the_same_job(service: RunningService) -> None:
    body = {"config": ENDLESS, "name": "once"}
    headers = {"Idempotency-Key": "k-1"}
    first = service.http.post("/v1/jobs", json=body, headers=headers)
    again = service.http.post("/v1/jobs", json=body, headers=headers)
    other = service.http.post("/v1/jobs", json={**body, "name": "other"}, headers=headers)
    job_id = first.json()["id"]

    assert again.json()["id"] == job_id
    assert again.headers["idempotent-replayed"] == "true"
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_key_reused")
    service.http.post(f"/v1/jobs/{job_id}/cancel")
    service.wait(job_id, "cancelled")
    assert service.http.delete(f"/v1/jobs/{job_id}").json() == {"id": job_id, "object": "job", "deleted": True}
    assert service.http.get(f"/v1/jobs/{job_id}").status_code == 404
    assert not (service.home / "jobs" / job_id).exists()


def test_the_fleet_is_told_what_changes(service: RunningService, finished: str) -> None:
    names = iter(("x1", "x2", "x3"))
    headers = {"Accept": "text/event-stream"}
    with service.http.stream("GET", "/v1/events", headers=headers, timeout=DEADLINE) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "retry: 1000"
        for name in names:
            with httpx.Client(base_url=service.http.base_url, headers=service.http.headers) as other:
                assert other.patch(f"/v1/jobs/{finished}", json={"name": name}).status_code == 200
            data = next(line for line in lines if line.startswith("data: "))
            assert json.loads(data.removeprefix("data: "))["name"] == name


def test_a_stream_ends_when_its_token_is_taken_back(service: RunningService) -> None:
    made = service.http.post("/v1/tokens", json={"name": "t", "scope": "read"}).json()
    headers = {"Accept": "text/event-stream", "Authorization": f"Bearer {made['token']}"}
    with service.http.stream("GET", "/v1/events", headers=headers, timeout=DEADLINE) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "retry: 1000"
        with httpx.Client(base_url=service.http.base_url, headers=service.http.headers) as other:
            assert other.delete(f"/v1/tokens/{made['id']}").status_code == 204

        signs_of_life = 0
        for line in lines:
            signs_of_life += line.startswith(":")
            assert signs_of_life < 3, "it goes on"


def test_secrets_never_come_back(service: RunningService) -> None:
    secret = "hunter2-very-secret"
    config = tiny(rollout={"engine": "fake", "options": {"api_key": secret}}, max_new_tokens=5000)  # has no room
    job_id = service.submit(config)
    job = service.wait(job_id, "failed")

    assert job["config"]["rollout"]["options"] == {"api_key": "***"}
    for path in ("", "/events", "/logs"):
        assert secret not in service.http.get(f"/v1/jobs/{job_id}{path}").text


def test_jobs_go_on_when_the_service_is_killed_and_are_found_again(tmp_path: Path) -> None:
    service = RunningService(tmp_path / "home", "--slots", "2")
    try:
        steered = service.submit(ENDLESS)
        service.wait(steered, "running")
        killed = service.submit(ENDLESS)
        service.wait(killed, "running")
        started = [(service.home / "jobs" / job / "started.json").read_text() for job in (steered, killed)]
        pids = [json.loads(line)["pid"] for line in started]
        at = ControlClient(Path(service.job(steered)["run_dir"])).status()["step"]

        service.kill()
        assert all(psutil.pid_exists(pid) for pid in pids)
        psutil.Process(pids[1]).kill()  # and nobody is there to see it
        service.restart()

        assert service.job(steered)["state"] == "running"
        wait_until(lambda: (service.job(steered)["progress"] or {"step": 0})["step"] > at, service.process)
        assert service.wait(killed, "failed")["reason"]["code"] == "killed"
        service.http.post(f"/v1/jobs/{steered}/cancel")
        assert service.wait(steered, "cancelled")["reason"]["code"] == "cancelled"
        assert [service.starts(job) for job in (steered, killed)] == [1, 1]
        assert service.http.get(f"/v1/jobs/{killed}/report").status_code == 200  # a killed run stays readable
        assert len(events(service, killed)) > 5

        service.stop()
        service.restart()
        assert service.job(steered)["state"] == "cancelled"
    finally:
        service.close()


def test_what_does_not_listen_is_killed_with_everything_it_started(tmp_path: Path) -> None:
    """A process that holds a job's lock, ignores SIGTERM and has a child."""
    from asyncflow_api.jobs import process
    from asyncflow_api.jobs.folder import JobFolder

    folder = JobFolder(tmp_path / "job")
    folder.path.mkdir()
    program = (
        "import signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "from pathlib import Path; from asyncflow_api.jobs.folder import JobFolder; "
        "folder = JobFolder(Path(sys.argv[1])); lock = folder.lock(); folder.add_start(); "
        "subprocess.run(['sleep', '1000'])"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(folder.path)], start_new_session=True) as running:
        wait_until(lambda: bool(folder.starts()) and bool(psutil.Process(running.pid).children()))
        (started,) = folder.starts()
        child = psutil.Process(running.pid).children()[0]
        assert folder.held()
        process.terminate(started)
        process.kill(started)
        running.wait(DEADLINE)
    wait_until(lambda: not child.is_running())
    assert not folder.held()
    began = time.monotonic()
    process.kill(started)  # again, and nobody is hit
    assert time.monotonic() - began < DEADLINE
