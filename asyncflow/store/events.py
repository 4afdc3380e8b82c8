"""The decisions of the table, as plain values. Applied in order they rebuild its state; the journal keeps them."""

from __future__ import annotations

from typing import ClassVar, Literal

import msgspec

from asyncflow.errors import LedgerError

LatePolicy = Literal["wait", "drop", "requeue", "mask"]


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
    late_samples: LatePolicy = "wait"
    """What happens to rows that are too old (`docs/staleness.md`)."""
    group_timeout: float | None = None
    """Seconds for which the training stage waits for the missing rows of a group; None: as long as it takes."""


class Amended(Event, frozen=True, kw_only=True):
    """Terms that changed while the run went on: both hold from here on, with these values."""

    kind = "amended"
    max_staleness: int
    last_version: int | None


class Admitted(Event, frozen=True, kw_only=True):
    """New groups of `num_generations` samples each, with consecutive ids."""

    kind = "admitted"
    first_group: int
    first_sample: int
    prompt_tokens: tuple[int, ...]
    """One for each group."""
    frame: int
    """Where the data are; group i is row i of the frame."""


class Leased(Event, frozen=True, kw_only=True):
    """Rows went to a worker."""

    kind = "leased"
    lease_id: int
    stage: str
    worker: str
    rows: tuple[int, ...]
    deadline: float
    ranks: int | None = None
    """The rows are shared out among so many ranks."""
    request: str | None = None
    """Who asks for it again under this name gets the same lease."""


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
    masked: tuple[tuple[int, int], ...] = ()
    """Trained sample, and the version of the oldest of its tokens that were in the loss: older ones were masked out."""


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


class Restored(Event, frozen=True, kw_only=True):
    """Rows in quarantine are open again, in their old places."""

    kind = "restored"
    rows: tuple[int, ...]


class Requeued(Event, frozen=True, kw_only=True):
    """Rows whose tokens are too old are prompts again, in their old places."""

    kind = "requeued"
    rows: tuple[int, ...]


class Awaited(Event, frozen=True, kw_only=True):
    """The training stage waits for groups of its step; what they lack at the deadline is given up. Not journaled: after
    a restart the wait begins anew."""

    kind = "awaited"
    journaled = False
    groups: tuple[int, ...]
    deadline: float


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
        Restored,
        Requeued,
        Awaited,
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
