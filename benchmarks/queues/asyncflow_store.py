"""AsyncFlow's store: a server process that owns the ledger, and clients that write and map segments of Arrow data.

Everything here that calls the store is in `OurStore`, `create` and `_serve`: a change of its interface ends there.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from asyncflow.algorithms.jagged import tensors
from asyncflow.doctor import installed
from asyncflow.store.client import Lease
from asyncflow.store.events import Opened
from asyncflow.store.schema import Schema, Stage
from asyncflow.store.store import EmbeddedStore, Store
from asyncflow.types import PolicyVersion
from benchmarks.queues.base import KINDS, LEARNER, Got, Kind, Place, Queue, Side
from benchmarks.queues.figures import processes
from benchmarks.queues.samples import Ragged, Samples, finished, part

TOKEN = "benchmark"
JUDGED = "judged"
"""A column that no benchmark writes: the stage `parked` waits for it."""
BATCH, STALENESS = 1024, 4095
"""Samples of a step, and a bound that leaves room for four million."""
PATIENCE_S = 5.0
"""For how long a put waits for room."""


def schema_of(kind: Kind) -> Schema:
    """Rollout writes what is not in the prompt; readers need their columns and write nothing."""
    generated = tuple(name for name in kind.columns if name not in (*kind.prompt, "reward"))
    stages = [Stage(name="rollout", role="generate", needs=kind.prompt, writes=generated)]
    if "reward" in kind.columns:
        stages.append(Stage(name="reward", role="score", needs=(*kind.prompt, *generated), writes=("reward",)))
    stages += [
        Stage(name="judge", role="score", needs=kind.prompt, writes=(JUDGED,)),
        Stage(name="parked", role="score", needs=(JUDGED,)),
        *(Stage(name=name, role="score", needs=needs) for name, needs in kind.readers.items() if name != LEARNER),
        Stage(name=LEARNER, role="train", needs=tuple(kind.columns)),
    ]
    types = {name: arrow_type(dtype) for name, dtype in kind.columns.items()} | {JUDGED: pa.float32()}
    return Schema(stages, columns=types, prompt_columns=kind.prompt)


def arrow_type(dtype: str) -> pa.DataType:
    if dtype == "object":
        return pa.binary()
    return pa.list_(arrow_type(dtype.removeprefix("list:"))) if dtype.startswith("list:") else pa.type_for_alias(dtype)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a store is opened with."""

    durability: str = "process"
    max_staleness: int = STALENESS
    group: int = 1


def create(folder: Path, kind: str, terms: Terms) -> EmbeddedStore:
    opened = Opened(
        train_batch_size=BATCH,
        num_generations=terms.group,
        max_staleness=terms.max_staleness,
        last_version=None,
        min_group=1,
        max_attempts=3,
    )
    schema = schema_of(KINDS[kind])
    store = EmbeddedStore.create(schema, opened, ledger=folder / "ledger.sqlite", data=folder / "data", **of(terms))
    store.serve("producer", PolicyVersion(n=0))  # nothing is admitted before an engine serves a version
    return store


def of(terms: Terms) -> dict[str, Any]:
    return {} if terms.durability == "process" else {"durability": terms.durability}


def reopen(folder: Path, kind: str) -> EmbeddedStore:
    return EmbeddedStore.reopen(schema_of(KINDS[kind]), ledger=folder / "ledger.sqlite", data=folder / "data")


class OurStore(Queue):
    """One client, of an embedded store or of one behind Arrow Flight."""

    def __init__(self, store: Store, kind: str) -> None:
        self._store = store
        self._kind = KINDS[kind]
        self._worker = f"bench-{uuid.uuid4().hex[:8]}"
        self._put: list[int] = []
        self._rows: dict[int, Lease] = {}

    def prepare(self, samples: Samples) -> tuple[pa.RecordBatch, pa.RecordBatch]:
        arrays = {name: arrow(column) for name, column in samples.items()}
        return tuple(
            pa.record_batch([arrays[name] for name in names], names=names)
            for names in (list(self._kind.prompt), [name for name in arrays if name not in self._kind.prompt])
        )

    def put(self, batch: tuple[pa.RecordBatch, pa.RecordBatch]) -> None:
        groups = self._store.admit(*batch, timeout=PATIENCE_S)
        if groups is None:
            raise TimeoutError(f"there was no room within {PATIENCE_S:.0f} s")
        self._put += groups

    def put_members(self, order: Sequence[tuple[int, int]], group_size: int) -> None:
        for group in dict.fromkeys(group for group, _ in order):
            if group not in self._rows:
                prompt = pa.record_batch([pa.array([[group]], pa.list_(pa.int64()))], names=["prompt_ids"])
                self._store.admit(prompt, timeout=PATIENCE_S)
                lease = self._store.lease(
                    "rollout", worker=self._worker, max_rows=group_size, ttl=600.0, timeout=PATIENCE_S
                )
                assert lease is not None
                self._rows[group] = lease
        for group, member in order:
            lease = self._rows[group]
            _, columns = self.prepare(finished(1, prompt=2, response=4))
            self._store.ack(
                lease.lease_id, [int(lease.sample_ids[member])], columns.select(["response_ids", "logprobs"])
            )
            scored = self._store.lease("reward", worker=self._worker, max_rows=1, ttl=600.0, timeout=PATIENCE_S)
            assert scored is not None
            self._store.ack(scored.lease_id, scored.sample_ids.tolist(), columns.select(["reward"]))

    def take(
        self, rows: int, *, reader: str = "reader", timeout: float = 0.0, interval: float = 0.0, hold: float = 600.0
    ) -> Lease | None:
        return self._store.lease(reader, worker=self._worker, max_rows=rows, ttl=hold, timeout=timeout)

    def read(self, taken: Lease) -> Mapping[str, Tensor]:
        return tensors(taken.data)

    def done(self, got: Got) -> None:
        self._store.ack(got.handle.lease_id, got.handle.sample_ids.tolist(), pa.record_batch([], names=[]))

    def end(self, got: Got) -> None:
        self._store.drop(got.handle.sample_ids.tolist(), reason="consumed")

    def can_park(self) -> None:
        pass

    def park(self) -> None:
        self._store.lease("parked", worker=self._worker, max_rows=1, ttl=600.0, timeout=3600.0)

    def call(self) -> None:
        self._store.awaited("reader")

    def die(self) -> None:
        self._store.gone(self._worker)

    def clear(self) -> None:
        self._store.drop(self._put, reason="cleared")
        self._put.clear()

    def close(self) -> None:
        self._store.close()


