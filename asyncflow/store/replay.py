"""A run again, from its ledger alone: what the table was at every event, and whether it would decide the same again.

`replay` applies what is recorded. `reenact` asks the table for every decision again, with the inputs that the events
show, and compares: the same rows for the same worker at the same place of the interleaving. That this holds for every
run is the proof that decisions depend on nothing but the table and what they are asked.

Inputs that a ledger does not have are put in so that they cannot matter: a lease is asked for as many rows as it got,
with no bound on tokens; leases that ran out did so because the time that they were given, or renewed to, had passed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xxhash

from asyncflow.errors import LedgerError, StoreError
from asyncflow.store.events import (
    Acked,
    Admitted,
    Amended,
    Awaited,
    Checkpointed,
    Committed,
    Dropped,
    Event,
    Leased,
    Prioritised,
    Quarantined,
    Renewed,
    Requeued,
    Restarted,
    Restored,
    Resumed,
    Returned,
    Served,
)
from asyncflow.store.image import timeless
from asyncflow.store.journal import LedgerReader, Record
from asyncflow.store.lifecycle import HAS_DIED, LATE, RAN_OUT, STRAGGLER
from asyncflow.store.recovery import apply_record
from asyncflow.store.table import Table
from asyncflow.types import PolicyVersion

NEVER = float("inf")


def replay(ledger: Path, *, until: int | None = None) -> Iterator[tuple[Record, Table]]:
    """Every record up to `until`, in order, with the table to which it has just been applied: always the same object.

    Nothing but the ledger is read. Raises LedgerError for a ledger that cannot be read or makes no sense.
    """
    with LedgerReader(ledger) as reader:
        table = Table(reader.schema, reader.terms())
        for record in reader.records(until=until):
            if record.lsn > 1:
                apply_record(table, reader, record)
            yield record, table


def table_at(ledger: Path, until: int | None = None) -> tuple[Table, int]:
    """The table after event `until` (None: the last one), and the lsn of that. Raises LedgerError, also when the ledger
    has no such event."""
    last = deque(replay(ledger, until=until), maxlen=1)
    if not last or until not in (None, last[0][0].lsn):
        raise LedgerError(f"{ledger} has no event {until}: it ends at {last[0][0].lsn if last else 0}")
    return last[0][1], last[0][0].lsn


def digest(table: Table) -> str:
    """xxh3-128 of everything that the table knows: the same on every machine, for the same events."""
    image, arrays = table.dump()
    image = timeless(image)
    image.served, image.ended = dict(sorted(image.served.items())), dict(sorted(image.ended.items()))
    image.reasons = dict(sorted(image.reasons.items()))
    check = xxhash.xxh3_128(msgspec.json.encode(image))
    for name, array in sorted(arrays.items()):
        flat = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        check.update(f"{name} {flat.dtype.str} {flat.shape}\n".encode())
        check.update(flat.reshape(-1).view(np.uint8).data)
    return check.hexdigest()


# -- deciding again ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Operation:
    """Events that were decided at once."""

    records: tuple[Record, ...]

    @property
    def lsn(self) -> int:
        return self.records[0].lsn


class Diverged(LedgerError):
    """The table decides something else than what the ledger says was decided."""


def reenact(ledger: Path, *, until: int | None = None) -> Iterator[tuple[Operation, Table]]:
    """Decide everything again; yields every operation with the table after it. Raises Diverged at the first decision
    that comes out differently, and LedgerError as `replay` does."""
    with LedgerReader(ledger) as reader:
        table = Table(reader.schema, reader.terms())
        records = list(reader.records(after=1, until=until))
        place = 0
        while place < len(records):
            decided = _decide_again(table, [record.event for record in _together(records, place)])
            operation = Operation(tuple(records[place : place + len(decided)]))
            recorded = [record.event for record in operation.records]
            if not decided or recorded != decided:
                raise Diverged(
                    f"{ledger}: event {records[place].lsn} is {in_words(records[place].event)}; the table decides "
                    f"{'; '.join(map(in_words, decided)) or 'nothing'}"
                )
            for record in operation.records:
                apply_record(table, reader, record)
            place += len(decided)
            yield operation, table


def _together(records: Sequence[Record], place: int) -> list[Record]:
    """Those that may belong to the operation that begins here: they have the same time."""
    end = place + 1
    while end < len(records) and records[end].at == records[place].at:
        end += 1
    return list(records[place:end])


def _decide_again(table: Table, events: Sequence[Event]) -> Sequence[Event]:
    """What the table decides when it is asked for what these events, or the first of them, are the answer to."""
    try:
        return _ask(table, events)
    except StoreError as refusal:
        raise Diverged(f"the table refuses what it had decided ({in_words(events[0])}): {refusal}") from refusal


def _ask(table: Table, events: Sequence[Event]) -> Sequence[Event]:
    question = _QUESTIONS.get(type(events[0]))
    return [] if question is None else question(table, events[0], events) or []


def _drop(table: Table, first: Dropped, events: Sequence[Event]) -> Sequence[Event]:
    """Somebody dropped them; or the training stage came to rows that are too old, or has waited too long for some."""
    if first.reason == LATE:
        return _too_old(table, first, events)
    if first.reason == STRAGGLER:
        groups = tuple(sorted({row // table.group_size for row in first.rows}))
        for lease_id in table.leases:
            table.apply(Renewed(lease_id=lease_id, deadline=NEVER))
        table.apply(Awaited(groups=groups, deadline=0.0))
        return table.expire(0.0)
    return table.drop(first.rows, reason=first.reason)


def _too_old(table: Table, _: Event, events: Sequence[Event]) -> Sequence[Event]:
    """The training stage came to rows that are too old, and then may have leased others."""
    train = table.schema.train.name
    rest = next((event for event in events if isinstance(event, Leased)), None)
    if rest is not None and rest.stage == train:
        return _lease(table, rest)
    decided = table.lease(train, worker="", max_rows=1, max_tokens=None, deadline=0.0)
    return [event for event in decided if not isinstance(event, Leased)]


def _admit(table: Table, admitted: Admitted, events: Sequence[Event]) -> Sequence[Event] | None:
    given = {sample: event.priority for event in events if isinstance(event, Prioritised) for sample in event.rows}
    size = table.group_size
    firsts = range(admitted.first_sample, admitted.first_sample + len(admitted.prompt_tokens) * size, size)
    return table.admit(
        admitted.prompt_tokens,
        frame=admitted.frame,
        samples=admitted.samples,
        put=admitted.put,
        priorities=[given.get(first, 0) for first in firsts] if given else (),
    )


def _ack(table: Table, acked: Acked) -> Sequence[Event]:
    return table.ack(
        acked.lease_id,
        acked.rows,
        columns=acked.columns,
        frame=acked.frame,
        tokens=acked.tokens,
        oldest=acked.oldest,
        newest=acked.newest,
    )


def _commit(table: Table, committed: Committed) -> Sequence[Event]:
    version = PolicyVersion.unpack(committed.version)
    return table.commit(
        leases=tuple(table.leases),
        trained=committed.trained,
        skipped=committed.skipped,
        version=version,
        masked={sample: PolicyVersion.unpack(oldest) for sample, oldest in committed.masked},
    )


def _version(packed: int | None) -> PolicyVersion | None:
    return None if packed is None else PolicyVersion.unpack(packed)


def _lease(table: Table, leased: Leased) -> list[Event]:
    return table.lease(
        leased.stage,
        worker=leased.worker,
        max_rows=len(leased.rows),
        max_tokens=None,
        deadline=leased.deadline,
        ranks=leased.ranks,
        request=leased.request,
    )


def _give_back(table: Table, first: Returned, events: Sequence[Event]) -> Sequence[Event]:
    """A worker gave rows back, to be tried again or not; or leases ran out, perhaps several at once."""
    lease = table.leases.get(first.lease_id)
    if lease is not None and first.reason == RAN_OUT.format(lease.worker):
        over = set[int]()
        for event in events:  # another worker may have given rows back at the same time
            if not isinstance(event, Returned) or not _has_run_out(table, event):
                break
            over.add(event.lease_id)
        for lease_id in table.leases:
            table.apply(Renewed(lease_id=lease_id, deadline=0.0 if lease_id in over else NEVER))
        return table.expire(0.0)
    if lease is not None and first.reason == HAS_DIED.format(lease.worker):
        return table.gone(lease.worker)
    return table.nack(first.lease_id, first.rows, reason=first.reason, final=first.final)


def _has_run_out(table: Table, event: Returned) -> bool:
    lease = table.leases.get(event.lease_id)
    return lease is not None and event.reason == RAN_OUT.format(lease.worker)


_QUESTIONS: Mapping[type[Event], Callable[[Table, Any, Sequence[Event]], Sequence[Event] | None]] = {
    Admitted: _admit,
    Prioritised: lambda table, e, _: table.prioritise(e.priority, samples=e.rows),
    Leased: lambda table, e, _: _lease(table, e),
    Dropped: _drop,
    Acked: lambda table, e, _: _ack(table, e),
    Returned: _give_back,
    Committed: lambda table, e, _: _commit(table, e),
    Served: lambda table, e, _: table.serve(e.engine, _version(e.version)),
    Amended: lambda table, e, _: table.amend(max_staleness=e.max_staleness, last_version=e.last_version),
    Checkpointed: lambda table, e, _: table.checkpointed(
        PolicyVersion.unpack(e.version), oldest=PolicyVersion.unpack(e.oldest)
    ),
    Resumed: lambda table, e, _: table.resume(PolicyVersion.unpack(e.version).n),
    Requeued: _too_old,
    Restored: lambda table, e, _: table.restore(e.rows),
    Restarted: lambda table, e, _: table.restart(deadline=e.deadline),
}
"""Kind of an operation's first event → the question whose answer it begins."""


