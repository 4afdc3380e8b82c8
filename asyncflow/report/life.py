"""The life of one sample, from its ledger: `asyncflow store trace`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from asyncflow.errors import StoreError
from asyncflow.rundir import DATA
from asyncflow.store.events import (
    Acked,
    Admitted,
    Committed,
    Dropped,
    Event,
    Leased,
    Prioritised,
    Quarantined,
    Requeued,
    Restarted,
    Restored,
    Resumed,
    Returned,
)
from asyncflow.store.frames import OFFSET_BITS
from asyncflow.store.home import ledger_of
from asyncflow.store.replay import replay
from asyncflow.store.rows import NONE
from asyncflow.store.segments import segment_of, segment_path
from asyncflow.store.table import Table
from asyncflow.types import PolicyVersion

WENT_ON = "the run went on from a checkpoint"


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One event of a sample's life."""

    lsn: int
    at: float
    """Unix time, seconds."""
    kind: str
    words: str
    state: str
    """Of the sample after it."""


@dataclass(frozen=True, kw_only=True)
class Values:
    """Where some columns of a sample are."""

    columns: tuple[str, ...]
    file: str
    offset: int
    """Of the frame in the file, in bytes."""
    row: int
    """Of the frame."""
    there: bool
    """Whether the file is."""


@dataclass(frozen=True, kw_only=True)
class Life:
    sample_id: int
    group_id: int
    state: str
    holder: str | None
    """Worker that has it now."""
    moments: tuple[Moment, ...]
    values: tuple[Values, ...]
    """None any more when it has ended for good."""


def life_of(home: Path, sample: int) -> Life:
    """From the ledger of a store's directory or a run's; nothing needs to run. Raises LedgerError, and StoreError for a
    sample that was never admitted."""
    moments: list[Moment] = []
    leases: dict[int, Leased] = {}
    table: Table | None = None
    state = "not admitted"
    for record, table in replay(ledger_of(home)):
        event = record.event
        if isinstance(event, Leased) and sample in event.rows:
            leases[event.lease_id] = event
        before = state
        if event_words := words_of(event, sample, table, leases):
            state = _state(table, sample, event, before)
            moments.append(Moment(lsn=record.lsn, at=record.at, kind=event.kind, words=event_words, state=state))
        elif isinstance(event, Resumed | Restarted) and moments:
            state = _state(table, sample, event, before)
            if state != before or table.row(sample) is not None:
                words = WENT_ON if isinstance(event, Resumed) else "the store was restarted"
                moments.append(Moment(lsn=record.lsn, at=record.at, kind=event.kind, words=words, state=state))
    assert table is not None, "a ledger has its terms"
    if not moments:
        raise StoreError(
            f"sample {sample} was never admitted: "
            + (f"the ledger has 0 to {table.next_sample - 1}" if table.next_sample else "the ledger has none yet")
        )
    row = table.row(sample)
    holders = [] if row is None else [table.leases[lease].worker for lease in row.leases.values()]
    return Life(
        sample_id=sample,
        group_id=sample // table.group_size,
        state=state,
        holder=", ".join(holders) or None,
        moments=tuple(moments),
        values=_values(table, sample, home / DATA),
    )


def _state(table: Table, sample: int, event: Event, before: str) -> str:
    row = table.row(sample)
    if row is not None:
        return str(row.state)
    match event:
        case Committed():
            return "trained" if sample in event.trained else "dropped"
        case Dropped():
            return "dropped"
        case Quarantined():
            return "quarantined"
    return before


def _values(table: Table, sample: int, folder: Path) -> tuple[Values, ...]:
    ids = np.array([sample])
    if not (table.rows.base <= sample < table.rows.end) or not table.rows.has_data(ids)[0]:
        return ()
    found, place = [], sample - table.rows.base
    lines: Sequence[tuple[str, ...]] = (
        table.schema.prompt_columns,
        *(stage.writes for stage in table.schema.stages.values()),
    )
    for line, columns in enumerate(lines):
        if (frame := int(table.rows.frame[line, place])) == NONE:
            continue
        file = segment_path(folder, segment_of(frame))
        offset = frame & (1 << OFFSET_BITS) - 1
        row = int(table.rows.offset[line, place])
        found.append(Values(columns=columns, file=str(file), offset=offset, row=row, there=file.exists()))
    return tuple(found)


def _version(packed: int | None) -> str:
    return "no version" if packed is None else str(PolicyVersion.unpack(packed))


def words_of(event: Event, sample: int, table: Table, leases: Mapping[int, Leased]) -> str | None:
    """What the event did to the sample; None: nothing. `leases`: those that it has been in."""
    words = _WORDS.get(type(event))
    return None if words is None else words(event, sample, table, leases)


def _admitted(event: Admitted, sample: int, table: Table, _: Mapping[int, Leased]) -> str | None:
    place = sample - event.first_sample
    if not 0 <= place < len(event.prompt_tokens) * table.group_size:
        return None
    by = "" if event.put is None else f" by {event.put.producer}, put {event.put.epoch}.{event.put.sequence}"
    finished = "" if event.samples is None else " with what somebody else has generated"
    return f"admitted in group {sample // table.group_size}{by}{finished}"


def _leased(event: Leased, sample: int, _: Table, _leases: Mapping[int, Leased]) -> str | None:
    if sample not in event.rows:
        return None
    return f"leased to {event.worker} for {event.stage} (lease {event.lease_id}, {len(event.rows)} samples)"


def _acked(event: Acked, sample: int, table: Table, leases: Mapping[int, Leased]) -> str | None:
    if sample not in event.rows:
        return None
    place, lease = event.rows.index(sample), leases[event.lease_id]
    what = ", ".join(table.schema.names(event.columns)) or "no columns: it has seen it"
    tokens = f", {event.tokens[place]} tokens" if event.tokens else ""
    versions = ""
    if event.oldest:
        oldest, newest = _version(event.oldest[place]), _version(event.newest[place])
        versions = f" of version {newest}" if oldest == newest else f" of versions {oldest} to {newest}"
    return f"{lease.worker} brought {what}{tokens}{versions}"


def _returned(event: Returned, sample: int, _: Table, leases: Mapping[int, Leased]) -> str | None:
    if sample not in event.rows:
        return None
    lease = leases.get(event.lease_id)
    return f"{'somebody' if lease is None else lease.worker} gave it back undone: {event.reason}"


def _committed(event: Committed, sample: int, _: Table, _leases: Mapping[int, Leased]) -> str | None:
    if sample in event.skipped:
        return f"the step of version {_version(event.version)} consumed it without training it"
    return f"trained in the step of version {_version(event.version)}" if sample in event.trained else None


def _of_rows(words: str) -> Callable[[Any, int, Table, Mapping[int, Leased]], str | None]:
    return lambda event, sample, _table, _leases: words.format(event=event) if sample in event.rows else None


_WORDS: Mapping[type[Event], Callable[[Any, int, Table, Mapping[int, Leased]], str | None]] = {
    Admitted: _admitted,
    Leased: _leased,
    Acked: _acked,
    Returned: _returned,
    Committed: _committed,
    Dropped: _of_rows("dropped: {event.reason}"),
    Quarantined: _of_rows("quarantined: {event.reason}"),
    Restored: _of_rows("put back from quarantine"),
    Requeued: _of_rows("to be generated again, being too old"),
    Prioritised: _of_rows("has priority {event.priority}"),
}
