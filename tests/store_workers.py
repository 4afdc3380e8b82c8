"""Processes that share a store, each of which may be killed at any moment.

Each writes down what it is about to do before it does it, and what was acknowledged before it goes on, one JSON line
each, in a file of its own. All data follow from the identity of a sample, so that everybody can check them.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from asyncflow.errors import IllegalTransition, LeaseLost
from asyncflow.store.client import Lease
from asyncflow.store.events import PutId
from asyncflow.store.remote import connect
from asyncflow.store.store import Store
from asyncflow.types import PolicyVersion

GROUP, BATCH, STALENESS = 2, 8, 2
SPEC = f"""
num_generations: {GROUP}
train_batch_size: {BATCH}
max_staleness: {STALENESS}
max_attempts: 100000
columns:
  key: int64
  response_ids: list<int32>
  token_versions: list<int64>
  score: float64
stages:
- {{name: write, role: generate, needs: [key], writes: [response_ids, token_versions]}}
- {{name: judge, role: score, needs: [key, response_ids], writes: [score]}}
- {{name: learn, role: train, needs: [key, response_ids, token_versions, score]}}
"""
TTL = 1.0
"""Seconds that a lease lives; whatever is done with one takes milliseconds."""
PRODUCERS = 1 << 32
"""Key of a prompt: number of its producer · this + its number there."""


def response_of(key: int, sample: int) -> list[int]:
    """Every tenth is long."""
    length = 1 + (key + sample) % 7 + (5000 if sample % 10 == 3 else 0)
    first = (key * 31 + sample * 7) % 100_003
    return list(range(first, first + length))


def score_of(response: Sequence[int]) -> float:
    return float(sum(response))


def wrong(sample: int, key: int, response: Sequence[int] | None, score: float | None) -> bool:
    """Whether a sample has values that are not its own."""
    if response is not None and list(response) != response_of(key, sample):
        return True
    return score is not None and score != score_of(response_of(key, sample))


class Diary:
    """What one worker, in all its lives, was about to do and what was acknowledged."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._out = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, what: str, **values: Any) -> None:
        os.write(self._out, json.dumps({"what": what, **values}).encode() + b"\n")


def read_diary(file: Path) -> Iterator[dict[str, Any]]:
    """Whole lines."""
    if file.exists():
        for line in file.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                yield json.loads(line)


def live(role: str, name: str, life: int, home: str, location: str, far: bool, seed: int) -> None:
    """Be a worker until the process is killed, or a file `stop` says to end."""
    folder = Path(home)
    diary = Diary(folder / f"{name}.diary")
    try:
        token = (folder / "store" / "token").read_text()
        store = connect(location, token=token, patience=60.0, local=False if far else None)
        ROLES[role](Worker(role, name, life, folder, store, diary, random.Random(seed)))
    except BaseException as error:
        diary.write("failed", error=f"{type(error).__name__}: {error}")
        raise


class Worker:
    def __init__(
        self, role: str, name: str, life: int, folder: Path, store: Store, diary: Diary, rng: random.Random
    ) -> None:
        self.name = name
        self.worker = f"{name}.{life}"
        self.store = store
        self.diary = diary
        self.rng = rng
        self._stop = folder / "stop"

    @property
    def goes_on(self) -> bool:
        return not self._stop.exists()

    def lease(self, stage: str, rows: int) -> Lease | None:
        return self.store.lease(stage, worker=self.worker, max_rows=rows, ttl=TTL, timeout=0.5)


