"""Jobs in the shape of OpenAI's fine-tuning API: the same jobs as under /v1/jobs, with other names for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from asyncflow_api.dependencies import IdempotencyKey, Reads, Submits, TheJobs, once_of, served, submitted
from asyncflow_api.fine_tuning import configuration, parameter_of, refused
from asyncflow_api.jobs.database import NoSuchFile, NoSuchJob
from asyncflow_api.jobs.events import Cursor, Event
from asyncflow_api.jobs.lifecycle import State
from asyncflow_api.jobs.rows import JobRow, NewJob
from asyncflow_api.jobs.service import Invalid, Jobs
from asyncflow_api.jobs.validator import field_of
from asyncflow_api.pages import Limit
from asyncflow_api.problems import Problem
from asyncflow_api.routes.files import After, TheFiles
from asyncflow_api.routes.history import complete_checkpoints
from asyncflow_api.schemas import LabelName, LabelValue
from asyncflow_api.schemas_openai import (
    CheckpointMetrics,
    CreateFineTuningJob,
    FineTuningCheckpoint,
    FineTuningEvent,
    FineTuningJob,
    JobError,
    OpenAIList,
)
from fastapi import APIRouter, Request, Response
from pydantic import TypeAdapter, ValidationError

router = APIRouter(prefix="/v1/fine_tuning", tags=["fine_tuning"])

STATUS: Final[Mapping[State, str]] = {
    State.validating: "validating_files",
    State.queued: "queued",
    State.paused: "paused",
    State.succeeded: "succeeded",
    State.failed: "failed",
    State.cancelled: "cancelled",
}
"""State → status; the others are `running`."""
PREFIX: Final = "ftjob-"
EVENT: Final = "ftevent-"
CHECKPOINT: Final = "ftckpt-"
METRICS: Final = frozenset({"step", "eval"})
"""Types of events that are `metrics`; the others are `message`."""
EVENTS_AT_ONCE: Final = 500
LABEL: Final[TypeAdapter[dict[str, str]]] = TypeAdapter(dict[LabelName, LabelValue])


@router.post("/jobs")
def create(
    body: CreateFineTuningJob,
    response: Response,
    jobs: TheJobs,
    files: TheFiles,
    caller: Submits,
    *,
    idempotency_key: IdempotencyKey = None,
) -> FineTuningJob:
    """Take in a job. The file was looked at when it came; the plan is made next, then it waits for a slot."""
    training = files.get(body.training_file, "body.training_file")
    validation = None
    if body.validation_file is not None:
        row = files.get(body.validation_file, "body.validation_file")
        validation = (row, files.prompts(row.id))
    config, request = configuration(body, (training, files.prompts(training.id)), validation)
    new = NewJob(name=config["name"], config=config, labels=_labels(body.metadata or {}), request=request)
    try:
        row = submitted(jobs, new, once_of(idempotency_key, caller, body), response)
    except NoSuchFile as error:
        raise Problem(400, "no_such_file", f"{error} any more: send it again", field="body.training_file") from None
    except Invalid as error:
        raise refused((one.field, one.message) for one in error.errors) from None
    return _job(jobs, *_known(jobs, row.id))  # of the first time, if it came again: a seed was chosen then


@router.get("/jobs")
def list_jobs(
    request: Request, jobs: TheJobs, _: Reads, after: After = None, limit: Limit = 20
) -> OpenAIList[FineTuningJob]:
    """Jobs that came by this API, the newest first. `metadata[NAME]=VALUE` finds those that have it."""
    names = [(key, value) for key, value in request.query_params.multi_items() if key.startswith("metadata[")]
    metadata = {key.removeprefix("metadata[").removesuffix("]"): value for key, value in names[:16]}
    before = None if after is None else _known(jobs, after, "query.after", status=400)[0].seq
    rows = jobs.database.requests(metadata=metadata, before=before, limit=limit + 1)
    return _list([_job(jobs, row, asked) for row, asked in rows], limit)


@router.get("/jobs/{job_id}")
def get_job(job_id: str, jobs: TheJobs, _: Reads) -> FineTuningJob:
    """One job."""
    return _job(jobs, *_known(jobs, job_id))


@router.post("/jobs/{job_id}/cancel")
def cancel(job_id: str, jobs: TheJobs, _: Submits) -> FineTuningJob:
    """End a job, with a checkpoint where it had begun; its status changes once that is done."""
    return _wish(jobs, job_id, "cancel")


@router.post("/jobs/{job_id}/pause")
def pause(job_id: str, jobs: TheJobs, _: Submits) -> FineTuningJob:
    """Let a run finish what it has begun and then rest."""
    return _wish(jobs, job_id, "pause")


@router.post("/jobs/{job_id}/resume")
def resume(job_id: str, jobs: TheJobs, _: Submits) -> FineTuningJob:
    """Let a run that rests go on."""
    return _wish(jobs, job_id, "resume")


@router.get("/jobs/{job_id}/events")
def events(job_id: str, jobs: TheJobs, _: Reads, after: After = None, limit: Limit = 20) -> OpenAIList[FineTuningEvent]:
    """What happened to a job, the newest first."""
    row, _asked = _known(jobs, job_id)
    end = None if after is None else _event_cursor(after)
    last = deque[Event](maxlen=limit + 1)
    at = Cursor()
    while True:
        found, at = jobs.events_after(row.id, at, EVENTS_AT_ONCE)
        for one in found:
            told = Cursor.parse(one.id)
            if end is not None and told.own >= end.own and told.lines >= end.lines:
                return _list([_event(event) for event in reversed(last)], limit)
            last.append(one)
        if not found:
            return _list([_event(event) for event in reversed(last)], limit)


@router.get("/jobs/{job_id}/checkpoints")
def checkpoints(
    job_id: str, jobs: TheJobs, _: Reads, after: After = None, limit: Limit = 10
) -> OpenAIList[FineTuningCheckpoint]:
    """Complete checkpoints of a run, the newest first."""
    row, asked = _known(jobs, job_id)
    found = []
    for one, written in reversed(list(complete_checkpoints(jobs.folder(row.id).run))):
        step = one.step
        found.append(
            FineTuningCheckpoint(
                id=f"{CHECKPOINT}{_bare(row.id)}-{step:06d}",
                created_at=int(written),
                fine_tuned_model_checkpoint=f"{_model(row, asked)}:ckpt-step-{step}",
                fine_tuning_job_id=f"{PREFIX}{_bare(row.id)}",
                metrics=CheckpointMetrics(step=step),
                step_number=step,
            )
        )
    if after is not None:
        begin = f"{CHECKPOINT}{_bare(row.id)}-"
        if not after.startswith(begin) or not after.removeprefix(begin).isdecimal():
            raise _bad_after()
        found = [one for one in found if one.step_number < int(after.removeprefix(begin))]
    return _list(found, limit)


def _known(
    jobs: Jobs, job_id: str, field: str = "path.fine_tuning_job_id", *, status: int = 404
) -> tuple[JobRow, Mapping[str, Any]]:
    """A job by either spelling of its id, and what was asked for. Raises Problem."""
    try:
        known: tuple[JobRow, Mapping[str, Any]] = jobs.database.request(f"job_{_bare(job_id)}")
        return known
    except NoSuchJob:
        text = (
            f"there is no fine-tuning job {job_id[:64]}: GET /v1/fine_tuning/jobs lists those that there are, and "
            "jobs that came as a configuration are under /v1/jobs"
        )
        raise Problem(status, "no_such_job", text, field=field) from None


def _wish(jobs: Jobs, job_id: str, what: str) -> FineTuningJob:
    row, asked = _known(jobs, job_id)
    return _job(jobs, jobs.wish(row.id, what), asked)


def _bare(job_id: str) -> str:
    """An id without what says in which API it is spelled."""
    return job_id.removeprefix(PREFIX).removeprefix("job_")


def _job(jobs: Jobs, row: JobRow, asked: Mapping[str, Any]) -> FineTuningJob:
    told = served(jobs, row)
    eta = None if told.progress is None or row.ended else told.progress.eta_seconds
    hyperparameters = asked["method"]["reinforcement"]["hyperparameters"]
    error = None
    if row.state is State.failed and told.reason is not None:
        key = field_of(told.reason.message)
        param = None if key == "config" else parameter_of(key)
        error = JobError(code=told.reason.code, message=told.reason.message, param=param)
    return FineTuningJob(
        id=f"{PREFIX}{_bare(row.id)}",
        created_at=int(row.created_at),
        error=error,
        fine_tuned_model=_model(row, asked) if row.state is State.succeeded else None,
        finished_at=None if row.finished_at is None else int(row.finished_at),
        hyperparameters={
            name: hyperparameters[name] for name in ("n_epochs", "batch_size", "learning_rate_multiplier")
        },
        model=asked["model"],
        seed=asked["seed"],
        status=STATUS.get(row.state, "running"),
        training_file=asked["training_file"],
        validation_file=asked["validation_file"],
        estimated_finish=None if eta is None else int(time.time() + eta),
        metadata=asked["metadata"],
        method=asked["method"],
        user_provided_suffix=asked["suffix"],
    )


def _model(row: JobRow, asked: Mapping[str, Any]) -> str:
    return f"ft:{asked['model']}:asyncflow:{asked['suffix'] or ''}:{_bare(row.id)}"


def _event(event: Event) -> FineTuningEvent:
    return FineTuningEvent(
        id=f"{EVENT}{event.id}",
        created_at=int(event.created_at),
        level="warn" if event.level == "warning" else event.level,
        message=event.message,
        type="metrics" if event.type in METRICS else "message",
        data={"type": event.type, **event.data},
    )


def _event_cursor(after: str) -> Cursor:
    try:
        if not after.startswith(EVENT):
            raise ValueError
        cursor: Cursor = Cursor.parse(after.removeprefix(EVENT))
        return cursor
    except ValueError:
        raise _bad_after() from None


def _bad_after() -> Problem:
    text = "after: take the id of the last item of the page before, or leave it out"
    return Problem(400, "bad_cursor", text, field="query.after")


def _labels(metadata: Mapping[str, str]) -> dict[str, str]:
    """Those that can be labels of a job, so that GET /v1/jobs?label= finds it as well."""
    labels: dict[str, str] = {}
    for name, value in metadata.items():
        try:
            labels |= LABEL.validate_python({name: value})
        except ValidationError:
            continue  # longer than a label, or with other characters: it is told here all the same
    return labels


def _list(items: list[Any], limit: int) -> OpenAIList[Any]:
    """A page of the first `limit` items, of which the caller has read one more."""
    kept = items[:limit]
    ids = [one.id for one in kept] or [None]
    return OpenAIList[Any](data=kept, has_more=len(items) > limit, first_id=ids[0], last_id=ids[-1])
