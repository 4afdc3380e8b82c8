"""What the service answers, as values. Fields that a newer service adds are passed over."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final, Generic, TypeVar

from msgspec import Struct, field

ENDED: Final = ("succeeded", "failed", "cancelled")
"""States that a job does not leave."""

Item = TypeVar("Item")


class Value(Struct, frozen=True, kw_only=True):
    """Base of them all."""


class Page(Value, Generic[Item], frozen=True, kw_only=True):
    """A piece of a list."""

    data: list[Item]
    has_more: bool = False
    next_cursor: str | None = None


class Identity(Value, frozen=True, kw_only=True):
    """Who calls."""

    name: str
    scope: str
    """`read`, `submit` or `admin`: each may what the one before may."""
    expires_at: datetime | None


class AccessToken(Value, frozen=True, kw_only=True):
    """A token of the service, without its text."""

    id: str
    name: str
    scope: str
    """`read`, `submit` or `admin`."""
    created_at: datetime
    expires_at: datetime | None


class NewAccessToken(AccessToken, frozen=True, kw_only=True):
    """A token that was just made."""

    token: str
    """Its text, which is told this once."""


# -- jobs --------------------------------------------------------------------------------------------------------------


class Reason(Value, frozen=True, kw_only=True):
    """Why a job is where it is: `code` for programs (docs/jobs.md), `message` for people."""

    code: str
    message: str


class Progress(Value, frozen=True, kw_only=True):
    """How far a run is."""

    step: int
    steps: int
    seconds: float
    eta_seconds: float | None


class Job(Value, frozen=True, kw_only=True):
    """A job, as it was when it was asked for."""

    id: str
    name: str
    state: str
    reason: Reason | None
    priority: int
    labels: dict[str, str]
    resume_from: str | None
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    revision: int
    """Grows with every change: what `Client.change` compares."""
    run_dir: str
    """On the host of the service."""
    starts: int
    progress: Progress | None
    max_staleness: int | None
    config: dict[str, Any] | None = None
    """Resolved, without secrets; None in a list."""
    summary: dict[str, Any] | None = None
    """How the run ended; None before that, and in a list."""

    @property
    def ended(self) -> bool:
        """Whether it goes on no more."""
        return self.state in ENDED


class JobChange(Value, frozen=True, kw_only=True):
    """That something has changed in one of the jobs."""

    id: str
    """Where a stream goes on after it."""
    job_id: str
    job: Job | None
    """As it is now, without `config` and `summary`; None where it was deleted."""


class FieldMessage(Value, frozen=True, kw_only=True):
    """One thing that is wrong in a configuration."""

    field: str
    message: str


class Validation(Value, frozen=True, kw_only=True):
    """What the service says of a configuration, of which it has started nothing."""

    ok: bool
    errors: list[FieldMessage]
    config: dict[str, Any] | None
    """With everything derived filled in; None where something is wrong."""
    plan: dict[str, str]
    """For people: what runs where, how much memory, what a step is."""


class Event(Value, frozen=True, kw_only=True):
    """Something that happened to a job."""

    id: str
    """Where a stream goes on after it."""
    job_id: str
    created_at: datetime
    type: str
    level: str
    """`info`, `warning` or `error`."""
    message: str
    data: dict[str, Any]


class Checkpoint(Value, frozen=True, kw_only=True):
    """A complete checkpoint of a run."""

    id: str
    step: int
    version: str
    digest: str
    bytes: int
    created_at: datetime


# -- the queue ---------------------------------------------------------------------------------------------------------


class Account(Value, frozen=True, kw_only=True):
    """Samples; `admitted == trained + dropped + quarantined + open` always."""

    admitted: int
    trained: int
    dropped: dict[str, int]
    """By reason."""
    quarantined: int
    open: int
    requeued: int
    masked: int
    restored: int


class Stage(Value, frozen=True, kw_only=True):
    """The samples at one stage."""

    name: str
    role: str
    ready: int
    leased: int
    oldest_age_seconds: float | None
    in_per_second: float
    out_per_second: float
    time_to_empty_seconds: float | None
    """None: never, at these rates."""


class Lease(Value, frozen=True, kw_only=True):
    """Samples that a worker has."""

    id: int
    stage: str
    worker: str
    samples: int
    seconds: float | None
    """Left; None where nobody knows, as the run does not go on."""


class Staleness(Value, frozen=True, kw_only=True):
    """Staleness in policy versions → samples (docs/looking_into_a_run.md, "Three kinds of staleness")."""

    in_flight: dict[str, int]
    in_queue: dict[str, int]
    at_training: dict[str, int]


class History(Value, frozen=True, kw_only=True):
    """Staleness at training, step by step."""

    step: list[int]
    histogram: list[dict[str, int]]


class Bottleneck(Value, frozen=True, kw_only=True):
    """What holds the run up."""

    stage: str | None
    text: str


class Queue(Value, frozen=True, kw_only=True):
    """What is in the queue of a run."""

    live: bool
    at: datetime
    max_staleness: int
    learner: str
    """Policy version that the learner has made."""
    served: dict[str, str]
    """Engine → policy version."""
    oldest: str | None
    counts: Account
    states: dict[str, int]
    stages: list[Stage]
    leases: list[Lease]
    staleness: Staleness
    history: History | None
    bytes: int
    capacity: int
    """Samples for which there is room."""
    bottleneck: Bottleneck | None


# -- workers, engines, measurements ------------------------------------------------------------------------------------


class Shares(Value, frozen=True, kw_only=True):
    """Of the last minute, 0 to 1."""

    busy: float
    idle: float
    blocked: float


class Worker(Value, frozen=True, kw_only=True):
    """What a worker does."""

    name: str
    stage: str | None
    activity: str
    """`busy`, `idle` or `blocked`."""
    cause: str | None
    waits_for: str | None
    since_seconds: float
    heartbeat_seconds: float | None
    drained: bool
    shares: Shares


class Span(Value, frozen=True, kw_only=True):
    """What a worker did for a while."""

    worker: str
    activity: str
    start: datetime
    end: datetime
    cause: str | None


class Timeline(Value, frozen=True, kw_only=True):
    """What every worker did lately."""

    spans: list[Span]


class Engine(Value, frozen=True, kw_only=True):
    """What a rollout engine serves."""

    name: str
    kind: str
    served: str | None
    digest: str | None
    attested: bool | None
    """Whether it served what it says when the learner last compared; None: it has not yet."""
    in_flight: int


class Series(Value, frozen=True, kw_only=True):
    """One measurement over the steps."""

    step: list[int]
    time: list[datetime]
    value: list[float | None]
    """None where it was no finite number."""


class Metrics(Value, frozen=True, kw_only=True):
    """Measurements of a run."""

    names: list[str]
    """All that there are, also those that were not asked for."""
    series: dict[str, Series]


# -- samples -----------------------------------------------------------------------------------------------------------


class SampleBrief(Value, frozen=True, kw_only=True):
    """A sample in a list: its texts are cut short."""

    id: int
    group_id: int
    state: str
    step: int | None
    attempts: int
    staleness: int | None
    reward: float | None
    prompt: str | None
    response: str | None
    versions: list[str]
    """Policy versions of its tokens."""
    reason: str | None


class Token(Value, frozen=True, kw_only=True):
    """A token of a prompt."""

    id: int
    text: str | None


class ResponseToken(Token, frozen=True, kw_only=True):
    """A token of a response."""

    logprob: float | None
    ref_logprob: float | None
    version: str | None
    masked: bool | None = None


class Moment(Value, frozen=True, kw_only=True):
    """An event of the ledger about a sample."""

    lsn: int
    at: datetime
    type: str
    message: str


class Sample(SampleBrief, frozen=True, kw_only=True):
    """The whole life of a sample."""

    prompt_tokens: list[Token]
    tokens: list[ResponseToken]
    reward_parts: dict[str, float | None]
    finish_reason: str | None
    events: list[Moment]
    columns: dict[str, Any] = field(default_factory=dict)
    """Further columns of its stages."""