def produce(me: Worker) -> None:
    """A put whose answer is not known is asked for again; or a new epoch begins, and nobody may ever see it later."""
    number = int(me.name.rpartition("-")[2])
    puts = [line for line in read_diary(me.diary.file) if line["what"] == "put"]
    done = {(line["epoch"], line["sequence"]) for line in read_diary(me.diary.file) if line["what"] == "put done"}
    epoch, sequence, next_key = 0, 0, number * PRODUCERS
    pending: dict[str, Any] | None = None
    if puts:
        last = puts[-1]
        epoch, sequence, next_key = last["epoch"], last["sequence"], max(max(put["keys"]) for put in puts) + 1
        if (epoch, sequence) not in done:
            pending = last
            if me.rng.random() < 0.3:
                epoch, sequence, pending = epoch + 1, 0, None
    while me.goes_on:
        if pending is None:
            sequence += 1
            keys = list(range(next_key, next_key + me.rng.randint(1, 4)))
            next_key += len(keys)
            pending = {"epoch": epoch, "sequence": sequence, "keys": keys}
            me.diary.write("put", **pending)
        put = PutId(producer=me.name, epoch=pending["epoch"], sequence=pending["sequence"])
        prompts = pa.RecordBatch.from_pydict({"key": pa.array(pending["keys"], pa.int64())})
        groups = me.store.admit(prompts, put=put, timeout=0.5)
        if groups is not None:
            me.diary.write("put done", epoch=put.epoch, sequence=put.sequence, groups=list(groups))
            pending = None


def write(me: Worker) -> None:
    """An engine: it serves what the learner has made, and generates with it."""
    version = None
    while me.goes_on:
        if (newest := me.store.counts().learner) != version:
            version = newest
            me.store.serve(me.name, version)
        lease = me.lease("write", me.rng.randint(1, 8))
        if lease is None:
            continue
        samples, keys = lease.sample_ids.tolist(), lease.data.column("key").to_pylist()
        responses = [response_of(key, sample) for key, sample in zip(keys, samples, strict=True)]
        columns = pa.RecordBatch.from_pydict(
            {
                "response_ids": pa.array(responses, pa.list_(pa.int32())),
                "token_versions": pa.array([[version.packed] * len(r) for r in responses], pa.list_(pa.int64())),
            }
        )
        _ack(me, lease, columns)


def judge(me: Worker) -> None:
    while me.goes_on:
        lease = me.lease("judge", me.rng.randint(1, 8))
        if lease is None:
            continue
        _check(me, lease)
        scores = [score_of(response) for response in lease.data.column("response_ids").to_pylist()]
        _ack(me, lease, pa.RecordBatch.from_pydict({"score": pa.array(scores, pa.float64())}))


def learn(me: Worker) -> None:
    leases: list[Lease] = []
    while me.goes_on:
        try:
            if (lease := me.lease("learn", BATCH)) is not None:
                _check(me, lease)
                leases.append(lease)
            for held in leases:
                me.store.renew(held.lease_id, ttl=TTL)
            if sum(held.slots for held in leases) < BATCH:
                continue
            rows = np.concatenate([held.sample_ids for held in leases]).tolist()
            keys = [key for held in leases for key in held.data.column("key").to_pylist()]
            version = PolicyVersion(n=me.store.counts().learner.n + 1)
            me.diary.write("commit", version=version.packed, rows=rows, keys=keys)
            ids = [held.lease_id for held in leases]
            me.store.commit(leases=ids, trained=rows, skipped=[], version=version)
            me.diary.write("commit done", version=version.packed, rows=rows)
        except (LeaseLost, IllegalTransition) as error:
            me.diary.write("refused", why=str(error))
            for held in leases:  # some of them may still be held
                _nack(me, held)
        leases = []


def _nack(me: Worker, lease: Lease) -> None:
    for sample in lease.sample_ids.tolist():
        try:
            me.store.nack(lease.lease_id, [sample], reason="the step is not made")
        except LeaseLost:
            continue


def _ack(me: Worker, lease: Lease, columns: pa.RecordBatch) -> None:
    samples = lease.sample_ids.tolist()
    me.diary.write("ack", lease=lease.lease_id, rows=samples)
    try:
        me.store.ack(lease.lease_id, samples, columns)
        me.diary.write("ack done", lease=lease.lease_id, rows=samples)
    except LeaseLost as error:
        me.diary.write("lost", lease=lease.lease_id, why=str(error))


def _check(me: Worker, lease: Lease) -> None:
    names = lease.data.schema.names
    columns = [lease.data.column(n).to_pylist() if n in names else [None] * len(lease.data) for n in VALUES]
    for sample, key, response, score in zip(lease.sample_ids.tolist(), *columns, strict=True):
        if wrong(sample, key, response, score):
            me.diary.write("wrong", sample=sample, key=key)


VALUES = ("key", "response_ids", "score")
ROLES = {"produce": produce, "write": write, "judge": judge, "learn": learn}
