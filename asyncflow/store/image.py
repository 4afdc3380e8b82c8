"""The table as values: to be kept (`snapshot.py`), to be read in another thread, to be compared.

`FIELDS` has everything that a table remembers; `copy`, `dump` and `load` all follow it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from asyncflow.store.events import Opened, PutId
from asyncflow.store.rows import Marks, Rows
from asyncflow.store.state import Consumed, LeaseRecord, TableState
from asyncflow.types import PolicyVersion

Arrays = Mapping[str, NDArray[Any]]
S = TypeVar("S", bound=TableState)


class LeaseImage(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A lease as plain values; its rows are in an array."""

    lease_id: int
    stage: str
    worker: str
    count: int
    """How many rows were leased."""
    left: int
    """How many of them it holds."""
    deadline: float
    max_staleness: int
    ranks: int | None
    shares: list[list[int]]


class Image(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a table knows besides its arrays, as plain values. Versions are packed."""

    terms: Opened
    next_sample: int
    next_group: int
    next_lease: int
    last_frame: int
    learner: int
    served: dict[str, int]
    ended: dict[str, int]
    reasons: dict[int, list[str]]
    leases: list[LeaseImage]
    requests: list[tuple[str, str, int]]
    """Stage, name, lease."""
    tally: dict[str, int]
    last_step: tuple[tuple[int, ...], tuple[int, ...]] | None
    puts: dict[str, tuple[PutId, int, int]]
    """In the order in which the producers put last."""
    consumed: list[tuple[int, int, int, int]]
    """Step, how many it trained, how many it skipped, how many were masked."""


def _same(value: Any) -> Any:
    return value


class Field(NamedTuple):
    """One thing that a table remembers."""

    name: str
    copied: Callable[[Any], Any] = _same
    """A copy that nothing changes."""
    written: Callable[[Any], Any] | None = None
    """As it is in the `Image`; None: it is not there by itself."""
    read: Callable[[Any, Arrays], Any] = lambda value, _: value


def _leases(images: list[LeaseImage], arrays: Arrays) -> dict[int, LeaseRecord]:
    leases, begin = dict[int, LeaseRecord](), 0
    for image in images:
        rows = arrays["leased"][begin : begin + image.count]
        shares = tuple(np.array(share, np.int64) for share in image.shares)
        leases[image.lease_id] = LeaseRecord(
            image.stage, image.worker, rows, image.left, image.deadline, image.max_staleness, image.ranks, shares
        )
        begin += image.count
    return leases


def _lease_images(leases: Mapping[int, LeaseRecord]) -> list[LeaseImage]:
    return [
        LeaseImage(
            lease_id,
            lease.stage,
            lease.worker,
            len(lease.rows),
            lease.left,
            lease.deadline,
            lease.max_staleness,
            lease.ranks,
            [share.tolist() for share in lease.shares],
        )
        for lease_id, lease in leases.items()
    ]


def _consumed(steps: list[tuple[int, int, int, int]], arrays: Arrays) -> dict[int, Consumed]:
    consumed, begin = dict[int, Consumed](), 0
    for n, trained, skipped, masked in steps:
        rows = arrays["consumed"][begin : begin + trained + skipped]
        consumed[n] = Consumed(rows[:trained], rows[trained:], masked)
        begin += trained + skipped
    return consumed


FIELDS: tuple[Field, ...] = (
    Field("terms", written=_same),
    Field("next_sample", written=_same),
    Field("next_group", written=_same),
    Field("next_lease", written=_same),
    Field("last_frame", written=_same),
    Field("last_step", written=_same),
    Field("learner", _same, lambda version: version.packed, lambda packed, _: PolicyVersion.unpack(packed)),
    Field(
        "served",
        dict,
        lambda served: {engine: version.packed for engine, version in served.items()},
        lambda served, _: {engine: PolicyVersion.unpack(packed) for engine, packed in served.items()},
    ),
    Field("ended", Counter, dict, lambda ended, _: Counter(ended)),
    Field("tally", Counter, dict, lambda tally, _: Counter(tally)),
    Field("puts", dict, dict),
    Field(
        "requests",
        dict,
        lambda requests: [(stage, name, lease) for (stage, name), lease in requests.items()],
        lambda requests, _: {(stage, name): lease for stage, name, lease in requests},
    ),
    Field("leases", lambda leases: {i: copy(lease) for i, lease in leases.items()}, _lease_images, _leases),
    Field(
        "consumed",
        dict,
        lambda steps: [(n, len(step.trained), len(step.skipped), step.masked) for n, step in steps.items()],
        _consumed,
    ),
    # These are arrays.
    Field("rows", Rows.copy),
    Field("groups", Marks.copy),
    Field("taken", Marks.copy),
    Field("_ready", lambda lines: {stage: line.copy() for stage, line in lines.items()}),
    Field("_counts", np.copy),
    # After a restart the wait for groups begins anew, and deadlines follow from the leases.
    Field("awaiting", dict),
    Field("_deadlines", list),
)
"""All that a table remembers, but its schema, which never changes."""


def duplicate(table: S) -> S:
    """The table as it is now, which nothing changes that happens later."""
    other = copy(table)
    for field in FIELDS:
        setattr(other, field.name, field.copied(getattr(table, field.name)))
    return other


def dump(table: TableState) -> tuple[Image, dict[str, NDArray[Any]]]:
    """Everything, for `fill`: plain values, and arrays. Samples that have ended for good are left out."""
    values = {field.name: field.written(getattr(table, field.name)) for field in FIELDS if field.written is not None}
    rows, ids, nothing = table.rows, table.rows.alive(), np.zeros(0, np.int64)
    every = len(ids) == rows.end - rows.base
    index = slice(0, len(ids)) if every else ids - rows.base
    arrays: dict[str, NDArray[Any]] = {
        **{f"rows.{name}": getattr(rows, name)[..., index] for name in rows.fields},
        **{f"ready.{stage}": line.members() for stage, line in table._ready.items()},
        "ids": ids,
        "groups": table.groups.all(),
        "taken": table.taken.all(),
        "counts": table._counts,
        "leased": np.concatenate([nothing, *(lease.rows for lease in table.leases.values())]),
        "consumed": np.concatenate([nothing, *(step.rows for step in table.consumed.values())]),
    }
    return Image(**values, reasons=rows.reasons), arrays


def fill(table: TableState, image: Image, arrays: Arrays) -> None:
    """Make a new table the one that `dump` has told. Raises LookupError, TypeError or ValueError for what it cannot
    have told."""
    rows = table.rows
    rows.fill(image.next_sample, arrays["ids"], {name: arrays[f"rows.{name}"] for name in rows.fields})
    rows.reasons = image.reasons
    table.groups.put(arrays["groups"], there=True)
    table.taken.put(arrays["taken"], there=True)
    for stage, line in table._ready.items():
        line.put(arrays[f"ready.{stage}"], there=True)
    table._counts[:] = arrays["counts"]
    for field in FIELDS:
        if field.written is not None:
            setattr(table, field.name, field.read(getattr(image, field.name), arrays))
    for lease_id, lease in table.leases.items():
        table._set_deadline(lease_id, lease.deadline)


def timeless(image: Image) -> Image:
    """Without deadlines: they are of the clock of one process, and renewals are not journaled."""
    return msgspec.structs.replace(image, leases=[msgspec.structs.replace(i, deadline=0.0) for i in image.leases])


def plain(table: TableState) -> dict[str, Any]:
    """Everything but deadlines as values that stay as they are, and can be compared."""
    image, arrays = dump(table)
    values = msgspec.structs.asdict(timeless(image))
    values |= {name: (array.dtype.str, array.shape, array.tobytes()) for name, array in arrays.items()}
    values["reasons"] = {sample_id: tuple(reasons) for sample_id, reasons in image.reasons.items()}
    values["puts"] = tuple(image.puts.items())
    return values
