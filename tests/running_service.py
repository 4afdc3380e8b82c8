"""The HTTP service in a process of its own, which can be killed at any moment; and small jobs for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from asyncflow_api.jobs.folder import Started

from tests.conftest import TINY
from tests.processes import DEADLINE, wait_until

ENDED = ("succeeded", "failed", "cancelled")


def tiny(**changes: Any) -> dict[str, Any]:
    """`configs/tiny.yaml`, with two steps and few problems so that a job takes seconds."""
    config: dict[str, Any] = yaml.safe_load(TINY.read_text())
    config["data"] |= {"size": 60, "eval_size": 2}
    return config | {"steps": 2} | changes


ENDLESS = tiny(steps=1_000_000, rollout={"engine": "fake", "max_concurrency": 16, "options": {"token_latency": 0.02}})
"""A sixth of a second for a step: it leaves the processors to others."""


def end_jobs(home: Path) -> None:
    """End every job that goes on in the home of a service that has ended."""
    for file in home.glob("jobs/*/started.json"):
        for line in file.read_text().splitlines():
            started = json.loads(line)
            with suppress(psutil.Error, ProcessLookupError):
                if Started(**started).process() is not None:
                    os.killpg(started["pid"], signal.SIGKILL)


class RunningService:
    """`asyncflow serve` on a home of its own."""

    def __init__(self, home: Path, *options: str) -> None:
        self.home = home
        self._options = options
        self.begin()
        self.wait_until_ready()

    def begin(self) -> None:
        """Start the process; it can be killed before it is ready."""
        command = [sys.executable, "-m", "asyncflow.cli", "serve", "--home", str(self.home), "--port", "0"]
        self.home.mkdir(exist_ok=True)
        with (self.home.parent / f"{self.home.name}.log").open("a") as log:
            self.process = subprocess.Popen([*command, *self._options], stdout=log, stderr=log, text=True)

    def wait_until_ready(self) -> None:
        wait_until(self.ready, self.process)
        token = (self.home / "token").read_text()
        self.http = httpx.Client(
            base_url=self.address["url"], headers={"Authorization": f"Bearer {token}"}, timeout=60.0
        )

    def ready(self) -> bool:
        return bool(self.address.get("pid") == self.process.pid)

    @property
    def address(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.home / "service.json").read_text())
        except FileNotFoundError:
            return {}
        return found

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE)
        self.close_client()

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(DEADLINE) in (0, -signal.SIGTERM)
        self.close_client()

    def close_client(self) -> None:
        if hasattr(self, "http"):
            self.http.close()

    def restart(self) -> None:
        self.begin()
        self.wait_until_ready()

    def close(self) -> None:
        """End the service, and every job that goes on."""
        self.process.kill()
        self.process.wait(DEADLINE)
        self.close_client()
        end_jobs(self.home)

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def submit(self, config: Mapping[str, Any], **more: Any) -> str:
        answer = self.http.post("/v1/jobs", json={"config": config, **more})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        answer = self.http.get(f"/v1/jobs/{job_id}")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def wait(self, job_id: str, *states: str) -> dict[str, Any]:
        """The job, once it is in one of these states; an end that is not among them fails the test."""
        seen: dict[str, Any] = {}
        pause = threading.Event()

        def there() -> bool:
            pause.wait(0.1)  # it has other things to do than to answer us
            seen.update(self.job(job_id))
            assert seen["state"] in states or seen["state"] not in ENDED, (seen["state"], seen["reason"])
            return seen["state"] in states

        wait_until(there, self.process)
        return seen

    def starts(self, job_id: str) -> int:
        """Processes that began to run the job."""
        try:
            return len((self.home / "jobs" / job_id / "started.json").read_text().splitlines())
        except FileNotFoundError:
            return 0
