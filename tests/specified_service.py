"""An application that has something to say on every route, and requests that find it, for tests of its specification.

There are three jobs: one has ended, one goes on, and one waits for a slot. The service gives a plan so little time that
a job submitted to it fails of that and starts nothing.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from asyncflow_api.app import create_app
from asyncflow_api.auth import Tokens
from asyncflow_api.files import Files
from asyncflow_api.fine_tuning import configuration
from asyncflow_api.jobs.folder import Order
from asyncflow_api.jobs.lifecycle import IllegalMove, State
from asyncflow_api.jobs.process import kill
from asyncflow_api.jobs.rows import FileRow, NewJob
from asyncflow_api.jobs.runner import carry_out
from asyncflow_api.jobs.service import Jobs
from asyncflow_api.routes.fine_tuning import PREFIX
from asyncflow_api.runs import RunView
from asyncflow_api.schemas_openai import CreateFineTuningJob
from asyncflow_api.settings import Settings
from asyncflow_api.sse import MEDIA_TYPE as EVENTS
from fastapi import FastAPI
from fastapi.testclient import TestClient
from schemathesis import Case, GenerationMode
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asyncflow.config import parse_config
from asyncflow.errors import StoreError
from asyncflow.runtime.control import ControlClient
from asyncflow.store.client import Lease
from asyncflow.store.ipc import MEDIA_TYPE as COLUMNS
from tests.processes import wait_until
from tests.running_service import tiny

HOST: Final = "testserver"
"""As schemathesis calls it."""
IDS: Final = re.compile(r"(job|tok)_[0-9a-f]+|ftjob-[0-9a-f]+|file-\w+")
LINES: Final = b"".join(
    json.dumps({"messages": [{"role": "user", "content": f"What is {n} + 1?"}], "answer": str(n + 1)}).encode() + b"\n"
    for n in range(8)
)
GRADER: Final = {
    "type": "string_check",
    "name": "same",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "operation": "ilike",
}
WANTS: Final = "x-wants"
"""schemathesis sends an Accept of its own, whatever a request has."""
PATIENCE: Final = 0.2
"""Seconds that a request may wait for a run: most of what they ask for never comes."""


def fine_tuning(file: str, epochs: int = 1) -> dict[str, Any]:
    """A job with the fake engines, four steps of two problems an epoch."""
    hyperparameters = {"n_epochs": epochs, "batch_size": 2, "compute_multiplier": 0.5}
    return {
        "model": "tiny",
        "training_file": file,
        "method": {"type": "reinforcement", "reinforcement": {"grader": GRADER, "hyperparameters": hyperparameters}},
        "asyncflow": {
            "rollout": {"engine": "fake", "max_concurrency": 8},
            "learner": {"engine": "fake"},
            "max_new_tokens": 8,
            "checkpoint": {"every": 1},
        },
    }


class Fleet:
    """A home with the three jobs, and the application that serves it."""

    def __init__(self, home: Path) -> None:
        self._settings = Settings(
            home=home, names=(HOST,), validation_timeout=0.2, rate=1e6, anonymous_rate=1e6, failure_rate=1e6
        )
        self.ended = self.live = self.queued = self.file = self.token = self.token_id = ""
        """Ids, of jobs without `job_` in front."""
        self.app: FastAPI

    @contextmanager
    def serving(self) -> Iterator[FastAPI]:
        """The application, started; the job that goes on is killed at the end."""
        self.jobs = Jobs(self._settings)
        self.app = create_app(self._settings, jobs=self.jobs)
        self._make()
        try:
            with TestClient(self.app, base_url=f"http://{HOST}"):
                self.tokens: Tokens = self.app.state.tokens
                row, self.token = self.tokens.make("specification", "admin")
                self.token_id = row.id
                wait_until(lambda: (self.jobs.progress(f"job_{self.live}") or {}).get("step", 0) >= 3)
                self._let_it_rest()
                yield self.app
        finally:
            for started in self.jobs.folder(f"job_{self.live}").starts():
                kill(started)

    def _make(self) -> None:
        """As the service would have made them, without the minute in which it makes plans."""
        row = Files(self.jobs).add("train.jsonl", LINES)
        self.file = row.id
        self.ended, self.live, self.queued = (self._add(row, epochs) for epochs in (1, 1000, 1))
        database, job = self.jobs.database, f"job_{self.ended}"
        folder = self.jobs.folder(job)
        folder.make(Order(config=self.jobs.get(job).config))
        folder.add_start()
        carry_out(folder)
        for state in (State.starting, State.running, State.succeeded):
            database.move(job, state, message="it went through")

    def _add(self, file: FileRow, epochs: int) -> str:
        body = CreateFineTuningJob(**fine_tuning(file.id, epochs))
        config, request = configuration(body, (file, Files(self.jobs).prompts(file.id)), None)
        row, _ = self.jobs.database.add(NewJob(name="specified", config=config, labels={}, request=request))
        resolved = parse_config(config).model_dump(mode="json")
        self.jobs.database.move(row.id, State.queued, message="the plan was made", resolved=resolved)
        return row.id.removeprefix("job_")

    def _let_it_rest(self) -> None:
        """With samples that wait for a reward and room for more: the processors are for the tests."""
        control = ControlClient(self.jobs.run_dir(f"job_{self.live}"))
        control.drain("reward")
        wait_until(lambda: any(one.name == "reward" and one.ready >= 8 for one in self.view.queue().stages))
        control.drain("feeder")
        control.set_max_staleness(8)

    @property
    def view(self) -> RunView:
        """Of the run that goes on."""
        view: RunView = self.app.state.runs.view(self.jobs.run_dir(f"job_{self.live}"))
        return view


def _positive(case: Case[Any]) -> bool:
    return case.meta is not None and case.meta.generation.mode is GenerationMode.POSITIVE


class FirstPiece:
    """Ends an event stream after the first piece that it sends: many never end. `WANTS` is the header Accept."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        streams = cut = False

        async def send_first(message: Message) -> None:
            nonlocal streams, cut
            if message["type"] == "http.response.start":
                streams = Headers(raw=message["headers"]).get("content-type", "").startswith(EVENTS)
            elif streams:
                if cut:
                    return
                cut, message = True, {**message, "more_body": False}
            await send(message)

        async def receive_end() -> Message:
            return {"type": "http.disconnect"} if cut else await receive()

        wants = Headers(scope=scope).get(WANTS)
        if wants is not None:
            kept = [(name, value) for name, value in scope["headers"] if name != b"accept"]
            scope = {**scope, "headers": [*kept, (b"accept", wants.encode())]}
        await self._app(scope, receive_end, send_first)