# -- for people --------------------------------------------------------------------------------------------------------


def state_of(table: Table) -> dict[str, Any]:
    """What a run looked like, as plain values for JSON."""
    waits = {row.sample_id: worker for row, worker in table.waited_for()}
    return {
        "learner": str(table.learner),
        "served": {engine: str(version) for engine, version in table.served.items()},
        "oldest": None if (oldest := table.oldest()) is None else str(oldest),
        "max_staleness": table.terms.max_staleness,
        "last_version": table.terms.last_version,
        "capacity": table.capacity(),
        "admitted": table.next_sample,
        "trained": table.ended["trained"],
        "dropped": table.dropped(),
        "quarantined": table.ended["quarantined"],
        "open": {str(state): count for state, count in table.states.items()},
        "leases": [
            {"lease": lease_id, "stage": lease.stage, "worker": lease.worker, "samples": table.held(lease_id).tolist()}
            for lease_id, lease in table.leases.items()
        ],
        "step": {
            "version": table.learner.n + 1,
            "groups": table.groups.first(table.groups_per_step).tolist(),
            "waits_for": [{"sample": sample_id, "worker": worker} for sample_id, worker in waits.items()],
        },
        "digest": digest(table),
    }


def in_words(event: Event) -> str:
    """One event as a short sentence."""
    words = _WORDS.get(type(event))
    if words is not None:
        return words(event)
    return f"{event.kind} " + ", ".join(f"{name} {value}" for name, value in msgspec.structs.asdict(event).items())


