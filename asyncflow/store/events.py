"""The decisions of the table, as plain values. Applied in order they rebuild its state; the journal keeps them.

In JSON (`docs/ledger.md` has every kind) a list of more than `PLAIN` values is written in runs:

    sample ids   [7, [100, 1123]]          7, and then 100, 101, … 1123
    versions     [5, [6, 1023]]            5 once, and then 6 for 1023 times
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final, Literal

import msgspec
import numpy as np

from asyncflow.errors import LedgerError

PLAIN: Final = 64
"""Lists of so many values are always written as they are."""
LONGEST: Final = 1 << 24
"""Values in one list: more make no sense, and would fill the memory."""

LONGEST_PRODUCER: Final = 256
"""Characters."""

LatePolicy = Literal["wait", "drop", "requeue", "mask"]


class Event(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all events. Versions are packed (`PolicyVersion.packed`)."""

    kind: ClassVar[str]
    journaled: ClassVar[bool] = True
    ids: ClassVar[tuple[str, ...]] = ()
    """Fields that are written as runs of consecutive ids."""
    repeated: ClassVar[tuple[str, ...]] = ()
    """Fields that are written as runs of equal values."""

    def to_json(self) -> str:
        long: dict[str, Any] = {
            name: _id_runs(values) for name in self.ids if len(values := getattr(self, name)) > PLAIN
        }
        long |= {name: _equal_runs(values) for name in self.repeated if len(values := getattr(self, name)) > PLAIN}
        if not long:
            return _ENCODER.encode(self).decode()
        return _ENCODER.encode({name: long.get(name, getattr(self, name)) for name in self.__struct_fields__}).decode()

    @property
    def size(self) -> int:
        """How many ids it names: what applying it costs grows with this."""
        return sum(len(getattr(self, name)) for name in self.ids)


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
    """Bytes of needed data above which nothing is admitted, once there are as many samples as a step takes."""
    late_samples: LatePolicy = "wait"
    """What happens to rows that are too old (`docs/staleness.md`)."""
    group_timeout: float | None = None
    """Seconds for which the training stage waits for the missing rows of a group; None: as long as it takes."""


class Amended(Event, frozen=True, kw_only=True):
    """Terms that changed while the run went on: both hold from here on, with these values."""

    kind = "amended"
    max_staleness: int
    last_version: int | None


