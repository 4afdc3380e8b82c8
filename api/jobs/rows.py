"""What the database holds, as plain values. Times are seconds since the epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from asyncflow_api.jobs.lifecycle import ENDED, State

Level = Literal["info", "warning", "error"]
Scope = Literal["read", "submit", "admin"]
SCOPES: tuple[Scope, ...] = ("read", "submit", "admin")
"""Each may do what those before it may."""


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why a job is where it is."""

    code: str
    """For programs, such as `killed`."""
    message: str
    """A sentence for people."""


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A job that somebody asks for."""

    name: str
    config: Mapping[str, Any]
    priority: int = 50
    """0 to 100; the highest starts first."""
    labels: Mapping[str, str]
    resume_from: str | None = None
    """Id of a job that has ended, whose run this one goes on with."""
    request: Mapping[str, Any] | None = None
    """What was asked for, where it came as a fine-tuning job: `FineTuningRequest` as JSON."""


@dataclass(frozen=True, kw_only=True)
class JobRow:
    """A job as it was when it was read."""

    seq: int
    """Position in the order of submission."""
    id: str
    name: str
    state: State
    reason: Reason | None
    priority: int
    labels: Mapping[str, str]
    config: Mapping[str, Any]
    """As it was submitted, secrets included."""
    resolved: Mapping[str, Any] | None
    """With everything derived filled in, once the plan was made; secrets included."""
    resume_from: str | None
    max_staleness: int | None
    created_at: float
    updated_at: float
    started_at: float | None
    finished_at: float | None
    revision: int
    """Grows with every change."""
    starts: int
    """How often a process began to run it: never more than once."""

    @property
    def ended(self) -> bool:
        return self.state in ENDED


@dataclass(frozen=True, kw_only=True)
class EventRow:
    """Something that the service says of a job."""

    seq: int
    """Position among the events of all jobs."""
    job_id: str
    n: int
    """Position among the events of its job, from 1; below that it is told to those only who look at all jobs."""
    created_at: float
    type: str
    level: Level
    message: str
    data: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """A token that somebody was given; the token itself is kept nowhere."""

    id: str
    name: str
    scope: Scope
    created_at: float
    expires_at: float | None


@dataclass(frozen=True, kw_only=True)
class FileRow:
    """A file that somebody sent."""

    seq: int
    """Position in the order in which they came."""
    id: str
    name: str
    """As its sender calls it; never part of a path."""
    purpose: str
    bytes: int
    lines: int
    """Problems in it."""
    distinct: int
    """Problems with different prompts."""
    columns: Sequence[str]
    """Those that every line has, beside its prompt."""
    created_at: float


@dataclass(frozen=True, kw_only=True)
class Once:
    """An `Idempotency-Key`, of whom it is, and what it came with."""

    key: str
    owner: str
    """Id of the token."""
    digest: str
    """Of the request's body."""
