"""The ledger of a run, followed while it grows: where every sample is, how it came there, and when.

The store's table knows what is; this knows besides since when, and what has been: nothing of it costs the run anything,
and it is the same for a run that goes on, has ended, or was killed. What is new is read when somebody asks.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from asyncflow.errors import LedgerError, StoreError
from asyncflow.rundir import LEDGER
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
    Restored,
    Resumed,
    Returned,
)
from asyncflow.store.journal import LedgerReader, Record
from asyncflow.store.lifecycle import OPEN_STATES, RAN_OUT, SKIPPED, STATES, State
from asyncflow.store.recovery import apply_record
from asyncflow.store.rows import NONE, Flags, Ids
from asyncflow.store.samplers import NUMBER
from asyncflow.store.schema import Stage
from asyncflow.store.table import Table
from asyncflow.types import PolicyVersion

RATE_WINDOW: Final = 30.0
"""Seconds over which rates are told."""
BEGIN: Final = 4096
"""Samples for which there is room at first."""


class Passed:
    """How many samples went past a point, in the last `RATE_WINDOW` seconds and in all."""

    def __init__(self) -> None:
        self.total = 0
        self._times: deque[tuple[float, int]] = deque()

    def count(self, at: float, samples: int) -> None:
        if samples:
            self.total += samples
            self._times.append((at, samples))
            self._forget(at)

    def rate(self, now: float, began: float) -> float:
        """Samples a second, since `began` where that is later than the window's begin."""
        self._forget(now)
        seconds = min(RATE_WINDOW, now - began)
        return sum(samples for _, samples in self._times) / seconds if seconds > 0 else 0.0

    def _forget(self, now: float) -> None:
        while self._times and self._times[0][0] < now - RATE_WINDOW:
            self._times.popleft()


class Waiting:
    """The samples at one stage, which it has yet to bring something of, and since when."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.came, self.went = Passed(), Passed()
        self._since: dict[int, float] = {}

    @property
    def count(self) -> int:
        return len(self._since)

    def oldest(self, now: float) -> float | None:
        """Seconds for which the first one has been here."""
        # Who comes back after a failure stands in its old place, so the first is the oldest.
        return max(0.0, now - next(iter(self._since.values()))) if self._since else None

    def update(self, ids: Sequence[int], here: Sequence[bool], at: float) -> None:
        came = 0
        for sample_id, is_here in zip(ids, here, strict=True):
            if not is_here:
                self._since.pop(sample_id, None)
            elif sample_id not in self._since:
                self._since[sample_id] = at
                came += 1
        self.came.count(at, came)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What one step trained and skipped."""

    version: PolicyVersion
    at: float
    """Unix time, seconds."""
    staleness: Mapping[int, int]
    """Staleness in policy versions → trained samples."""
    tokens: int
    """In the responses that were trained."""


class Index:
    """What is known of every sample that ever was admitted, as arrays: entry i belongs to sample i."""

    state: NDArray[np.uint8]
    """Place in `STATES`."""
    step: NDArray[np.int32]
    """Number of the step that consumed it, or NONE."""
    oldest: NDArray[np.int64]
    """Packed versions of its oldest and newest token, or NONE."""
    newest: NDArray[np.int64]
    tokens: NDArray[np.int32]
    """In its response."""
    attempts: NDArray[np.int16]
    """How often it was leased to be generated."""
    staleness: NDArray[np.int32]
    """When it was trained, in policy versions, or NONE."""
    masked: dict[int, int]
    """Trained sample → packed version of its oldest token in the loss, where older ones were left out."""
    reasons: dict[int, str]
    """Dropped or quarantined sample → why."""

    _FIELDS: Final = {
        "state": (np.uint8, 0),
        "step": (np.int32, NONE),
        "oldest": (np.int64, NONE),
        "newest": (np.int64, NONE),
        "tokens": (np.int32, 0),
        "attempts": (np.int16, 0),
        "staleness": (np.int32, NONE),
    }

    def __init__(self) -> None:
        self.count = 0
        self.masked = {}
        self.reasons = {}
        for name, (dtype, fill) in self._FIELDS.items():
            setattr(self, name, np.full(BEGIN, fill, dtype))

    def grow(self, count: int) -> None:
        """Have a place for so many samples in all."""
        self.count = max(self.count, count)
        for name, (dtype, fill) in self._FIELDS.items():
            if count > len(old := getattr(self, name)):
                new: NDArray[Any] = np.full(2 * count, fill, dtype)
                new[: len(old)] = old
                setattr(self, name, new)


