"""The shell around the table: one lock, condition waits, journal, data. Decisions are the table's.

Every operation is: decide (pure) → journal → apply → wake those for whom something may have become possible.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
import pyarrow as pa

from asyncflow.clock import Clock, SystemClock
from asyncflow.errors import Closed, DamagedData, IllegalTransition, LedgerError, StoreError
from asyncflow.store.client import Counts, Lease, Waited
from asyncflow.store.events import Committed, Event, Leased, Opened
from asyncflow.store.journal import Journal, read_ledger
from asyncflow.store.rows import NONE, Ids
from asyncflow.store.schema import Schema
from asyncflow.store.segments import FileSegments, MemorySegments, Segments, sync_file
from asyncflow.store.table import ADMISSION, LeaseRecord, Table
from asyncflow.types import PolicyVersion

T = TypeVar("T")

OnCommitted = Callable[[Committed, Callable[[], pa.RecordBatch]], None]
"""Is told of every step when the ledger has it and before the data may go. What it is given makes one batch of them:
the trained samples and then the skipped ones, as `sample_id`, `group_id` and every column of the schema that is
written. Everybody waits meanwhile, and it must not raise: the step is committed already."""


class Store:
    """The store of one run, embedded in this process. Implements `StoreClient`; thread-safe."""

    def __init__(self, table: Table, journal: Journal, segments: Segments, clock: Clock) -> None:
        """Use `create` or `reopen`."""
        self.on_committed: OnCommitted | None = None
        self.table = table
        self._journal = journal
        self._segments = segments
        self._clock = clock
        self._schema = table.schema
        self._lock = threading.RLock()
        self._changed = {topic: threading.Condition(self._lock) for topic in (ADMISSION, *table.schema.stages)}
        self._closed = False

    @classmethod
    def create(
        cls, schema: Schema, opened: Opened, *, ledger: Path, data: Path | None = None, clock: Clock | None = None
    ) -> Self:
        """The store of a new run under these terms. `data`: folder of the samples' data; None keeps them in memory.

        Raises LedgerError when the ledger exists, or one of the two cannot be made.
        """
        clock = clock or SystemClock()
        journal = Journal.create(ledger, opened, clock.wall())
        return cls(Table(schema, opened), journal, MemorySegments() if data is None else FileSegments(data), clock)

    @classmethod
    def reopen(
        cls, schema: Schema, *, ledger: Path, data: Path, step: int | None = None, clock: Clock | None = None
    ) -> Self:
        """The store of an earlier process, which has ended, as its ledger tells it, gone back to the version of `step`.

        None stays at the last step. What `Resumed` says has happened. Raises LedgerError when the ledger or the data
        are missing or damaged, IllegalTransition when the ledger cannot go back to `step`.
        """
        clock = clock or SystemClock()
        table = rebuild(schema, ledger)
        events = table.resume(table.learner.n if step is None else step)
        segments = FileSegments(data, needed=table.frames(), after=table.last_frame)
        store = cls(table, Journal(ledger), segments, clock)
        with store._lock:
            # Before any lease could run out: that nobody renewed it is not the fault of its rows.
            store._perform(events)
        return store

    # -- StoreClient ---------------------------------------------------------------------------------------------------

    def admit(
        self, prompts: pa.RecordBatch, *, priorities: Sequence[int] = (), timeout: float
    ) -> tuple[int, ...] | None:
        prompts = _conform(self._schema, prompts, self._schema.prompt_columns)
        tokens = _lengths(prompts.column("prompt_ids"))
        if not tokens:
            return ()

        def attempt(_: float) -> tuple[int, ...] | None:
            if self.table.admit(tokens, frame=0, priorities=priorities) is None:
                return None
            first = self.table.next_group
            with self._frame(prompts, rows=len(tokens) * self.table.group_size) as frame:
                self._perform(self.table.admit(tokens, frame=frame, priorities=priorities) or [])
            return tuple(range(first, first + len(tokens)))

        return self._wait(ADMISSION, attempt, timeout)

    def lease(
        self,
        stage: str,
        *,
        worker: str,
        max_rows: int,
        max_tokens: int | None = None,
        min_rows: int = 1,
        ranks: int | None = None,
        request: str | None = None,
        ttl: float,
        timeout: float,
    ) -> Lease | None:
        if stage not in self._schema.stages:
            raise StoreError(f"there is no stage {stage!r}; the stages are {', '.join(self._schema.stages)}")

        patience = self._clock.monotonic() + timeout

        def attempt(now: float) -> Lease | None:
            while True:
                if request is not None and (granted := self.table.granted(stage, request, ranks=ranks)) is not None:
                    return self._again(granted)
                events = self.table.lease(
                    stage,
                    worker=worker,
                    max_rows=max_rows,
                    max_tokens=max_tokens,
                    deadline=now + ttl,
                    min_rows=min_rows if now < patience else 1,
                    ranks=ranks,
                    request=request,
                    now=now,
                )
                self._perform(events)
                leased = events[-1] if events else None
                if not isinstance(leased, Leased):
                    return None
                if (lease := self._deliver(leased)) is not None:
                    return lease

        return self._wait(stage, attempt, timeout)

    def renew(self, lease_id: int, *, ttl: float) -> None:
        with self._operation() as now:
            self._perform(self.table.renew(lease_id, deadline=now + ttl))

    def ack(self, lease_id: int, sample_ids: Sequence[int], columns: pa.RecordBatch | None = None) -> None:
        if columns is None:
            columns = pa.RecordBatch.from_arrays([], names=[])
        columns = _conform(self._schema, columns, tuple(dict.fromkeys(columns.schema.names)))
        if columns.num_columns and len(columns) != len(sample_ids):
            raise StoreError(f"an ack for {len(sample_ids)} samples brings {len(columns)} rows of columns")
        if not sample_ids:
            return
        _same_lengths(columns, self._schema.token_columns)
        tokens: Sequence[int] = ()
        oldest: Sequence[int | None] = ()
        newest: Sequence[int | None] = ()
        if "token_versions" in columns.schema.names:
            tokens = _lengths(columns.column("response_ids"))
            oldest, newest = _version_span(columns.column("token_versions"))
        data = self._frame(columns, rows=len(sample_ids)) if columns.num_columns else nullcontext(NONE)
        with self._operation(), data as frame:
            self._perform(
                self.table.ack(
                    lease_id,
                    sample_ids,
                    columns=self._schema.mask(columns.schema.names),
                    frame=frame,
                    tokens=tokens,
                    oldest=oldest,
                    newest=newest,
                )
            )

    def nack(self, lease_id: int, sample_ids: Sequence[int], *, reason: str, final: bool = False) -> None:
        with self._operation():
            self._perform(self.table.nack(lease_id, sample_ids, reason=reason, final=final))

    def restore(self, sample_ids: Sequence[int]) -> None:
        with self._operation():
            self._perform(self.table.restore(sample_ids))

    def prioritise(self, priority: int, *, samples: Sequence[int] = (), groups: Sequence[int] = ()) -> None:
        with self._operation():
            self._perform(self.table.prioritise(priority, samples=samples, groups=groups))

    def commit(
        self,
        *,
        leases: Sequence[int],
        trained: Sequence[int],
        skipped: Sequence[int],
        version: PolicyVersion,
        masked: Mapping[int, PolicyVersion] | None = None,
    ) -> None:
        step = {"leases": leases, "trained": trained, "skipped": skipped}
        with self._operation():
            self._perform(self.table.commit(**step, version=version, masked=masked))

    def drop(self, sample_ids: Sequence[int], *, reason: str) -> None:
        with self._operation():
            self._perform(self.table.drop(sample_ids, reason=reason))

    def serve(self, engine: str, version: PolicyVersion | None) -> None:
        with self._operation():
            self._perform(self.table.serve(engine, version))

    def amend(self, *, max_staleness: int | None = None, last_version: int | None = None) -> None:
        with self._operation():
            self._perform(self.table.amend(max_staleness=max_staleness, last_version=last_version))

    def checkpointed(self, version: PolicyVersion, *, oldest: PolicyVersion) -> None:
        with self._operation():
            self._perform(self.table.checkpointed(version, oldest=oldest))

    def sync(self) -> int:
        """See that all data and decisions so far survive a power cut, and remove the data that nobody needs.

        Returns the ledger's last lsn. Raises LedgerError, after which the disk is not to be trusted. Nobody waits for
        it meanwhile.
        """
        with self._operation():
            lsn, files = self._journal.lsn, self._segments.unsynced()
            unneeded = self._segments.unneeded()
        try:
            for path in files:
                sync_file(path)
        except OSError as error:
            raise LedgerError(
                f"the data of the samples cannot be synced ({error}): see that their disk works"
            ) from error
        self._journal.sync()
        # Not before: a ledger that has lost its end in a power cut still needs them.
        for path in unneeded:
            path.unlink(missing_ok=True)
        return lsn

    def awaited(self, topic: str) -> str:
        if topic not in self._changed:
            raise StoreError(f"there is no stage {topic!r}; the stages are {', '.join(self._schema.stages)}")
        with self._operation():
            return self.table.awaited(topic)

    def counts(self) -> Counts:
        with self._lock:
            table = self.table
            return Counts(
                admitted=table.next_sample,
                trained=table.ended["trained"],
                dropped=table.dropped(),
                quarantined=table.ended["quarantined"],
                states={state.value: count for state, count in table.states.items()},
                leased=table.leased(),
                capacity=table.capacity(),
                max_staleness=table.terms.max_staleness,
                learner=table.learner,
                served=dict(table.served),
                oldest=table.oldest(),
                requeued=table.tally["requeued"],
                masked=table.tally["masked"],
                restored=table.tally["restored"],
            )

    def waited_for(self) -> tuple[Waited, ...]:
        with self._lock:
            return tuple(
                Waited(sample_id=row.sample_id, group_id=row.group_id, state=row.state.value, worker=worker)
                for row, worker in self.table.waited_for()
            )

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._journal.close()
            for path in self._segments.unneeded():
                path.unlink(missing_ok=True)
            self._segments.close()
            for condition in self._changed.values():
                condition.notify_all()

    # -- the shell -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _operation(self) -> Iterator[float]:
        """Hold the lock for one operation; the value is the time at which it begins."""
        with self._lock:
            if self._closed:
                raise Closed("the store is closed")
            now = self._clock.monotonic()
            deadline = self.table.next_deadline()
            if deadline is not None and deadline <= now:
                self._perform(self.table.expire(now))
            yield now

    @contextmanager
    def _frame(self, columns: pa.RecordBatch, *, rows: int) -> Iterator[int]:
        """Keep data for what is done inside; when that fails, nobody needs them."""
        frame = self._segments.write(columns, rows=rows)
        try:
            yield frame
        except BaseException:
            self._segments.release(frame, rows)
            raise

    def _wait(self, topic: str, attempt: Callable[[float], T | None], timeout: float) -> T | None:
        """Call `attempt` now and whenever the topic has changed, until it returns something or time is up."""
        deadline = self._clock.monotonic() + timeout
        while True:
            with self._operation() as now:
                result = attempt(now)
                if result is not None or now >= deadline:
                    return result
                wake = self.table.next_deadline()
                self._changed[topic].wait(min(deadline, wake if wake is not None else deadline) - now)

    def _perform(self, events: Sequence[Event]) -> None:
        """Journal decisions, then apply them, then wake the waiters. All of one operation or nothing."""
        self._journal.append(events, self._clock.wall())
        topics: set[str] = set()
        alarm = self.table.next_deadline()
        for event in events:
            if isinstance(event, Committed) and self.on_committed is not None:
                self.on_committed(event, partial(self._samples, event.trained + event.skipped))
            released = self.table.released_by(event)
            topics |= self.table.apply(event)
            for frame, rows in released.items():
                self._segments.release(frame, rows)
        # Waiters sleep until the earliest deadline they know. One that comes before it is news to all of them: the rows
        # of a dead worker come back even when nothing else happens.
        earliest = self.table.next_deadline()
        if earliest is not None and (alarm is None or earliest < alarm):
            topics.update(self._changed)
        for topic in topics:
            self._changed[topic].notify_all()

    def _deliver(self, leased: Leased) -> Lease | None:
        """The rows of a lease with the columns that its stage needs. Those whose data are damaged are quarantined; None
        when no row is left."""
        stage = self._schema.stages[leased.stage]
        while leased.lease_id in self.table.leases:
            ids = self.table.held(leased.lease_id)
            try:
                data = self._gather(ids, stage.needs)
            except DamagedData as damage:
                lost = self.table.rows_of_frame(ids, damage.frame)
                self._perform(self.table.nack(leased.lease_id, lost, reason=str(damage), final=True))
                continue
            return self._lease(leased.lease_id, ids, data)
        return None

    def _again(self, lease_id: int) -> Lease:
        """A lease as it was given. Raises DamagedData."""
        record = self.table.leases[lease_id]
        return self._lease(lease_id, record.rows, self._gather(record.rows, self._schema.stages[record.stage].needs))

    def _lease(self, lease_id: int, ids: Ids, data: Sequence[pa.Array]) -> Lease:
        leased = self.table.leases[lease_id]
        trains = leased.stage == self._schema.train.name
        groups = ids // self.table.group_size
        return Lease(
            lease_id=lease_id,
            stage=leased.stage,
            sample_ids=ids,
            group_ids=groups,
            attempts=self.table.attempts(leased.stage, ids),
            data=pa.RecordBatch.from_arrays(list(data), names=list(self._schema.stages[leased.stage].needs)),
            deadline=leased.deadline,
            slots=len(np.unique(groups)) * self.table.group_size,
            oldest_trainable=self.table.oldest_trainable(lease_id) if trains else 0,
            shares=_shares_of(leased, ids),
        )

    def _samples(self, sample_ids: Sequence[int]) -> pa.RecordBatch:
        """All that is known of some samples that have every column."""
        ids, names = np.array(sample_ids, np.int64), self._schema.written
        arrays = [pa.array(ids), pa.array(ids // self.table.group_size), *self._gather(ids, names)]
        return pa.RecordBatch.from_arrays(arrays, names=["sample_id", "group_id", *names])

    def _gather(self, ids: Ids, columns: Sequence[str]) -> list[pa.Array]:
        if not len(ids):
            return [pa.array([], self._schema.columns[column]) for column in columns]
        return [self._segments.gather(column, *self.table.places(ids, column)) for column in columns]


def _shares_of(lease: LeaseRecord, ids: Ids) -> tuple[Ids, ...]:
    """The shares of those rows of a lease that are given out: damaged ones are not."""
    there = np.isin(lease.rows, ids)
    place = there.cumsum() - 1
    return tuple(place[share[there[share]]] for share in lease.shares)


def rebuild(schema: Schema, ledger: Path) -> Table:
    """The table as a ledger tells it. Raises LedgerError."""
    table: Table | None = None
    for record in read_ledger(ledger):
        try:
            if table is not None:
                table.apply(record.event)
            elif isinstance(record.event, Opened):
                table = Table(schema, record.event)
            else:
                raise LedgerError(f"{ledger} does not begin with the terms of a run: its beginning is lost")
        except (LookupError, TypeError, ValueError, IllegalTransition) as error:
            raise LedgerError(f"{ledger}: event {record.lsn} ({record.event.kind}) makes no sense: {error}") from error
    if table is None:
        raise LedgerError(f"{ledger} is empty: it holds no run")
    return table


def _conform(schema: Schema, batch: pa.RecordBatch, columns: Sequence[str]) -> pa.RecordBatch:
    """The batch with exactly these columns in their types. Raises StoreError naming what does not fit."""
    missing = [name for name in columns if name not in batch.schema.names]
    unknown = [name for name in batch.schema.names if name not in schema.columns or name not in columns]
    twice = sorted({name for name in batch.schema.names if batch.schema.names.count(name) > 1})
    if missing or unknown or twice:
        wrong = {"missing": missing, "not expected": unknown, "there twice": twice}
        found = "; ".join(f"{', '.join(names)} {what}" for what, names in wrong.items() if names)
        raise StoreError(f"columns do not fit: {found}")
    arrays = []
    for name in columns:
        array = batch.column(name)
        if array.type != schema.columns[name]:
            try:
                array = array.cast(schema.columns[name])
            except pa.ArrowException as error:
                raise StoreError(f"column {name} must be {schema.columns[name]}, not {array.type}: {error}") from None
        empty = array.null_count or (array.flatten().null_count if pa.types.is_list(array.type) else 0)
        if empty:
            raise StoreError(f"column {name} has {empty} empty values: every sample and token needs one")
        arrays.append(array)
    return pa.RecordBatch.from_arrays(arrays, names=list(columns))


def _lengths(lists: pa.ListArray) -> list[int]:
    return [int(n) for n in np.diff(lists.offsets.to_numpy())]


def _same_lengths(batch: pa.RecordBatch, token_columns: Sequence[str]) -> None:
    """Columns with a value for each response token must agree on how many there are."""
    lengths = {name: _lengths(batch.column(name)) for name in token_columns if name in batch.schema.names}
    for name, found in lengths.items():
        first = next(iter(lengths))
        if found != lengths[first]:
            raise StoreError(f"columns {first} and {name} do not have the same number of tokens in each sample")


def _version_span(versions: pa.ListArray) -> tuple[list[int | None], list[int | None]]:
    """Oldest and newest packed version in each row."""
    spans = [row.values.to_numpy() if len(row.values) else None for row in versions]
    return (
        [None if span is None else int(span.min()) for span in spans],
        [None if span is None else int(span.max()) for span in spans],
    )
