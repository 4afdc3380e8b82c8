"""The decisions of the table, as plain values. Applied in order they rebuild its state; the journal keeps them."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from asyncflow.errors import LedgerError


class Event(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all events. Versions are packed (`PolicyVersion.packed`)."""

    kind: ClassVar[str]
    journaled: ClassVar[bool] = True

    def to_json(self) -> str:
        return msgspec.json.encode(self).decode()


class Opened(Event, frozen=True, kw_only=True):
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
    max_rows: int | None = None
    """Open samples above which nothing is admitted."""
    max_bytes: int | None = None
    """Bytes of needed data above which nothing is admitted."""


class Amended(Event, frozen=True, kw_only=True):
    """Terms that changed while the run went on: both hold from here on, with these values."""

    kind = "amended"
    max_staleness: int
    last_version: int | None


class PutId(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Names one put, so that repeating it changes nothing."""

    producer: str
    epoch: int = 0
    """Grows when a producer starts again: puts of an earlier epoch are refused from then on."""
    sequence: int
    """Grows with each put of an epoch."""


class Samples(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Columns that samples have from their admission on, because somebody else has generated them."""

    columns: int
    """Bit set."""
    frame: int
    """Sample i is row i of the frame."""
    tokens: tuple[int, ...] = ()
    """Response tokens."""
    oldest: tuple[int | None, ...] = ()
    """Oldest policy version among the response tokens."""
    newest: tuple[int | None, ...] = ()


class Admitted(Event, frozen=True, kw_only=True):
    """New groups of `num_generations` samples each, with consecutive ids."""

    kind = "admitted"
    first_group: int
    first_sample: int
    prompt_tokens: tuple[int, ...]
    """One for each group."""
    frame: int
    """Where the data are; group i is row i of the frame."""
    samples: Samples | None = None
    """None: they are prompts so far."""
    put: PutId | None = None


class Leased(Event, frozen=True, kw_only=True):
    """Rows went to a worker."""

    kind = "leased"
    lease_id: int
    stage: str
    worker: str
    rows: tuple[int, ...]
    deadline: float


class Renewed(Event, frozen=True, kw_only=True):
    """A lease lives longer. Not journaled: after a restart all leases are gone."""

    kind = "renewed"
    journaled = False
    lease_id: int
    deadline: float


class Acked(Event, frozen=True, kw_only=True):
    """A stage's columns were appended to rows of a lease. Row i of the frame belongs to `rows[i]`. A stage that writes
    none has seen the rows: no columns, and −1 for a frame."""

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


class Returned(Event, frozen=True, kw_only=True):
    """Rows came back undone: by their worker, or because the lease ran out."""

    kind = "returned"
    lease_id: int
    rows: tuple[int, ...]
    reason: str


class Committed(Event, frozen=True, kw_only=True):
    """One step: its rows are in the weights that are published as `version`."""

    kind = "committed"
    trained: tuple[int, ...]
    skipped: tuple[int, ...]
    """Consumed by the step without being computed; they end as dropped."""
    version: int


class Dropped(Event, frozen=True, kw_only=True):
    """Rows ended without being trained."""

    kind = "dropped"
    rows: tuple[int, ...]
    reason: str


class Quarantined(Event, frozen=True, kw_only=True):
    """Rows failed for good."""

    kind = "quarantined"
    rows: tuple[int, ...]
    reason: str


class Prioritised(Event, frozen=True, kw_only=True):
    """Rows have another priority from now on; those that were admitted without one have 0."""

    kind = "prioritised"
    rows: tuple[int, ...]
    priority: int


class Served(Event, frozen=True, kw_only=True):
    """A rollout engine serves a version from now on; None: it is gone."""

    kind = "served"
    engine: str
    version: int | None


class Checkpointed(Event, frozen=True, kw_only=True):
    """A checkpoint is complete: the run can go on from this version, and from every one since `oldest`."""

    kind = "checkpointed"
    version: int
    oldest: int
    """Of the oldest checkpoint that is kept: what steps up to it consumed is never taken back."""


class Resumed(Event, frozen=True, kw_only=True):
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
        Prioritised,
        Served,
        Checkpointed,
        Resumed,
    )
}


def from_json(kind: str, body: str) -> Event:
    """Inverse of `Event.to_json`. Raises LedgerError for an event that this program does not know."""
    try:
        return msgspec.json.decode(body, type=EVENTS[kind])
    except (KeyError, ValueError) as error:
        raise LedgerError(f"the ledger holds an event {kind!r} that cannot be read: {error}") from None