class Finder:
    """Changes requests that schemathesis made up so that some of them find something, and none does lasting harm.

    What is made up names no job, no file and no lease that there is; of those requests, three in four are given one.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._sent = Counter[str]()
        self._held: Lease | None = None

    def change(self, case: Case[Any]) -> None:
        label = case.operation.label
        number = self._sent[label]
        self._sent[label] += 1
        known = number % 4 < 3
        parameters = case.path_parameters
        fleet = self._fleet
        job = (fleet.live, fleet.ended, fleet.live, "", fleet.live, fleet.queued, fleet.live, "")[number % 8]
        for name, choose in self._names(label, job).items():
            if name in parameters and known and not IDS.fullmatch(str(parameters[name])):
                parameters[name] = choose()
        self._spare(case, label)
        if label.endswith("/events") or label.endswith("/logs"):
            case.headers[WANTS] = EVENTS if number % 3 else "*/*"
            if number % 2:
                case.headers.pop("last-event-id", None)
        if label.endswith("/leases"):
            case.headers[WANTS] = COLUMNS if number % 3 else "*/*"
        if _positive(case):
            if known and (good := self._bodies().get(label)) is not None:
                # Most are as plain as can be, so that nothing but the service can keep them from being done.
                body: Any = case.body
                plain = number % 8 != 6 or not isinstance(body, dict)
                case.body = good({} if plain else body)
                case.query = {} if plain else case.query
            self._hurry(case)

    def _names(self, label: str, job: str) -> dict[str, Callable[[], str]]:
        fleet = self._fleet
        prefix = PREFIX if "fine_tuning" in label else "job_"
        return {
            "job_id": lambda: prefix + job,
            "token_id": lambda: fleet.tokens.make("spare", "read")[0].id,
            "file_id": lambda: fleet.file,
            "name": lambda: "actor_update",
            "stage": lambda: "reward",
            "lease_id": lambda: "0",
            "sample_id": lambda: "1",
        }

    def _spare(self, case: Case[Any], label: str) -> None:
        """Nothing ends, frees or fills what the others need."""
        fleet, parameters = self._fleet, case.path_parameters
        bare = str(parameters.get("job_id", "")).removeprefix(PREFIX).removeprefix("job_")
        if label.endswith("/cancel") and bare == fleet.live:
            parameters["job_id"] = parameters["job_id"].replace(fleet.live, fleet.queued)
        if label == "DELETE /v1/jobs/{job_id}" and bare == fleet.ended:
            row, _ = fleet.jobs.submit(NewJob(name="spare", config=tiny(), labels={}))
            parameters["job_id"] = fleet.jobs.wish(row.id, "cancel").id
        if label == "DELETE /v1/files/{file_id}" and parameters["file_id"] == fleet.file:
            parameters["file_id"] = Files(fleet.jobs).add("spare", LINES).id
        if parameters.get("token_id") == fleet.token_id:
            parameters["token_id"] = "tok_0"
        if parameters.get("name") in ("reward", "feeder", "rollout"):
            parameters["name"] = "actor_update"
        if label.startswith("PATCH") and isinstance(case.body, dict):
            case.body |= {"max_staleness": 8} if isinstance(case.body.get("max_staleness"), int) else {}
        if "/leases/{lease_id}" in label and bare == fleet.live and parameters["lease_id"] == "0":
            self._lease(case)

    def _lease(self, case: Case[Any]) -> None:
        """One sample that waits for a reward, if there is one; it is taken once for all requests, until one ends it."""
        with suppress(StoreError):
            self._held = self._held or self._fleet.view.lease(
                "reward", worker="judge", max_rows=1, min_rows=1, ttl=3600.0, timeout=0.0
            )
        if self._held is None:
            return
        case.path_parameters["lease_id"] = str(self._held.lease_id)
        body: Any = case.body
        if isinstance(body, dict) and _positive(case):
            ids = self._held.sample_ids.tolist()
            rows = [{"sample_id": one, "reward": 1.0, "reward_parts": {}} for one in ids]
            case.body = body | {name: value for name, value in (("sample_ids", ids), ("samples", rows)) if name in body}

    def _bodies(self) -> Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]:
        fleet = self._fleet
        return {
            "PATCH /v1/jobs/{job_id}": lambda _: {"priority": 7},
            "POST /v1/login": lambda _: {"token": fleet.token},
            "POST /v1/jobs": lambda body: {**body, "config": tiny(), "resume_from": None},
            "POST /v1/jobs:validate": lambda _: {"config": tiny()},
            "POST /v1/fine_tuning/jobs": lambda _: fine_tuning(fleet.file),
            "POST /v1/files": lambda _: {"file": LINES.decode(), "purpose": "fine-tune"},
            "POST /v1/completions": lambda body: {**body, "model": f"job_{fleet.live}", "prompt": "1 + 1"},
            "POST /v1/jobs/{job_id}/prompts": lambda body: {**body, "prompts": [{"prompt": "1 + 1"}]},
            "POST /v1/jobs/{job_id}/samples": lambda body: {**body, "samples": [FINISHED] * 4},
        }

    def _hurry(self, case: Case[Any]) -> None:
        """Wait for a moment where minutes could be asked for."""
        places: tuple[Any, Any] = (case.query, case.body)
        for place in places:
            if isinstance(place, dict) and isinstance(place.get("timeout_seconds"), int | float):
                place["timeout_seconds"] = min(place["timeout_seconds"], PATIENCE)
        if case.operation.label == "POST /v1/completions" and isinstance(case.body, dict):
            case.body |= {"max_tokens": 4, "timeout_seconds": 10.0}

    def settle(self, case: Case[Any], status: int) -> None:
        """After a request: the run goes on."""
        if case.operation.label.endswith("ack") and status == 200:
            self._held = None
        if case.operation.label.endswith("/pause"):
            with suppress(IllegalMove):
                self._fleet.jobs.wish(f"job_{self._fleet.live}", "resume")


FINISHED: Final = {
    "prompt": "x",
    "prompt_ids": [1],
    "response_ids": [2, 3],
    "rollout_logprobs": [-1.0, -1.0],
    "token_versions": ["0.0", "0.0"],
    "response": "y",
    "finish_reason": "stop",
}