class Lives:
    """Which event did something to which sample, and in which state that left it: 13 bytes each, in order."""

    def __init__(self) -> None:
        self._count = 0
        self._samples: Ids = np.zeros(BEGIN, np.int64)
        self._lsns: NDArray[np.uint32] = np.zeros(BEGIN, np.uint32)
        self._states: NDArray[np.uint8] = np.zeros(BEGIN, np.uint8)

    def add(self, lsn: int, ids: Ids, states: NDArray[np.uint8]) -> None:
        begin, self._count = self._count, self._count + len(ids)
        if self._count > len(self._samples):
            more = max(self._count, 2 * len(self._samples)) - len(self._samples)
            self._samples = np.concatenate([self._samples, np.zeros(more, np.int64)])
            self._lsns = np.concatenate([self._lsns, np.zeros(more, np.uint32)])
            self._states = np.concatenate([self._states, np.zeros(more, np.uint8)])
        self._samples[begin : self._count] = ids
        self._lsns[begin : self._count] = lsn
        self._states[begin : self._count] = states

    def of(self, sample_id: int) -> list[tuple[int, State]]:
        """The events of a sample, with its state after each."""
        places = np.flatnonzero(self._samples[: self._count] == sample_id)
        states = [STATES[state] for state in self._states[places]]
        return list(zip(self._lsns[places].tolist(), states, strict=True))


class BeingRead(StoreError):
    """A ledger that is long, and read for the first time: who looks again finds more of it read."""


