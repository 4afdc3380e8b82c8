"""`kill -9` of the service at random moments, while jobs are submitted over HTTP and run: no job is lost, and none is
started twice."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from asyncflow.report.audit import audit
from tests.processes import DEADLINE
from tests.running_service import ENDED, RunningService, tiny

pytestmark = pytest.mark.timeout(900)  # each wait has its own deadline, and there are several


class Storm:
    """A service that is killed and started again, and somebody who submits until an answer comes."""

    def __init__(self, service: RunningService, seed: int) -> None:
        self.service = service
        self.rng = random.Random(seed)
        self.acknowledged: dict[str, str] = {}
        """Idempotency key → job."""
        self.refused = 0
        """Submissions that got no answer, and were sent again."""

    def submit_all(self, jobs: int) -> None:
        """One after the other, over the whole storm."""
        for number in range(jobs):
            self.submit(f"key-{number}")
            threading.Event().wait(self.rng.random() * 3)

    def submit(self, key: str) -> None:
        data = {"train": str(self.service.home.parent / "prompts.jsonl"), "eval_size": 2}
        config = tiny(data=data, steps=1, seed=len(self.acknowledged))
        body = {"config": config, "priority": self.rng.randrange(101)}
        headers = {"Idempotency-Key": key}
        pause = threading.Event()
        while True:
            try:
                address = self.service.address
                token = (self.service.home / "token").read_text()
                headers["Authorization"] = f"Bearer {token}"
                answer = httpx.post(f"{address['url']}/v1/jobs", json=body, headers=headers, timeout=10.0)
                assert answer.status_code == 201, answer.text
                self.acknowledged[key] = answer.json()["id"]
                return
            except httpx.TransportError:  # it was killed, or is not there yet
                self.refused += 1
                pause.wait(0.05)

    def kill(self) -> None:
        """While it starts and finds its jobs, or when it has begun to take some in, to start them and to look on."""
        if self.rng.random() < 0.7:
            self.service.wait_until_ready()
            self.service.close_client()
        threading.Event().wait(self.rng.choice([0.1, 0.5, 1.5, 4.0]) * self.rng.random())
        self.service.kill()
        self.service.begin()

    def run(self, kills: int) -> None:
        submitter = threading.Thread(target=self.submit_all, args=(kills // 2,))
        submitter.start()
        for _ in range(kills):
            self.kill()
        self.service.wait_until_ready()
        submitter.join(DEADLINE)
        assert not submitter.is_alive()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RunningService]:
    # A file needs no generator, which takes longer to import than these jobs take.
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {n} + {n}?"}) + "\n" for n in range(40)))
    service = RunningService(tmp_path / "home", "--slots", "2", "--allow-path", str(tmp_path))
    yield service
    service.close()


def check(service: RunningService, storm: Storm, kills: int) -> None:
    def jobs() -> list[dict[str, str]]:
        found, cursor = [], ""
        while True:
            page = service.http.get(f"/v1/jobs?limit=100{cursor}").json()
            found += page["data"]
            if not page["has_more"]:
                return found
            cursor = f"&cursor={page['next_cursor']}"

    for job_id in storm.acknowledged.values():  # each has the whole deadline
        service.wait(job_id, *ENDED)

    found = {job["id"]: job for job in jobs()}
    assert set(storm.acknowledged.values()) <= found.keys(), "a job was lost"
    # One that was taken in without an answer is there once all the same: its key came again.
    assert len(found) == len(storm.acknowledged) == len(set(storm.acknowledged.values()))
    assert {job["state"] for job in found.values()} == {"succeeded"}, [job["reason"] for job in found.values()]
    for job_id in found:
        lines = (service.home / "jobs" / job_id / "started.json").read_text().splitlines()
        assert len(lines) == 1, f"{job_id} was started {len(lines)} times"
        run = service.home / "jobs" / job_id / "run"
        assert json.loads((run / "summary.json").read_text())["incarnation"] == 0
        assert audit(run).ok
        moves = [event["data"]["to"] for event in service.http.get(f"/v1/jobs/{job_id}/events?limit=100").json()["data"]
                 if event["type"] == "state"]  # fmt: skip
        assert moves[0] == "validating"
        assert moves[-1] == "succeeded"
    print(f"\n{kills} kills, {len(found)} jobs, {storm.refused} of them asked again: each started once")


def test_no_job_is_lost_and_none_started_twice_whenever_the_service_is_killed(service: RunningService) -> None:
    storm = Storm(service, seed=5)
    storm.run(kills=8)
    check(service, storm, 8)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_fifty_kills_lose_no_job_and_start_none_twice(service: RunningService) -> None:
    kills = int(os.environ.get("ASYNCFLOW_KILLS", "50"))
    storm = Storm(service, seed=50)
    storm.run(kills)
    check(service, storm, kills)
