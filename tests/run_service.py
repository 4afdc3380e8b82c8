"""An application with the routes about runs, behind a socket, for runs that tests have made themselves."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import uvicorn
from asyncflow_api import problems
from asyncflow_api.auth import Identity
from asyncflow_api.jobs.database import NoSuchJob
from asyncflow_api.measures import Durations
from asyncflow_api.routes import completions, exchange, metrics_of_job, prometheus, queue, samples, workers
from asyncflow_api.runs import Runs
from asyncflow_api.watch import Watches
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp, Receive, Scope, Send

from asyncflow.rundir import SOCKET, SUMMARY
from tests.processes import DEADLINE, wait_until


class KnownRuns:
    """What the routes ask of `Jobs`."""

    def __init__(self, run_dirs: dict[str, Path]) -> None:
        self._run_dirs = run_dirs
        self.database = SimpleNamespace(jobs=self._jobs)

    def run_dir(self, job_id: str) -> Path:
        if job_id not in self._run_dirs:
            raise NoSuchJob(f"there is no job {job_id}")
        return self._run_dirs[job_id]

    def get(self, job_id: str) -> SimpleNamespace:
        run_dir = self.run_dir(job_id)
        return SimpleNamespace(ended=(run_dir / SUMMARY).is_file() and not (run_dir / SOCKET).exists())

    def _jobs(self, *, states: Sequence[str], limit: int) -> list[SimpleNamespace]:
        assert "running" in states
        return [SimpleNamespace(id=job_id) for job_id in self._run_dirs][:limit]


class Caller:
    """Says who calls, where `Authentication` does it else: by the header `x-scope`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            shown: Any = dict(scope["headers"]).get(b"x-scope", b"submit").decode()
            scope["state"]["identity"] = Identity(
                token_id="t", name="test", scope=shown, expires_at=None, session=False
            )
        await self._app(scope, receive, send)


def make_app(run_dirs: dict[str, Path]) -> FastAPI:
    app = FastAPI()
    problems.install(app)
    app.state.jobs, app.state.runs, app.state.measures = KnownRuns(run_dirs), Runs(), CollectorRegistry()
    app.state.watches = Watches()
    app.add_middleware(Caller)
    app.add_middleware(Durations, registry=app.state.measures)
    app.add_middleware(problems.Outermost)
    for module in (queue, workers, samples, exchange, completions, metrics_of_job, prometheus):
        app.include_router(module.router)
    return app


@contextlib.contextmanager
def service(**run_dirs: Path) -> Iterator[httpx.Client]:
    """A client of a service that knows these runs as jobs."""
    app = make_app(run_dirs)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=DEADLINE) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(DEADLINE)
        app.state.watches.close()
        app.state.runs.close()
