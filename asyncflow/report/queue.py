"""What is in the queue of a run, and how it moves: from its ledger, live or ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from asyncflow.report.follow import Follower
from asyncflow.store.client import HeldLease, Stat
from asyncflow.store.stat import counts_of, leases_of
from asyncflow.types import PolicyVersion

MOST_STEPS = 500
"""Steps of which the history tells: the last ones."""


@dataclass(frozen=True, kw_only=True)
class Admissions:
    """The account of all samples: `admitted == trained + dropped + quarantined + open`."""

    admitted: int
    trained: int
    dropped: Mapping[str, int]
    """By reason."""
    quarantined: int
    open: int
    requeued: int
    masked: int
    restored: int


@dataclass(frozen=True, kw_only=True)
class StageQueue:
    """The samples at one stage: it has everything that it needs of them, and has yet to bring what it writes."""

    name: str
    role: str
    ready: int
    """Taken by nobody."""
    leased: int
    oldest_age_seconds: float | None
    """For how long the first of them has been here."""
    in_per_second: float
    """Samples that came, over `follow.RATE_WINDOW` …"""
    out_per_second: float
    """… and that the stage has done."""
    time_to_empty_seconds: float | None
    """At these rates; None: never."""


@dataclass(frozen=True, kw_only=True)
class Staleness:
    """Samples by staleness, in policy versions."""

    in_flight: Mapping[int, int]
    """That are being generated: how far the learner is ahead of the version with which they began."""
    in_queue: Mapping[int, int]
    """Open ones with tokens, were they trained now."""
    at_training: Mapping[int, int]
    """That were trained: when they were."""


@dataclass(frozen=True, kw_only=True)
class History:
    """Staleness at training over the last `MOST_STEPS` steps."""

    step: tuple[int, ...]
    histogram: tuple[Mapping[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Queue:
    """The queue of a run at one moment."""

    at: float
    """Unix time, seconds: now, or of the last event of a run that has ended."""
    max_staleness: int
    learner: PolicyVersion
    served: Mapping[str, PolicyVersion]
    oldest: PolicyVersion | None
    """Oldest policy version among the tokens of the open samples."""
    counts: Admissions
    states: Mapping[str, int]
    """Open samples by state."""
    stages: tuple[StageQueue, ...]
    leases: tuple[HeldLease, ...]
    staleness: Staleness
    history: History
    bytes: int
    capacity: int
    """Samples that could be admitted now."""


def queue_of(follower: Follower, *, now: float | None, stat: Stat | None, size: int) -> Queue:
    """Under the lock of the follower, as it is. Raises LedgerError.

    `now`: Unix time; None: the run has ended. `stat`: what its store says, which alone knows how long leases have.
    `size`: bytes of its data, if the store says nothing.
    """
    table = follower.table
    counts = counts_of(table, size if stat is None else stat.counts.bytes)
    at = follower.at if now is None else max(now, follower.at)
    steps = follower.steps[-MOST_STEPS:]
    return Queue(
        at=at,
        max_staleness=counts.max_staleness,
        learner=counts.learner,
        served=counts.served,
        oldest=counts.oldest,
        counts=Admissions(
            admitted=counts.admitted,
            trained=counts.trained,
            dropped=counts.dropped,
            quarantined=counts.quarantined,
            open=counts.open,
            requeued=counts.requeued,
            masked=counts.masked,
            restored=counts.restored,
        ),
        states=counts.states,
        stages=tuple(
            _stage(follower, name, counts.leased.get(name, 0), at, ended=now is None) for name in follower.waiting
        ),
        leases=_leases(follower, stat, ended=now is None),
        staleness=Staleness(
            in_flight={} if now is None else follower.in_flight(),
            in_queue=follower.in_queue(),
            at_training=follower.at_training(),
        ),
        history=History(
            step=tuple(step.version.n for step in steps), histogram=tuple(step.staleness for step in steps)
        ),
        bytes=counts.bytes,
        capacity=counts.capacity,
    )


def _leases(follower: Follower, stat: Stat | None, *, ended: bool) -> tuple[HeldLease, ...]:
    if stat is not None:
        return stat.leases
    return () if ended else leases_of(follower.table, None)


def _stage(follower: Follower, name: str, leased: int, at: float, *, ended: bool) -> StageQueue:
    waiting = follower.waiting[name]
    came = 0.0 if ended else waiting.came.rate(at, follower.began)
    went = 0.0 if ended else waiting.went.rate(at, follower.began)
    empties = went > came
    return StageQueue(
        name=name,
        role=waiting.stage.role,
        ready=max(0, waiting.count - leased),
        leased=0 if ended else leased,
        oldest_age_seconds=waiting.oldest(at),
        in_per_second=came,
        out_per_second=went,
        time_to_empty_seconds=0.0 if not waiting.count else waiting.count / (went - came) if empties else None,
    )
