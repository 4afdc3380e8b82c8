"""The store as everybody uses it: columns in, columns out.

A put writes its columns once, as one frame in a segment of the caller's own, and then names the frame to the broker. A
lease answers where the columns of its samples are, and they are read from there without a copy. Who the broker is (in
this process, or over a wire) and where the segments are (files of this host, this process's memory, another host) is
decided when the store is opened, and makes no difference to what happens.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final, Self, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from asyncflow.clock import Clock, SystemClock
from asyncflow.errors import DamagedData, LeaseLost, LedgerError, StoreError, UnknownFrame
from asyncflow.store.account import Account
from asyncflow.store.broker import Broker
from asyncflow.store.client import Control, Counts, Grant, Lease, Place, Stat, Waited
from asyncflow.store.columns import about_tokens, conform, prompt_tokens, same_lengths
from asyncflow.store.data import Data, FileFrames
from asyncflow.store.events import Committed, Opened, PutId, Samples
from asyncflow.store.journal import Durability, Journal, LedgerReader
from asyncflow.store.memory_frames import MemoryFrames
from asyncflow.store.recovery import rebuild
from asyncflow.store.rows import NONE
from asyncflow.store.schema import Schema
from asyncflow.store.shelf import SegmentFolder
from asyncflow.store.snapshot import Snapshots
from asyncflow.store.table import Table
from asyncflow.types import PolicyVersion

OnCommitted = Callable[[Committed, Callable[[], pa.RecordBatch]], None]
"""Is told of every step when the ledger has it and before the data may go. What it is given makes one batch of them:
the trained samples and then the skipped ones, as `sample_id`, `group_id` and every column of the schema that is
written. Everybody waits meanwhile, and it must not raise: the step is committed already."""


RESTART_GRACE = 60.0
"""Seconds for which leases live on after a restart of the broker."""
PUT_TRIES: Final = 8
"""A put that names frames which the broker does not know is made so often, each time with new ones."""
T = TypeVar("T")
HOST_FILE = "host"
"""In the folder of the segments: who reads the same there sees the same folder."""


def _host_of(folder: Path) -> str:
    """Made when it is not there, as a whole or not at all. Raises OSError."""
    path = folder / HOST_FILE
    if not path.exists():
        aside = path.with_name(f"{HOST_FILE}.part")
        aside.write_text(uuid.uuid4().hex, encoding="ascii")
        aside.rename(path)
    return path.read_text(encoding="ascii")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _host_of(folder)
    except OSError as error:
        raise LedgerError(f"the data of the samples in {folder} cannot be opened: {error}") from error


class Store:
    """Implements `StoreClient`; thread-safe."""

    def __init__(
        self, schema: Schema, group_size: int, control: Control, data: Data, clock: Clock | None = None
    ) -> None:
        """Use `create` or `reopen`, or `asyncflow.store.remote.connect`."""
        self._clock = clock or SystemClock()
        self.schema = schema
        self.group_size = group_size
        self._control = control
        self._data = data
        self._waits = threading.Event()
        """Whether the last admission found no room: the next one waits for it before it writes."""

    # -- those who are asked about nothing but samples -----------------------------------------------------------------

    def renew(self, lease_id: int, *, ttl: float) -> None:
        self._control.renew(lease_id, ttl=ttl)

    def nack(self, lease_id: int, sample_ids: Sequence[int], *, reason: str, final: bool = False) -> None:
        self._control.nack(lease_id, sample_ids, reason=reason, final=final)

    def gone(self, worker: str) -> None:
        self._control.gone(worker)

    def restore(self, sample_ids: Sequence[int]) -> None:
        self._control.restore(sample_ids)

    def commit(
        self,
        *,
        leases: Sequence[int],
        trained: Sequence[int],
        skipped: Sequence[int],
        version: PolicyVersion,
        masked: Mapping[int, PolicyVersion] | None = None,
    ) -> None:
        self._control.commit(leases=leases, trained=trained, skipped=skipped, version=version, masked=masked)

    def drop(self, sample_ids: Sequence[int], *, reason: str) -> None:
        self._control.drop(sample_ids, reason=reason)

    def prioritise(self, priority: int, *, samples: Sequence[int] = (), groups: Sequence[int] = ()) -> None:
        self._control.prioritise(priority, samples=samples, groups=groups)

    def serve(self, engine: str, version: PolicyVersion | None) -> None:
        self._control.serve(engine, version)

    def amend(self, *, max_staleness: int | None = None, last_version: int | None = None) -> None:
        self._control.amend(max_staleness=max_staleness, last_version=last_version)

    def checkpointed(self, version: PolicyVersion, *, oldest: PolicyVersion) -> None:
        self._control.checkpointed(version, oldest=oldest)

    def waited_for(self) -> tuple[Waited, ...]:
        return self._control.waited_for()

    def awaited(self, topic: str) -> str:
        return self._control.awaited(topic)

    def counts(self) -> Counts:
        return self._control.counts()

    def stat(self) -> Stat:
        return self._control.stat()

    def close(self) -> None:
        self._control.close()
        self._data.close()

    # -- those that carry data -----------------------------------------------------------------------------------------

    def admit(
        self,
        prompts: pa.RecordBatch,
        samples: pa.RecordBatch | None = None,
        *,
        put: PutId | None = None,
        priorities: Sequence[int] = (),
        timeout: float,
    ) -> tuple[int, ...] | None:
        prompts = conform(prompts, self.schema.columns, self.schema.prompt_columns)
        groups = len(prompts)
        if samples is not None:
            samples = self._conform(samples)
            if len(samples) != groups * self.group_size:
                raise StoreError(
                    f"{groups} prompts have {self.group_size} samples each; {len(samples)} rows of samples are put"
                )
        if not groups:
            return ()
        left = self._until(timeout)
        if self._waits.is_set():
            size = prompts.nbytes + (0 if samples is None else samples.nbytes)
            if not self._control.room(groups, size=size, put=put, timeout=timeout):
                return None
            self._waits.clear()
        first = self._named(lambda: self._admit(prompts, samples, put, priorities, left()))
        if first is None:
            self._waits.set()
            return None
        return tuple(range(first, first + groups))

    def _until(self, timeout: float) -> Callable[[], float]:
        """How many seconds of it are left."""
        deadline = self._clock.monotonic() + timeout
        return lambda: max(0.0, deadline - self._clock.monotonic())

    def _admit(
        self,
        prompts: pa.RecordBatch,
        samples: pa.RecordBatch | None,
        put: PutId | None,
        priorities: Sequence[int],
        timeout: float,
    ) -> int | None:
        frames: list[int] = []
        with self._naming(frames):
            if samples is not None and self.group_size == 1:  # one row each: one frame for both
                arrays, names = [*prompts.columns, *samples.columns], [*prompts.schema.names, *samples.schema.names]
                frames.append(self._append(pa.RecordBatch.from_arrays(arrays, names=names)))
            else:
                frames.append(self._append(prompts))
                if samples is not None:
                    frames.append(self._append(samples))
            return self._control.admit(
                prompt_tokens(prompts),
                frame=frames[0],
                size=prompts.nbytes + (0 if samples is None else samples.nbytes),
                samples=None if samples is None else self._about(samples, frames[-1]),
                put=put,
                priorities=priorities,
                timeout=timeout,
            )

    def _about(self, samples: pa.RecordBatch, frame: int) -> Samples:
        about = {name: tuple(values) for name, values in about_tokens(samples).items()}
        return Samples(columns=self.schema.mask(samples.schema.names), frame=frame, **about)

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
        left = self._until(timeout)
        while True:
            grant = self._control.lease(
                stage,
                worker=worker,
                max_rows=max_rows,
                max_tokens=max_tokens,
                min_rows=min_rows,
                ranks=ranks,
                request=request,
                ttl=ttl,
                timeout=left(),
            )
            if grant is None:
                return None
            if (lease := self._deliver(grant)) is not None:
                return lease

    def ack(self, lease_id: int, sample_ids: Sequence[int], columns: pa.RecordBatch | None = None) -> None:
        columns = self._conform(pa.RecordBatch.from_arrays([], names=[]) if columns is None else columns)
        if columns.num_columns and len(columns) != len(sample_ids):
            raise StoreError(f"an ack for {len(sample_ids)} samples brings {len(columns)} rows of columns")
        if not len(sample_ids):
            return
        self._named(lambda: self._ack(lease_id, sample_ids, columns))

    def _ack(self, lease_id: int, sample_ids: Sequence[int], columns: pa.RecordBatch) -> None:
        frames = [self._append(columns)] if columns.num_columns else []
        with self._naming(frames):
            self._control.ack(
                lease_id,
                sample_ids,
                columns=self.schema.mask(columns.schema.names),
                frame=frames[0] if frames else NONE,
                size=columns.nbytes,
                **about_tokens(columns),
            )

    def read(self, sample_ids: Sequence[int], columns: Sequence[str] | None = None) -> pa.RecordBatch:
        if columns is None:
            columns = self._control.columns_of(sample_ids)
        return self._gather(columns, self._control.places(sample_ids, columns))

    # -- data ----------------------------------------------------------------------------------------------------------

    def _named(self, put: Callable[[], T]) -> T:
        """What a put gives that writes frames and names them to the broker. When there is another broker meanwhile,
        which does not know their segment, it is done again: then nothing has happened."""
        for _ in range(PUT_TRIES - 1):
            with suppress(UnknownFrame):
                return put()
        return put()

    @contextmanager
    def _naming(self, frames: Sequence[int]) -> Iterator[None]:
        try:
            yield
        except UnknownFrame:
            for frame in frames:
                self._data.abandon(frame)
            raise
        finally:
            for frame in frames:
                self._data.settle(frame)

    def _append(self, columns: pa.RecordBatch) -> int:
        try:
            return self._data.append(columns)
        except OSError as error:
            raise LedgerError(
                f"the data of a sample cannot be written ({error}): see that their disk has room"
            ) from error

    def _conform(self, columns: pa.RecordBatch) -> pa.RecordBatch:
        """Columns that a stage brings, whichever they are. Raises StoreError."""
        columns = conform(columns, self.schema.columns, tuple(dict.fromkeys(columns.schema.names)))
        same_lengths(columns, self.schema.token_columns)
        return columns

    def _deliver(self, grant: Grant) -> Lease | None:
        """The rows of a lease with their data. Those whose data are damaged are quarantined; None when none is left."""
        held, places = np.ones(len(grant.sample_ids), np.bool_), grant.places
        while held.any():
            try:
                data = self._gather(self.schema.stages[grant.stage].needs, places)
            except DamagedData as damage:
                lost = np.zeros(len(held), np.bool_)
                lost[held] = np.logical_or.reduce([place.frames == damage.frame for place in places])
                # Those that are still there: one that ended meanwhile may be gone with its segment.
                lost &= np.isin(grant.sample_ids, self._control.held(grant.lease_id))
                with suppress(LeaseLost):  # or who has the same lease said so before
                    if lost.any():
                        ids = grant.sample_ids[lost].tolist()
                        self._control.nack(grant.lease_id, ids, reason=str(damage), final=True)
                # Others may have gone with these, because too little is left of their group.
                held = np.isin(grant.sample_ids, self._control.held(grant.lease_id))
                places = tuple(Place(p.columns, p.frames[held], p.offsets[held]) for p in grant.places)
                continue
            ids = grant.sample_ids[held]
            groups = ids // self.group_size
            return Lease(
                lease_id=grant.lease_id,
                stage=grant.stage,
                sample_ids=ids,
                group_ids=groups,
                attempts=grant.attempts[held],
                data=data,
                deadline=grant.deadline,
                slots=self._slots(groups),
                oldest_trainable=grant.oldest_trainable,
                shares=_shares_of(grant.shares, held),
            )
        return None

    def _slots(self, groups: NDArray[np.int64]) -> int:
        """For how many places of a step the groups of these rows count."""
        return len(groups) if self.group_size == 1 else len(np.unique(groups)) * self.group_size

    def _gather(self, columns: Sequence[str], places: Sequence[Place]) -> pa.RecordBatch:
        if len(set(columns)) < len(columns):
            raise StoreError("a column is asked for twice: name each once")
        found: dict[str, pa.Array] = {}
        for place in places:
            if not len(place.frames):
                found |= {name: pa.array([], self.schema.columns[name]) for name in place.columns}
                continue
            types = {name: self.schema.columns[name] for name in place.columns}
            found |= dict(zip(place.columns, self._data.read(types, place.frames, place.offsets), strict=True))
        return pa.RecordBatch.from_arrays([found[name] for name in columns], names=list(columns))


class EmbeddedStore(Store):
    """The store of one run with its broker in this process."""

    def __init__(self, broker: Broker, data: Data, folder: Path | None = None) -> None:
        super().__init__(broker.table.schema, broker.table.group_size, broker, data, broker.clock)
        self.broker = broker
        self.folder = folder
        """Of the segments; None: they are in this process's memory."""
        self.host = uuid.uuid4().hex if folder is None else _host_of(folder)
        """By which another process knows that it sees the same folder, and that it is the same store as before."""
        self._on_committed: OnCommitted | None = None

    @property
    def table(self) -> Table:
        """To look at; it changes while others use the store."""
        return self.broker.table

    @classmethod
    def create(
        cls,
        schema: Schema,
        opened: Opened,
        *,
        ledger: Path,
        data: Path | None = None,
        durability: Durability = "process",
        clock: Clock | None = None,
    ) -> Self:
        """The store of a new run under these terms. `data`: folder of the samples' data; None keeps them in memory.

        Raises LedgerError when the ledger exists, or one of the two cannot be made.
        """
        clock = clock or SystemClock()
        # The ledger is made last: where there is one, there is a store.
        if data is not None and not ledger.exists():
            _make_folder(data)
        journal = Journal.create(ledger, opened, clock.wall(), schema)
        return cls._open(Table(schema, opened), journal, folder=data, durability=durability, clock=clock)

    @classmethod
    def reopen(
        cls,
        schema: Schema,
        *,
        ledger: Path,
        data: Path,
        step: int | None = None,
        durability: Durability = "process",
        clock: Clock | None = None,
    ) -> Self:
        """The store of an earlier process, which has ended, as its ledger tells it, gone back to the version of `step`.

        None stays at the last step. What `Resumed` says has happened. Raises LedgerError when the ledger or the data
        are missing or damaged, IllegalTransition when the ledger cannot go back to `step`.
        """
        clock = clock or SystemClock()
        table = rebuild(schema, ledger)
        events = table.resume(table.learner.n if step is None else step)
        store = cls._open(table, Journal(ledger), folder=data, durability=durability, clock=clock)
        # Before any lease could run out: that nobody renewed it is not the fault of its rows.
        store.broker.perform(events)
        return store

    @classmethod
    def restart(
        cls, *, ledger: Path, data: Path, durability: Durability = "process", clock: Clock | None = None
    ) -> Self:
        """The store of an earlier process, which has ended, for workers that still live.

        Leases go on as they were, and have `RESTART_GRACE` seconds to be renewed. Raises LedgerError.
        """
        clock = clock or SystemClock()
        with LedgerReader(ledger) as reader:
            schema = reader.schema
        store = cls._open(rebuild(schema, ledger), Journal(ledger), folder=data, durability=durability, clock=clock)
        store.broker.perform(store.table.restart(deadline=clock.monotonic() + RESTART_GRACE))
        return store

    @classmethod
    def _open(
        cls, table: Table, journal: Journal, *, folder: Path | None, durability: Durability, clock: Clock
    ) -> Self:
        if folder is None:
            memory = MemoryFrames()
            account = Account(memory)
            memory.allocate = account.allocate
            return cls(Broker(table, journal, account, memory, durability="memory", clock=clock), memory)
        shelf = SegmentFolder(folder)
        account = Account(shelf, table.frames(), after=table.last_frame)
        snapshots = Snapshots(journal.path, journal)
        broker = Broker(table, journal, account, shelf, durability=durability, snapshots=snapshots, clock=clock)
        try:
            data = FileFrames(folder, broker.allocate, durable=durability == "power")
            shelf.on_removed = data.forget
            return cls(broker, data, folder)
        except OSError as error:
            raise LedgerError(f"the data of the samples in {folder} cannot be opened: {error}") from error

    @property
    def durability(self) -> Durability:
        """What an acknowledged put survives."""
        return self.broker.durability

    def append(self, batch: pa.RecordBatch) -> int:
        """Keep a frame for somebody else, who names it to the broker and then settles it here. Raises LedgerError."""
        return self._append(self._conform(batch))

    def settle(self, frame: int) -> None:
        self._data.settle(frame)

    def read_frames(self, columns: Sequence[str], frames: np.ndarray, offsets: np.ndarray) -> pa.RecordBatch:
        """Rows of frames, for somebody else. Raises DamagedData, and StoreError for columns that there are not."""
        self.schema.mask(columns)
        if len(frames) != len(offsets):
            raise StoreError(f"{len(frames)} frames and {len(offsets)} offsets do not go together")
        return self._gather(columns, (Place(tuple(columns), frames, offsets),))

    @property
    def on_committed(self) -> OnCommitted | None:
        return self._on_committed

    @on_committed.setter
    def on_committed(self, call: OnCommitted) -> None:
        self._on_committed = call
        self.broker.on_committed = lambda event, places: call(event, partial(self._samples, event, places))

    def _samples(self, event: Committed, places: Callable[[Sequence[str]], tuple[Place, ...]]) -> pa.RecordBatch:
        """All that is known of the samples of a step."""
        ids, names = np.array(event.trained + event.skipped, np.int64), self.schema.written
        columns = self._gather(names, places(names))
        arrays = [pa.array(ids), pa.array(ids // self.group_size), *columns.columns]
        return pa.RecordBatch.from_arrays(arrays, names=["sample_id", "group_id", *names])

    def sync(self) -> int:
        """As `Broker.sync`."""
        return self.broker.sync()


def _shares_of(shares: Sequence[np.ndarray], held: np.ndarray) -> tuple[np.ndarray, ...]:
    """The shares of those rows of a lease that are given out: damaged ones are not."""
    place = held.cumsum() - 1
    return tuple(place[share[held[share]]] for share in shares)
