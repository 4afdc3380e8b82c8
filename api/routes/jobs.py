"""Jobs: submit, look at, steer, and forget them."""

from __future__ import annotations

import re
from typing import Annotated

from asyncflow_api.dependencies import IdempotencyKey, Reads, Submits, TheJobs, once_of, served, submitted
from asyncflow_api.jobs.lifecycle import State
from asyncflow_api.jobs.rows import NewJob
from asyncflow_api.pages import CursorText, Limit, Page, number, page_of
from asyncflow_api.problems import Problem
from asyncflow_api.schemas import (
    ChangeJob,
    Deleted,
    FieldMessage,
    Job,
    ListedJob,
    SubmitJob,
    ValidateJob,
    ValidationBody,
)
from asyncflow_api.yaml_bodies import REQUEST_BODY
from fastapi import APIRouter, Header, Query, Response

router = APIRouter(prefix="/v1", tags=["jobs"])

IfMatch = Annotated[
    str | None, Header(max_length=128, description="The ETag of the job as you know it: refused if it has changed.")
]


@router.post("/jobs", status_code=201, openapi_extra=REQUEST_BODY)
def submit(
    body: SubmitJob, response: Response, jobs: TheJobs, caller: Submits, idempotency_key: IdempotencyKey = None
) -> Job:
    """Take in a job. Its plan is made next (`validating`), then it waits for a slot (`queued`)."""
    name = body.name or str(body.config.get("name", "run"))
    new = NewJob(
        name=name, config=body.config, priority=body.priority, labels=body.labels, resume_from=body.resume_from
    )
    row = submitted(jobs, new, once_of(idempotency_key, caller, body), response)
    response.headers["Location"] = f"/v1/jobs/{row.id}"
    return served(jobs, row, response)


@router.post("/jobs:validate", openapi_extra=REQUEST_BODY)
def validate(body: ValidateJob, jobs: TheJobs, _: Submits) -> ValidationBody:
    """Say what is wrong with a configuration, or what its run would need. Starts nothing; takes some seconds."""
    found = jobs.validate(body.config)
    hide = jobs.redactor_of(body.config)
    return ValidationBody(
        ok=found.ok,
        errors=[FieldMessage(field=one.field, message=hide.text(one.message)) for one in found.errors],
        config=None if found.resolved is None else hide.value(found.resolved),
        plan=dict(found.plan),
    )


@router.get("/jobs")
def list_jobs(
    jobs: TheJobs,
    _: Reads,
    state: Annotated[list[State] | None, Query(description="In one of these states.", max_length=11)] = None,
    label: Annotated[
        list[str] | None, Query(description="`name=value`, or `name` with any value; all of them.", max_length=16)
    ] = None,
    cursor: CursorText = None,
    limit: Limit = 20,
) -> Page[ListedJob]:
    """Jobs, the newest first, without their configuration and summary."""
    wanted = [(name, value if equals else None) for name, equals, value in (one.partition("=") for one in label or ())]
    before = number("jobs", cursor)
    rows = jobs.database.jobs(states=state or (), labels=wanted, before=before, limit=limit + 1)
    items = [ListedJob(**served(jobs, row).model_dump()) for row in rows]
    return page_of("jobs", items, limit, [str(row.seq) for row in rows])


@router.get("/jobs/{job_id}")
def get_job(job_id: str, response: Response, jobs: TheJobs, _: Reads) -> Job:
    """One job."""
    return served(jobs, jobs.get(job_id), response)


@router.patch("/jobs/{job_id}")
def change_job(
    job_id: str, body: ChangeJob, response: Response, jobs: TheJobs, _: Submits, if_match: IfMatch = None
) -> Job:
    """Change the bound (of a live run at once), the priority, the name or the labels."""
    return served(jobs, jobs.change(job_id, body.values(), revision=_revision(if_match)), response)


@router.delete("/jobs/{job_id}")
def delete_job(job_id: str, jobs: TheJobs, _: Submits, if_match: IfMatch = None) -> Deleted:
    """Forget a job that has ended, and remove everything that it has written."""
    jobs.delete(job_id, revision=_revision(if_match))
    return Deleted(id=job_id)


@router.post("/jobs/{job_id}/pause", status_code=202)
def pause(job_id: str, response: Response, jobs: TheJobs, _: Submits) -> Job:
    """Let a run finish what it has begun and then rest, with its slot and its memory."""
    return served(jobs, jobs.wish(job_id, "pause"), response)


@router.post("/jobs/{job_id}/resume", status_code=202)
def resume(job_id: str, response: Response, jobs: TheJobs, _: Submits) -> Job:
    """Let a run that rests go on."""
    return served(jobs, jobs.wish(job_id, "resume"), response)


@router.post("/jobs/{job_id}/cancel", status_code=202)
def cancel(job_id: str, response: Response, jobs: TheJobs, _: Submits) -> Job:
    """End a job: with a checkpoint where it had begun, and by force where it does not listen."""
    return served(jobs, jobs.wish(job_id, "cancel"), response)


def _revision(if_match: str | None) -> int | None:
    """What an If-Match header asks for; None where any revision will do."""
    if if_match is None or if_match.strip() == "*":
        return None
    found = re.fullmatch(r'\s*"(\d{1,18})"\s*', if_match)
    if found is None:
        text = 'If-Match: send the ETag of the job, such as "3"'
        raise Problem(400, "bad_etag", text, field="header.if-match")
    return int(found[1])