def _named(ids: Sequence[int], what: str = "sample") -> str:
    """Ids as runs; of many only the first ones."""
    if not ids:
        return f"no {what}s"
    runs: list[list[int]] = []
    for number in ids:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    listed = ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs[:6])
    more = f" and {sum(b - a + 1 for a, b in runs[6:])} more" if len(runs) > 6 else ""
    return f"{what}{'s' if len(ids) > 1 else ''} {listed}{more}"


def _admitted(event: Admitted) -> str:
    named = _named(range(event.first_group, event.first_group + len(event.prompt_tokens)), "group")
    return f"admitted {named} from sample {event.first_sample} on, frame {event.frame}"


def _committed(event: Committed) -> str:
    skipped = f", skipped {_named(event.skipped)}" if event.skipped else ""
    return f"step {_version(event.version)} trained {_named(event.trained)}{skipped}"


_WORDS: Mapping[type[Event], Callable[[Any], str]] = {
    Admitted: _admitted,
    Leased: lambda e: f"{e.worker} leased {_named(e.rows)} for {e.stage} (lease {e.lease_id})",
    Acked: lambda e: f"lease {e.lease_id} brought columns of {_named(e.rows)}, frame {e.frame}",
    Returned: lambda e: f"lease {e.lease_id} gave back {_named(e.rows)}: {e.reason}",
    Committed: _committed,
    Dropped: lambda e: f"dropped {_named(e.rows)}: {e.reason}",
    Quarantined: lambda e: f"quarantined {_named(e.rows)}: {e.reason}",
    Served: lambda e: f"{e.engine} is gone" if e.version is None else f"{e.engine} serves {_version(e.version)}",
    Amended: lambda e: f"max_staleness is {e.max_staleness}, the last version {e.last_version}",
    Checkpointed: lambda e: (
        f"checkpoint of {_version(e.version)} is complete, the oldest that is kept is {_version(e.oldest)}"
    ),
    Prioritised: lambda e: f"{_named(e.rows)} got priority {e.priority}",
    Resumed: lambda e: f"the run went on from {_version(e.version)}",
    Requeued: lambda e: f"{_named(e.rows)} are to be generated again, being too old",
    Restored: lambda e: f"{_named(e.rows)} came back from quarantine",
    Restarted: lambda e: f"the store was started again, with leases until {e.deadline:.1f} at least",
}
