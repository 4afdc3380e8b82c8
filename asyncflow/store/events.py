"""The decisions of the table, as plain values. Applied in order they rebuild its state; the journal keeps them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import ClassVar

from asyncflow.errors import LedgerError


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events. Versions are packed (`PolicyVersion.packed`)."""

    kind: ClassVar[str]
    journaled: ClassVar[bool] = True

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))


@dataclass(frozen=True, kw_only=True)
class Opened(Event):
    """First event of a ledger: the terms under which the rest happened."""

    kind = "opened"
    train_batch_size: int
    num_generations: int
    max_staleness: int
    last_version: int | None
    """Number of the last step's version: nothing is admitted that no step would train."""
    min_group: int
    max_attempts: int
    resumable: bool = False
    """What a step consumed is kept until a checkpoint has passed it, so that it can be taken back."""


@dataclass(frozen=True, kw_only=True)
class Amended(Event):
    """Terms that changed while the run went on: both hold from here on, with these values."""

    kind = "amended"
    max_staleness: int
    last_version: int | None


@dataclass(frozen=True, kw_only=True)
class Admitted(Event):
    """New groups of `num_generations` samples each, with consecutive ids."""

    kind = "admitted"
    first_group: int
    first_sample: int
    prompt_tokens: tuple[int, ...]
    """One for each group."""
    frame: int
    """Where the data are; group i is row i of the frame."""


@dataclass(frozen=True, kw_only=True)
class Leased(Event):
    """Rows went to a worker."""

    kind = "leased"
    lease_id: int
    stage: str
    worker: str
    rows: tuple[int, ...]
    deadline: float


@dataclass(frozen=True, kw_only=True)
class Renewed(Event):
    """A lease lives longer. Not journaled: after a restart all leases are gone."""

    kind = "renewed"
    journaled = False
    lease_id: int
    deadline: float


@dataclass(frozen=True, kw_only=True)
class Acked(Event):
    """A stage's columns were appended to rows of a lease. Row i of the frame belongs to `rows[i]`."""

    kind = "acked"
    lease_id: int
    rows: tuple[int, ...]
    columns: int
    """Bit set."""
    frame: int
    tokens: tuple[int, ...] = ()
    """Response tokens; empty when the stage wrote none."""
    oldest: tuple[int | None, ...] = ()
    """Oldest policy version among the response tokens."""
    newest: tuple[int | None, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Returned(Event):
    """Rows came back undone: by their worker, or because the lease ran out."""

    kind = "returned"
    lease_id: int
    rows: tuple[int, ...]
    reason: str


@dataclass(frozen=True, kw_only=True)
class Committed(Event):
    """One step: its rows are in the weights that are published as `version`."""

    kind = "committed"
    trained: tuple[int, ...]
    skipped: tuple[int, ...]
    """Consumed by the step without being computed; they end as dropped."""
    version: int


@dataclass(frozen=True, kw_only=True)
class Dropped(Event):
    """Rows ended without being trained."""

    kind = "dropped"
    rows: tuple[int, ...]
    reason: str


@dataclass(frozen=True, kw_only=True)
class Quarantined(Event):
    """Rows failed for good."""

    kind = "quarantined"
    rows: tuple[int, ...]
    reason: str


@dataclass(frozen=True, kw_only=True)
class Served(Event):
    """A rollout engine serves a version from now on; None: it is gone."""

    kind = "served"
    engine: str
    version: int | None


@dataclass(frozen=True, kw_only=True)
class Checkpointed(Event):
    """A checkpoint is complete: the run can go on from this version, and from every one since `oldest`."""

    kind = "checkpointed"
    version: int
    oldest: int
    """Of the oldest checkpoint that is kept: what steps up to it consumed is never taken back."""


@dataclass(frozen=True, kw_only=True)
class Resumed(Event):
    """The run goes on in another process, from the checkpoint of number `version.n`.

    Every lease is gone. What later steps had consumed is taken back, in its old place. Responses of later versions are
    generated again: the weights that made them are gone, and `version` is of a new incarnation.
    """

    kind = "resumed"
    version: int


EVENTS: dict[str, type[Event]] = {
    event.kind: event
    for event in (
        Opened,
        Amended,
        Admitted,
        Leased,
        Renewed,
        Acked,
        Returned,
        Committed,
        Dropped,
        Quarantined,
        Served,
        Checkpointed,
        Resumed,
    )
}


def from_json(kind: str, body: str) -> Event:
    """Inverse of `Event.to_json`. Raises LedgerError for an event that this program does not know."""
    try:
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(body).items()}
        return EVENTS[kind](**values)
    except (KeyError, TypeError, ValueError) as error:
        raise LedgerError(f"the ledger holds an event {kind!r} that cannot be read: {error}") from None
