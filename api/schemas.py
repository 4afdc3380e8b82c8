"""The requests and responses about jobs, tokens and the service itself, as they are on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self

from asyncflow_api.jobs.events import Event
from asyncflow_api.jobs.lifecycle import State
from asyncflow_api.jobs.redaction import Redactor
from asyncflow_api.jobs.rows import JobRow, Level, Scope, TokenRow
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
LabelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$")]
LabelValue = Annotated[str, StringConstraints(max_length=256)]
Labels = Annotated[dict[LabelName, LabelValue], Field(max_length=16)]
Priority = Annotated[int, Field(ge=0, le=100)]
JobId = Annotated[str, StringConstraints(pattern=r"^job_[0-9a-f]{20}$")]
Staleness = Annotated[int, Field(ge=0, le=1_000_000)]


class Request(BaseModel):
    """Base of what clients send: unknown keys are refused, and so is text where a number belongs."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True, use_attribute_docstrings=True)


class Reply(BaseModel):
    """Base of what they are answered. What stands below a field is in the specification as well."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class SubmitJob(Request):
    """A job to run."""

    config: dict[str, Any] = Field(default_factory=dict)
    """As in a configuration file, without `run_dir`; with `resume_from`, the changes to what that run was."""
    name: Name | None = None
    """None takes the configuration's."""
    priority: Priority = 50
    """The highest starts first."""
    labels: Labels = Field(default_factory=dict)
    resume_from: JobId | None = None
    """A job that has ended, with whose run this one goes on."""


class ValidateJob(Request):
    """A configuration to look at."""

    config: dict[str, Any]


class ChangeJob(Request):
    """What may change in a job."""

    max_staleness: Staleness | None = None
    """Of a live run at once."""
    priority: Priority | None = None
    name: Name | None = None
    labels: Labels | None = None
    """Take the place of all that it has."""

    @model_validator(mode="after")
    def _something_changes(self) -> Self:
        if not self.values():
            raise ValueError("nothing would change: give max_staleness, priority, name or labels")
        return self

    def values(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


class ReasonBody(Reply):
    """Why a job is where it is."""

    code: str
    message: str


class Progress(Reply):
    """How far a run is."""

    step: int
    steps: int
    seconds: float
    eta_seconds: float | None


class Job(Reply):
    """A job."""

    id: str
    object: Literal["job"] = "job"
    name: str
    state: State
    reason: ReasonBody | None
    priority: int
    labels: dict[str, str]
    resume_from: str | None
    created_at: str
    updated_at: str
    started_at: str | None
    finished_at: str | None
    revision: int
    run_dir: str
    config: dict[str, Any]
    """With everything derived filled in, once the plan was made; secrets are hidden."""
    starts: int
    """How often a process began to run it: never more than once."""
    progress: Progress | None
    max_staleness: int | None
    summary: dict[str, Any] | None
    """How the run ended: its `summary.json`."""


class ListedJob(Job):
    """A job in a list: without its configuration and its summary."""

    config: dict[str, Any] = Field(exclude=True)
    summary: dict[str, Any] | None = Field(exclude=True)


class Deleted(Reply):
    """That a job is gone."""

    id: str
    object: Literal["job"] = "job"
    deleted: Literal[True] = True


class FieldMessage(Reply):
    """One thing that is wrong in a configuration."""

    field: str
    message: str


class ValidationBody(Reply):
    """What came of a configuration; nothing was started."""

    object: Literal["validation"] = "validation"
    ok: bool
    errors: list[FieldMessage]
    config: dict[str, Any] | None
    """With everything derived filled in; None where something is wrong."""
    plan: dict[str, str]
    """For people: what runs where, how much memory, what a step is, what the bound means."""


class EventBody(Reply):
    """Something that happened to a job."""

    id: str
    """`n.m`: n events of the service and m lines of the run's metrics were told, this one included."""
    object: Literal["event"] = "event"
    job_id: str
    created_at: str
    type: str
    level: Level
    message: str
    data: dict[str, Any]


class CheckpointBody(Reply):
    """A complete checkpoint of a run."""

    id: str
    object: Literal["checkpoint"] = "checkpoint"
    step: int
    version: str
    digest: str
    bytes: int
    created_at: str


class Health(Reply):
    """That the service answers, and what it is."""

    status: Literal["ok"] = "ok"
    version: str


class Login(Request):
    """A token, for a session in a browser."""

    token: Annotated[str, StringConstraints(max_length=512)]


class Me(Reply):
    """Who calls."""

    object: Literal["identity"] = "identity"
    name: str
    scope: Scope
    expires_at: str | None
    session: bool


class NewToken(Request):
    """A token to make."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=100)]
    scope: Scope
    expires_in: Annotated[int, Field(ge=1, le=10 * 365 * 86400)] | None = None
    """Seconds; None never expires."""


class Token(Reply):
    """A token, without the token."""

    id: str
    object: Literal["token"] = "token"
    name: str
    scope: Scope
    created_at: str
    expires_at: str | None


class MadeToken(Token):
    """A new token. It is shown this once."""

    token: str


def rfc3339(seconds: float) -> str:
    """Seconds since the epoch as UTC with milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def when(seconds: float | None) -> str | None:
    return None if seconds is None else rfc3339(seconds)


def job_body(
    row: JobRow, *, run_dir: str, progress: Mapping[str, Any] | None, summary: Mapping[str, Any] | None
) -> Job:
    """A job as it is served: without secrets."""
    hide = Redactor(row.config, row.resolved)
    config = hide.value(row.resolved or row.config)
    bound = row.max_staleness if row.max_staleness is not None else (row.resolved or {}).get("max_staleness")
    if progress is None and summary is not None and "steps" in config:
        progress = {"step": summary.get("steps", 0), "steps": config["steps"], "eta_seconds": None}
        progress = {**progress, "seconds": summary.get("seconds", 0.0)}
    return Job(
        id=row.id,
        name=row.name,
        state=row.state,
        reason=None if row.reason is None else ReasonBody(code=row.reason.code, message=hide.text(row.reason.message)),
        priority=row.priority,
        labels=dict(row.labels),
        resume_from=row.resume_from,
        created_at=rfc3339(row.created_at),
        updated_at=rfc3339(row.updated_at),
        started_at=when(row.started_at),
        finished_at=when(row.finished_at),
        revision=row.revision,
        run_dir=run_dir,
        config=config,
        starts=row.starts,
        progress=None if progress is None else Progress(**progress),
        max_staleness=bound,
        summary=None if summary is None else hide.value(summary),
    )


def event_body(event: Event) -> EventBody:
    return EventBody(
        id=event.id,
        job_id=event.job_id,
        created_at=rfc3339(event.created_at),
        type=event.type,
        level=event.level,
        message=event.message,
        data=dict(event.data),
    )


def token_body(row: TokenRow) -> Token:
    return Token(
        id=row.id, name=row.name, scope=row.scope, created_at=rfc3339(row.created_at), expires_at=when(row.expires_at)
    )
