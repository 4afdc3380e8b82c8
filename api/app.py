"""The application: who is let in, how much may come, and which routes there are.

request ─► Outermost ─► Authentication ─► Limits ─► route ─► Jobs ─► database, folders, processes
           an id, an    who calls, and    size,     its
           answer to    by which name     rate,     scope
           every fault                    JSON
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from asyncflow_api import problems, specification
from asyncflow_api.auth import Authentication, Tokens
from asyncflow_api.files import Files
from asyncflow_api.jobs.service import Jobs
from asyncflow_api.limits import Limits
from asyncflow_api.measures import Durations
from asyncflow_api.openai_errors import OpenAIErrors
from asyncflow_api.routes import (
    completions,
    dashboard,
    exchange,
    files,
    fine_tuning,
    history,
    metrics_of_job,
    prometheus,
    queue,
    samples,
    service,
    workers,
)
from asyncflow_api.routes import jobs as jobs_routes
from asyncflow_api.runs import Runs
from asyncflow_api.settings import Settings
from asyncflow_api.watch import Watches
from asyncflow_api.yaml_bodies import YamlBodies
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from asyncflow.clock import Clock, SystemClock

ROUTERS = (
    service.router,
    jobs_routes.router,
    history.router,
    queue.router,
    workers.router,
    samples.router,
    metrics_of_job.router,
    exchange.router,
    completions.router,
    prometheus.router,
    files.router,
    fine_tuning.router,
    dashboard.router,
)
"""One line for each file in `routes/`."""


def create_app(settings: Settings, *, clock: Clock | None = None, jobs: Jobs | None = None) -> FastAPI:
    """A new application. Its jobs are looked after from its start to its shutdown, and go on without it.

    `jobs`: of the same settings, if the caller has opened them already; they are closed at the shutdown all the same.
    """
    clock = clock or SystemClock()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        found = jobs or Jobs(settings, clock=clock)
        app.state.runs, app.state.watches = Runs(), Watches()
        try:
            app.state.jobs = found
            app.state.tokens = Tokens(found.database, clock)
            app.state.tokens.first(settings.token_file)
            Files(found).tidy()
            found.start()
            app.state.runs.keep_up(lambda: [found.folder(id_).run for id_ in found.progresses()])
            yield
        finally:
            app.state.watches.close()
            app.state.runs.close()
            found.close()

    app = FastAPI(
        title="AsyncFlow",
        version=version("asyncflow"),
        lifespan=lifespan,
        # The interactive pages load scripts from another site: what is served here works without a network.
        docs_url=None,
        redoc_url=None,
    )
    app.state.measures = CollectorRegistry()
    problems.install(app)
    app.add_middleware(YamlBodies)
    app.add_middleware(Limits, settings=settings, clock=clock)
    app.add_middleware(Authentication, settings=settings, tokens=lambda: app.state.tokens, clock=clock)
    app.add_middleware(Durations, registry=app.state.measures)
    app.add_middleware(problems.Outermost)
    app.add_middleware(OpenAIErrors)  # the last one added comes first
    for router in ROUTERS:
        app.include_router(router)
    specification.install(app)
    return app
