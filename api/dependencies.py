"""What a route can ask to be given."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated

from asyncflow_api.auth import Identity, Need, Tokens
from asyncflow_api.jobs.database import NoSuchJob
from asyncflow_api.jobs.folder import summary_of
from asyncflow_api.jobs.rows import JobRow, NewJob, Once
from asyncflow_api.jobs.service import Jobs
from asyncflow_api.problems import Problem
from asyncflow_api.schemas import Job, job_body
from fastapi import Depends, Header, Request, Response
from pydantic import BaseModel


def the_jobs(request: Request) -> Jobs:
    jobs: Jobs = request.app.state.jobs
    return jobs


def the_tokens(request: Request) -> Tokens:
    tokens: Tokens = request.app.state.tokens
    return tokens


TheJobs = Annotated[Jobs, Depends(the_jobs)]
TheTokens = Annotated[Tokens, Depends(the_tokens)]

Reads = Annotated[Identity, Depends(Need("read"))]
Submits = Annotated[Identity, Depends(Need("submit"))]
Administers = Annotated[Identity, Depends(Need("admin"))]
"""As an argument of a route: who calls, at least of this scope."""


IdempotencyKey = Annotated[
    str | None,
    Header(pattern=r"^[\x21-\x7e]{1,128}$", description="The same key and body are answered with the same job."),
]


def once_of(key: str | None, caller: Identity, body: BaseModel) -> Once | None:
    """What makes a submission the same as one before; None where no key was sent."""
    if key is None:
        return None
    digest = hashlib.sha256(json.dumps(body.model_dump(), sort_keys=True).encode()).hexdigest()
    return Once(key=key, owner=caller.token_id, digest=digest)


def submitted(jobs: Jobs, new: NewJob, once: Once | None, response: Response) -> JobRow:
    """The job of a submission, or of the same one before, which a header says. Raises Problem, Invalid, KeyReused."""
    try:
        row, again = jobs.submit(new, once=once)
    except NoSuchJob as error:
        raise Problem(409, "no_such_job", f"{error} any more: name one that is there, or take a new key") from None
    if again:
        response.headers["Idempotent-Replayed"] = "true"
    return row


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