class PutId(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Names one put, so that repeating it changes nothing."""

    producer: str
    """At most `LONGEST_PRODUCER` characters. The 65,536 producers that put last are known: a put of another one counts
    as new, also when it is repeated."""
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

    @property
    def size(self) -> int:
        return max(len(self.prompt_tokens), len(self.samples.tokens) if self.samples is not None else 0)


class Leased(Event, frozen=True, kw_only=True):
    """Rows went to a worker."""

    kind = "leased"
    ids = ("rows",)
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
    """A lease lives longer. Not journaled: after a restart every lease has new time (`Restarted`)."""

    kind = "renewed"
    journaled = False
    lease_id: int
    deadline: float


class Acked(Event, frozen=True, kw_only=True):
    """A stage's columns were appended to rows of a lease. Row i of the frame belongs to `rows[i]`. A stage that writes
    none has seen the rows: no columns, and −1 for a frame."""

    kind = "acked"
    ids = ("rows",)
    repeated = ("oldest", "newest")
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


class Returned(Event, frozen=True, kw_only=True, omit_defaults=True):
    """Rows came back undone: by their worker, or because the lease ran out."""

    kind = "returned"
    ids = ("rows",)
    lease_id: int
    rows: tuple[int, ...]
    reason: str
    final: bool = False
    """The stage does not want them again. Of a stage that training needs they are quarantined; one that only looks on
    does not get them any more."""


class Committed(Event, frozen=True, kw_only=True):
    """One step: its rows are in the weights that are published as `version`."""

    kind = "committed"
    ids = ("trained", "skipped")
    trained: tuple[int, ...]
    skipped: tuple[int, ...]
    """Consumed by the step without being computed; they end as dropped."""
    version: int
    masked: tuple[tuple[int, int], ...] = ()
    """Trained sample, and the version of the oldest of its tokens that were in the loss: older ones were masked out."""


class Dropped(Event, frozen=True, kw_only=True):
    """Rows ended without being trained."""

    kind = "dropped"
    ids = ("rows",)
    rows: tuple[int, ...]
    reason: str


class Quarantined(Event, frozen=True, kw_only=True):
    """Rows failed for good."""

    kind = "quarantined"
    ids = ("rows",)
    rows: tuple[int, ...]
    reason: str


class Restored(Event, frozen=True, kw_only=True):
    """Rows in quarantine are open again, in their old places."""

    kind = "restored"
    ids = ("rows",)
    rows: tuple[int, ...]


class Requeued(Event, frozen=True, kw_only=True):
    """Rows whose tokens are too old are prompts again, in their old places."""

    kind = "requeued"
    ids = ("rows",)
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
    ids = ("rows",)
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


def _id_runs(ids: tuple[int, ...]) -> list[int | tuple[int, int]]:
    """Runs of consecutive ids as (first, last)."""
    first, last = ids[0], ids[-1]
    if last - first == len(ids) - 1 and ids == tuple(range(first, last + 1)):  # what most often is the case
        return [(first, last)]
    array = np.array(ids, np.int64)
    begins = np.concatenate([[0], np.flatnonzero(np.diff(array) != 1) + 1])
    lasts = array[np.append(begins[1:], len(array)) - 1].tolist()
    return [
        first if first == last else (first, last) for first, last in zip(array[begins].tolist(), lasts, strict=True)
    ]


def _equal_runs(values: tuple[int | None, ...]) -> list[int | tuple[int | None, int] | None]:
    """Runs of equal values as (value, times)."""
    if values.count(values[0]) == len(values):  # what nearly always is the case: one version made them all
        return [(values[0], len(values))]
    runs: list[list[Any]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    return [value if times == 1 else (value, times) for value, times in runs]


def _expand(runs: Sequence[Any], unfold: Callable[[Any, int], Sequence[int | None]]) -> tuple[int | None, ...]:
    values: list[int | None] = []
    for run in runs:
        if not isinstance(run, list):
            values.append(run)
            continue
        first, second = run
        some = unfold(first, second)
        if not 0 < len(some) <= LONGEST - len(values):
            raise ValueError(f"{run} is no run of values")
        values += some
    return tuple(values)


def _unfold_ids(first: int, last: int) -> Sequence[int]:
    return range(first, last + 1)


def _unfold_equal(value: int | None, times: int) -> Sequence[int | None]:
    return [value] * min(times, LONGEST + 1)


class Restarted(Event, frozen=True, kw_only=True):
    """The broker is another process from here on; everybody else goes on as before. Leases live until `deadline` at
    least, on the new process's clock."""

    kind = "restarted"
    deadline: float


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
        Restarted,
    )
}


_ENCODER = msgspec.json.Encoder()
_DECODERS = {kind: msgspec.json.Decoder(event) for kind, event in EVENTS.items()}


def from_json(kind: str, body: str) -> Event:
    """Inverse of `Event.to_json`. Raises LedgerError for an event that this program does not know."""
    try:
        if "[[" not in body and ",[" not in body:  # no runs
            return _DECODERS[kind].decode(body)
        event, fields = EVENTS[kind], msgspec.json.decode(body)
        for name in event.ids:
            fields[name] = _expand(fields[name], _unfold_ids)
        for name in event.repeated:
            fields[name] = _expand(fields[name], _unfold_equal)
        return msgspec.convert(fields, event)
    except (LookupError, TypeError, ValueError) as error:
        raise LedgerError(f"the ledger holds an event {kind!r} that cannot be read: {error}") from None
