"""What a route can ask to be given."""

from __future__ import annotations

from typing import Annotated

from asyncflow_api.auth import Identity, Tokens, need
from asyncflow_api.jobs.folder import summary_of
from asyncflow_api.jobs.rows import JobRow
from asyncflow_api.jobs.service import Jobs
from asyncflow_api.schemas import Job, job_body
from asyncflow_api.watch import Watches
from fastapi import Depends, Request, Response


def the_jobs(request: Request) -> Jobs:
    jobs: Jobs = request.app.state.jobs
    return jobs


def the_tokens(request: Request) -> Tokens:
    tokens: Tokens = request.app.state.tokens
    return tokens


def the_watches(request: Request) -> Watches:
    watches: Watches = request.app.state.watches
    return watches


TheJobs = Annotated[Jobs, Depends(the_jobs)]
TheWatches = Annotated[Watches, Depends(the_watches)]
TheTokens = Annotated[Tokens, Depends(the_tokens)]

Reads = Annotated[Identity, Depends(need("read"))]
Submits = Annotated[Identity, Depends(need("submit"))]
Administers = Annotated[Identity, Depends(need("admin"))]
"""As an argument of a route: who calls, at least of this scope."""


def served(jobs: Jobs, row: JobRow, response: Response | None = None) -> Job:
    """A job as clients see it, with its ETag."""
    if response is not None:
        response.headers["ETag"] = f'"{row.revision}"'
    folder = jobs.folder(row.id)
    return job_body(
        row,
        run_dir=str(folder.run),
        progress=jobs.progress(row.id),
        summary=summary_of(folder) if row.ended else None,
    )
