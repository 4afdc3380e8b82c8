"""The states of a job, and every move between them. `docs/jobs.md` has the drawing.

A job is moved in one place, `Database.move`, which refuses what is not in `TRANSITIONS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final, Literal

from asyncflow.errors import AsyncFlowError


class State(StrEnum):
    """Where a job is."""

    validating = "validating"
    """Its plan is being made in a process with a deadline."""
    queued = "queued"
    """It waits for a slot."""
    starting = "starting"
    """It has a slot, and its process loads models."""
    running = "running"
    pausing = "pausing"
    """It starts nothing new, and finishes what it has begun."""
    paused = "paused"
    """It computes nothing, and keeps its slot and its memory."""
    resuming = "resuming"
    cancelling = "cancelling"
    """It makes its last checkpoint, or is being killed."""
    succeeded = "succeeded"
    failed = "failed"
    cancelled = "cancelled"


Mover = Literal["client", "scheduler", "run"]
"""Who moves a job: somebody asked for it, the service decided it, or it is what the run did."""

ENDED: Final = frozenset({State.succeeded, State.failed, State.cancelled})
LIVE: Final = frozenset({State.starting, State.running, State.pausing, State.paused, State.resuming, State.cancelling})
"""A process belongs to the job, or is about to; these hold a slot."""

V, Q, S, R = State.validating, State.queued, State.starting, State.running
PG, PD, RS, CG = State.pausing, State.paused, State.resuming, State.cancelling
OK, FAILED, CANCELLED = State.succeeded, State.failed, State.cancelled

TRANSITIONS: Final[Mapping[tuple[State, State], Mover]] = {
    (V, Q): "scheduler",
    (V, FAILED): "scheduler",
    (V, CANCELLED): "client",
    (Q, S): "scheduler",
    (Q, CANCELLED): "client",
    (S, Q): "scheduler",  # the service died before the process began
    (S, R): "run",
    (S, CG): "client",
    (R, PG): "client",
    (R, CG): "client",
    (R, PD): "run",  # somebody steers it without the service
    (PD, R): "run",
    (PG, PD): "run",
    (PG, RS): "client",
    (PG, CG): "client",
    (PD, RS): "client",
    (PD, CG): "client",
    (RS, R): "run",
    (RS, PG): "client",
    (RS, CG): "client",
    **{(state, end): "run" for state in (S, R, PG, PD, RS, CG) for end in (OK, FAILED, CANCELLED)},
}


class IllegalMove(AsyncFlowError):
    """A move that the life of a job does not allow."""

    def __init__(self, at: State, to: State) -> None:
        ways = ", ".join(sorted(there for here, there in TRANSITIONS if here is at))
        super().__init__(f"the job is {at} and cannot become {to}: from here it can become {ways or 'nothing else'}")
        self.at = at
        self.to = to


def check(at: State, to: State) -> None:
    """Raises IllegalMove."""
    if (at, to) not in TRANSITIONS:
        raise IllegalMove(at, to)