class Follower:
    """Follows one ledger. Whoever looks holds `lock`, calls `catch_up`, and reads then."""

    def __init__(self, run_dir: Path, *, patience: float = math.inf) -> None:
        """Reads nothing yet. `patience`: seconds of processor time after which `catch_up` rather says how far it is."""
        self.lock = threading.RLock()
        self.lsn = 0
        self.began = self.at = 0.0
        """Unix time of the first event and of the last one, in seconds."""
        self.index = Index()
        self.lives = Lives()
        self.steps: list[Trained] = []
        """Those that hold: what a resumed run took back is not among them."""
        self.waiting: dict[str, Waiting] = {}
        self.left: dict[str, Counter[int]] = {"in_flight": Counter(), "in_queue": Counter(), "at_training": Counter()}
        """Staleness → samples, when they were generated, when the learner took them, and when they were trained; each
        time counted."""
        self.generated = self.generated_tokens = self.trained_tokens = self.expired = 0
        """Samples and response tokens that came, those that were trained, and leases that ran out."""
        self._patience = patience
        self._ledger = run_dir / LEDGER
        self._table: Table | None = None
        self._began_with: dict[int, int] = {}
        """Lease of the stage that generates → number of the version with which it began."""

    @property
    def table(self) -> Table:
        """As of the last event. Raises LedgerError before there is one."""
        if self._table is None:
            raise LedgerError(f"{self._ledger} is empty: its run has not begun yet")
        return self._table

    def catch_up(self) -> None:
        """Read what is new. Raises LedgerError, and BeingRead when its patience ends first."""
        began = time.thread_time()
        with self.lock, LedgerReader(self._ledger) as reader:
            if self._table is None:
                self._table = Table(reader.schema, reader.terms())
                self.waiting = {name: Waiting(stage) for name, stage in self._table.schema.stages.items()}
            for record in reader.records(after=self.lsn):
                self._enter(reader, record)
                if time.thread_time() - began > self._patience and self.lsn < (last := reader.last):
                    share = self.lsn / last
                    raise BeingRead(f"the ledger of this run is long and being read, {share:.0%} so far: ask again")

    # -- what is at this moment ----------------------------------------------------------------------------------------

    def in_flight(self) -> dict[int, int]:
        """Samples that are being generated, by how many versions the learner is ahead of the one they began with."""
        found: Counter[int] = Counter()
        for lease_id, lease in self.table.leases.items():
            if (began := self._began_with.get(lease_id)) is not None:
                found[max(0, self.table.learner.n - began)] += lease.left
        return dict(sorted(found.items()))

    def in_queue(self) -> dict[int, int]:
        """Open samples with tokens, by their staleness, were they trained now."""
        rows = self.table.rows
        ids = rows.open()
        ages = self.table.staleness(ids[rows.oldest[ids - rows.base] != NONE])
        found, counts = np.unique(ages, return_counts=True)
        return dict(zip(found.tolist(), counts.tolist(), strict=True))

    def at_training(self) -> dict[int, int]:
        """Trained samples by their staleness."""
        found: Counter[int] = Counter()
        for step in self.steps:
            found.update(step.staleness)
        return dict(sorted(found.items()))

    # -- events --------------------------------------------------------------------------------------------------------

    def _enter(self, reader: LedgerReader, record: Record) -> None:
        event, table = record.event, self.table
        if record.lsn == 1:
            self.began = record.at
        else:
            before = _BEFORE.get(type(event))
            if before is not None:
                before(self, event, record.at)
            apply_record(table, reader, record)
            self._note(event, record)
        self.lsn, self.at = record.lsn, record.at

    def _note(self, event: Event, record: Record) -> None:
        """What an event that has been applied has changed."""
        if isinstance(event, Admitted):
            self.index.grow(self.table.next_sample)
        ids = _touched(event, self.table)
        if not len(ids):
            return
        rows, place = self.table.rows, ids - self.table.rows.base
        self.index.state[ids] = rows.state[place]
        told = ids[rows.state[place] < len(OPEN_STATES)] if isinstance(event, Resumed) else ids
        self.lives.add(record.lsn, told, self.index.state[told])
        if isinstance(event, Admitted | Acked | Requeued | Resumed):
            self.index.oldest[ids], self.index.newest[ids] = rows.oldest[place], rows.newest[place]
            self.index.tokens[ids] = np.maximum(0, rows.tokens[place] - rows.prompt_tokens[place])
        if isinstance(event, Resumed):
            self._take_back(ids)
        if isinstance(event, Leased | Returned | Prioritised):
            return  # whose they are makes no difference to where they are
        named = ids.tolist()
        for name, waiting in self.waiting.items():
            waiting.update(named, self._is_at(ids, name).tolist(), record.at)

    def _is_at(self, ids: Ids, stage: str) -> Flags:
        """Which of these samples have everything that a stage needs, and not yet what it writes."""
        schema, index = self.table.schema, ids - self.table.rows.base
        needs, writes, columns = schema.needs[stage], schema.writes[stage], self.table.rows.columns[index]
        here: Flags = (columns & needs == needs) & (self.table.rows.state[index] < len(OPEN_STATES))
        return here & (columns & writes != writes) if writes else here

    def _leased(self, event: Leased, _: float) -> None:
        table, ids = self.table, np.array(event.rows, np.int64)
        if event.stage == table.schema.generate.name:
            self.index.attempts[ids] += 1
            served = table.served.get(event.worker) or min(table.served.values(), default=table.learner)
            self._began_with[event.lease_id] = served.n
        elif event.stage == table.schema.train.name:
            self.left["in_queue"].update(table.staleness(ids).tolist())

    def _acked(self, event: Acked, at: float) -> None:
        lease = self.table.leases.get(event.lease_id)
        if lease is None:
            return
        self.waiting[lease.stage].went.count(at, len(event.rows))
        if lease.stage == self.table.schema.generate.name:
            self.generated += len(event.rows)
            self.generated_tokens += sum(event.tokens)
            learner = self.table.learner.n
            self.left["in_flight"].update(max(0, learner - (v & NUMBER)) for v in event.oldest if v is not None)

    def _returned(self, event: Returned, _: float) -> None:
        lease = self.table.leases.get(event.lease_id)
        self.expired += lease is not None and event.reason == RAN_OUT.format(lease.worker)

    def _committed(self, event: Committed, at: float) -> None:
        table, index, version = self.table, self.index, PolicyVersion.unpack(event.version)
        trained, skipped = np.array(event.trained, np.int64), np.array(event.skipped, np.int64)
        ages = table.staleness(trained)
        masked = dict(event.masked)
        for place, sample_id in enumerate(event.trained):
            if sample_id in masked:
                ages[place] = table.learner.n - (masked[sample_id] & NUMBER)
        index.masked |= masked
        index.step[trained] = index.step[skipped] = version.n
        index.staleness[trained] = ages
        index.reasons |= dict.fromkeys(event.skipped, SKIPPED)
        found, counts = np.unique(ages, return_counts=True)
        staleness = dict(zip(found.tolist(), counts.tolist(), strict=True))
        tokens = int(index.tokens[trained].sum())
        self.trained_tokens += tokens
        self.left["at_training"].update(staleness)
        self._began_with = {lease: began for lease, began in self._began_with.items() if lease in table.leases}
        self.steps.append(Trained(version=version, at=at, staleness=staleness, tokens=tokens))
        self.waiting[table.schema.train.name].went.count(at, len(trained) + len(skipped))

    def _ended(self, event: Dropped | Quarantined, _: float) -> None:
        self.index.reasons |= dict.fromkeys(event.rows, event.reason)

    def _restored(self, event: Restored, _: float) -> None:
        for sample_id in event.rows:
            self.index.reasons.pop(sample_id, None)

    def _resumed(self, event: Resumed, _: float) -> None:
        number = PolicyVersion.unpack(event.version).n
        self.steps = [step for step in self.steps if step.version.n <= number]
        self._began_with.clear()

    def _take_back(self, ids: Ids) -> None:
        """Of samples that are open again, forget which step consumed them."""
        index = self.index
        back = ids[(index.state[ids] < len(OPEN_STATES)) & (index.step[ids] != NONE)]
        index.step[back] = index.staleness[back] = NONE
        for sample_id in back.tolist():
            index.masked.pop(sample_id, None)
            index.reasons.pop(sample_id, None)


_BEFORE: Mapping[type[Event], Callable[[Follower, Any, float], None]] = {
    Leased: Follower._leased,
    Acked: Follower._acked,
    Returned: Follower._returned,
    Committed: Follower._committed,
    Dropped: Follower._ended,
    Quarantined: Follower._ended,
    Restored: Follower._restored,
    Resumed: Follower._resumed,
}
"""What is noted of an event before it is applied: of the samples as they were."""


def _touched(event: Event, table: Table) -> Ids:
    """Samples that an event has changed."""
    match event:
        case Admitted():
            count = len(event.prompt_tokens) * table.group_size
            return np.arange(event.first_sample, event.first_sample + count)
        case Committed():
            return np.array(event.trained + event.skipped, np.int64)
        case Resumed():
            return table.rows.alive()
        case Prioritised() | Leased() | Acked() | Returned() | Dropped() | Quarantined() | Restored() | Requeued():
            return np.array(event.rows, np.int64)
    return np.zeros(0, np.int64)