def arrow(column: Ragged | Any) -> pa.Array:
    if isinstance(column, Ragged):
        return pa.ListArray.from_arrays(pa.array(column.offsets.astype("int32")), pa.array(column.values))
    return pa.array(column)


def connect(address: tuple[str, str], *, remote: bool = False) -> OurStore:
    from asyncflow.store.remote import connect as connect_to

    location, kind = address
    return OurStore(connect_to(location, token=TOKEN, local=False if remote else None), kind)


class Served(Place):
    """A store in a process of its own, which listens on the loopback."""

    connect = staticmethod(connect)

    def __init__(self, folder: Path, kind: str, terms: Terms) -> None:
        self._folder, self._kind, self._terms = folder, kind, terms
        self._start(again=False)

    def _start(self, *, again: bool) -> None:
        here, there = processes.Pipe()
        self._process: SpawnProcess = processes.Process(
            target=_serve, args=(str(self._folder), self._kind, self._terms, again, there), daemon=True
        )
        self._process.start()
        there.close()
        self.address = (here.recv(), self._kind)

    def checkpoint(self) -> None:
        """What is acknowledged is kept."""

    def restart(self, *, from_checkpoint: bool) -> None:
        self._process.join()
        self._start(again=True)

    def client(self, *, remote: bool = False) -> OurStore:
        return connect(self.address, remote=remote)

    def servers(self) -> list[int]:
        return [self._process.pid or 0]

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(folder: str, kind: str, terms: Terms, again: bool, answers: Connection) -> None:
    from asyncflow.store.flight import StoreServer

    store = reopen(Path(folder), kind) if again else create(Path(folder), kind, terms)
    server = StoreServer(store, token=TOKEN)
    answers.send(server.location)
    server.serve()


class Embedded(Place):
    """A store in this process: the only clients are threads."""

    connect = staticmethod(connect)

    def __init__(self, folder: Path, kind: str, terms: Terms) -> None:
        self.address = None
        self._kind = kind
        self._store = create(folder, kind, terms)

    def client(self, *, remote: bool = False) -> OurStore:
        assert not remote
        return _Shared(self._store, self._kind)

    def servers(self) -> list[int]:
        return []

    def close(self) -> None:
        self._store.close()


class _Shared(OurStore):
    def close(self) -> None:
        """The store is closed by who opened it."""


class AsyncFlowSide(Side):
    name = "asyncflow"

    def __init__(self, folder: Path, **settings: Any) -> None:
        """`settings`: fields of `Terms` for all its stores."""
        self._folder = folder
        self._settings = settings
        self._numbers = itertools.count()

    @contextmanager
    def open(self, kind: str, **terms: Any) -> Iterator[Place]:
        """`embedded`: without a server. The others are fields of `Terms`."""
        embedded = terms.pop("embedded", False)
        folder = self._folder / f"store-{next(self._numbers)}"
        folder.mkdir(parents=True)
        place = (Embedded if embedded else Served)(folder, kind, Terms(**self._settings, **terms))
        try:
            yield place
        finally:
            place.close()
            shutil.rmtree(folder)

    def recover(self, rows: int) -> dict[str, Any]:
        folder = self._folder / f"store-{next(self._numbers)}"
        folder.mkdir(parents=True)
        filler = processes.Process(target=_fill, args=(str(folder), rows))
        began = time.perf_counter()
        filler.start()
        filler.join()
        fill_s = time.perf_counter() - began
        if filler.exitcode != -signal.SIGKILL:
            raise RuntimeError(f"filling the store failed with exit code {filler.exitcode}")
        began = time.perf_counter()
        store = reopen(folder, "finished")
        seconds = time.perf_counter() - began
        found = store.counts().admitted
        store.close()
        shutil.rmtree(folder)
        return {"rows": rows, "fill_s": fill_s, "recovery_s": [seconds], "found": found}

    def about(self) -> dict[str, Any]:
        return {
            "versions": {name: value for name, value in installed().items() if value is not None},
            "medium": f"segment files and ledger under {self._folder}",
            "durability": "process: what was acknowledged survives kill -9 of every process",
            "checksums": True,
            "processes": "a server and the clients; embedded_…: none",
            "transport": "Arrow Flight over TCP loopback for control, mapped files for data",
        }

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def _fill(folder: str, rows: int) -> None:
    """Put samples one by one, then die as by kill -9."""
    client = OurStore(create(Path(folder), "finished", Terms()), "finished")
    samples = finished(BATCH, prompt=4, response=8)
    batches = [client.prepare(part(samples, row, row + 1)) for row in range(BATCH)]
    for row in range(rows):
        client.put(batches[row % BATCH])
    os.kill(os.getpid(), signal.SIGKILL)


def side(folder: Path, **settings: Any) -> AsyncFlowSide:
    return AsyncFlowSide(folder, **settings)
