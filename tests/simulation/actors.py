"""Who uses the store: each is a process that does one thing after the other, dies, and is started again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from asyncflow.errors import DamagedData, LeaseLost, LedgerError, StoreError
from asyncflow.store.client import Lease
from asyncflow.store.events import PutId
from asyncflow.store.schema import COLUMNS
from asyncflow.store.store import Store
from asyncflow.types import PolicyVersion
from tests.test_table_model import JUDGE, LOOK, REWARD, ROLLOUT, TRAIN, insist

from .book import SHORTEST, number_of
from .disk import SimFrames
from .network import Server, control_of
from .world import Killed, Process, World

TTL = SHORTEST


def batch(columns: dict[str, list[Any]]) -> pa.RecordBatch:
    arrays = [pa.array(values, COLUMNS[name]) for name, values in columns.items()]
    return pa.RecordBatch.from_arrays(arrays, names=list(columns))


def prompt_columns(names: Sequence[str]) -> pa.RecordBatch:
    numbers = [number_of(name) for name in names]
    return batch(
        {
            "prompt": list(names),
            "prompt_columns": [str(number) for number in numbers],
            "prompt_ids": [[number] * (1 + number % 3) for number in numbers],
        }
    )


def response_columns(names: Sequence[str], versions: Sequence[tuple[PolicyVersion, ...]]) -> dict[str, list[Any]]:
    return {
        "response": list(names),
        "response_ids": [[number_of(name)] * len(of) for name, of in zip(names, versions, strict=True)],
        "token_versions": [[version.packed for version in of] for of in versions],
    }


@dataclass(eq=False)
class Actor(ABC):
    world: World
    server: Server
    name: str
    pace: float = 0.1
    """Seconds between two things that it does."""
    lives: int = 0
    process: Process = field(init=False)
    store: Store = field(init=False)

    def start(self) -> None:
        self.lives += 1
        self.process = Process(f"{self.name}.{self.lives}")
        self.control = control_of(self.server, self.process)
        frames = self.server.parts.frames(
            self.server.disk, self.process, self.control.allocate, durable=self.server.durability == "power"
        )
        self.frames: SimFrames = frames
        read = frames.batch

        def batch(frame: int) -> pa.RecordBatch:
            try:
                return read(frame)
            except DamagedData:
                insist(self.server.disk.is_hurt(frame), "only what is damaged is refused", frame)
                raise

        frames.batch = batch  # type: ignore[method-assign]
        self.store = self.server.parts.store(
            self.server.schema, self.server.terms.num_generations, self.control, frames, clock=self.world
        )
        self.begin()
        process = self.process
        self.world.spawn(process, lambda: self._live(process))

    def begin(self) -> None:  # noqa: B027
        """A new life."""

    def _live(self, process: Process) -> None:
        try:
            while self.server.over is None and not process.dead:
                self.world.sleep(self.world.chance.uniform(0.2, 1.8) * self.pace)
                if process.dead or self.world.fault("client killed", f"between calls of {self.kind}", 0.004):
                    break
                self._step(process)
        finally:
            self.die(process)

    def _step(self, process: Process) -> None:
        try:
            self.act()
        except LeaseLost:
            self.world.note(f"{self.name} is too late")
        except LedgerError as error:
            self.world.note(f"{self.name}: {error}")
            if self.frames._failed:
                raise Killed from None
        except StoreError as error:
            self.world.note(f"{self.name}: {type(error).__name__} {error}")

    def die(self, process: Process | None = None) -> None:
        """It is started again after a while, unless it has been already."""
        process = process or self.process
        process.dead = True
        if process is self.process:
            self.world.note(f"{process.name} dies")
            self.process = Process(f"{self.name}: nobody")
            self.world.at(self.world.chance.uniform(0.05, 3.0), self.start)

    def killed(self) -> None:
        """From outside; whoever waits inside of a call finds out when he returns."""
        if not self.process.name.endswith("nobody"):
            self.die()

    @abstractmethod
    def act(self) -> None:
        """Do one thing."""

    @property
    def kind(self) -> str:
        return type(self).__name__

    # what comes back is what was put

    def check_data(self, lease: Lease) -> None:
        self.check_columns(lease.sample_ids.tolist(), lease.data)

    def check_columns(self, samples: Sequence[int], data: pa.RecordBatch) -> None:
        book, size = self.server.book, self.server.terms.num_generations
        for name in data.schema.names:
            for sample, value in zip(samples, data.column(name).to_pylist(), strict=True):
                # It may have been generated again since it was told where the data are.
                if name.startswith("prompt"):
                    keys = [book.prompts[sample // size]]
                else:
                    keys = (book.rewards if name == "reward" else book.responses).get(sample, [])
                right = name not in READ or any(READ[name](key, value) for key in keys)
                insist(right, "what is read is what was put", name, sample, value, keys)


READ: dict[str, Callable[[str, Any], bool]] = {
    "prompt": lambda key, value: value == key,
    "prompt_columns": lambda key, value: value == str(number_of(key)),
    "prompt_ids": lambda key, value: set(value) == {number_of(key)},
    "response": lambda key, value: value == key,
    "response_ids": lambda key, value: set(value) == {number_of(key)},
    "reward": lambda key, value: value == number_of(key),
}
"""Column → whether a value is that of somebody who has this name."""


@dataclass(eq=False)
class Producer(Actor):
    put: PutId | None = None
    sequence: int = 0
    rows: int = 1
    with_samples: int = 0
    """0: prompts; 1: with responses; 2: with rewards."""
    waits: bool = False
    last: tuple[PutId, int, int, tuple[int, ...]] | None = None

    def begin(self) -> None:
        self.put, self.sequence, self.last = None, 0, None

    def act(self) -> None:
        chance = self.world.chance
        if self.last is not None and chance.random() < 0.15:
            put, rows, with_samples, groups = self.last
            again = self._admit(put, rows, with_samples)
            insist(again in (groups, None), "a put that is repeated gets the same answer", put, groups, again)
            return
        if self.put is None:
            self.sequence += 1
            self.put = PutId(producer=self.name, epoch=self.lives, sequence=self.sequence)
            most = self.server.terms.train_batch_size // self.server.terms.num_generations
            self.rows = chance.randint(1, max(1, most))
            self.with_samples = chance.choice([0, 0, 0, 1, 2])
        groups_ = self._admit(self.put, self.rows, self.with_samples)
        if groups_ is not None:
            self.last = self.put, self.rows, self.with_samples, groups_
            self.put = None
        elif chance.random() < 0.3:
            self.put = None  # it asks for something else

    def _admit(self, put: PutId, rows: int, with_samples: int) -> tuple[int, ...] | None:
        size, chance, cuts = self.server.terms.num_generations, self.world.chance, self.server.cuts
        names = [f"{put.producer}/{put.epoch}/{put.sequence}/{place}" for place in range(rows)]
        samples = None
        if with_samples:
            made = [f"{name}/{i}" for name in names for i in range(size)]
            number = max(0, self.server.book.version.n - chance.randrange(2))
            version = PolicyVersion(incarnation=self.server.book.resumed, n=number)
            columns = response_columns(made, [(version, version)] * len(made))
            if with_samples == 2:
                columns["reward"] = [float(number_of(name)) for name in made]
            samples = batch(columns)
            self._real: list[int | None] = [number] * len(made)
        prompts = prompt_columns(names)
        append, written = self.frames.append, []

        def remembered(columns: pa.RecordBatch) -> int:
            frame = append(columns)
            if with_samples and "response" in columns.schema.names:
                self.server.real_of[frame] = self._real
            written.append(frame)
            return frame

        self.frames.append = remembered  # type: ignore[method-assign, assignment]
        try:
            groups = self.store.admit(prompts, samples, put=put, timeout=chance.choice([0.0, 0.3, 2.0]))
        finally:
            self.frames.append = append  # type: ignore[method-assign]
        if groups is not None:
            key = ("put", put.producer, put.epoch, put.sequence, groups[0])
            self.server.promise(key, cuts)
            self.world.note(f"{self.name} has put {groups}")
        return groups


@dataclass(eq=False)
class Worker(Actor):
    stage: str = ""

    def act(self) -> None:
        chance, cuts = self.world.chance, self.server.cuts
        lease = self.store.lease(
            self.stage,
            worker=self.name,
            max_rows=chance.randint(1, 6),
            max_tokens=chance.choice([None, None, 20]),
            min_rows=chance.choice([1, 1, 3]),
            request=f"{self.process.name} {self.world.happened}" if chance.random() < 0.3 else None,
            ttl=TTL,
            timeout=chance.choice([0.0, 0.5, 2.5]),
        )
        if lease is None:
            return
        self.check_data(lease)
        self._work(lease)
        if self.world.fault("client hangs", self.stage, 0.02):
            self.world.sleep(TTL * chance.uniform(0.8, 2.0))
        if chance.random() < 0.2:
            self.store.renew(lease.lease_id, ttl=TTL)
            self.world.sleep(chance.uniform(0.0, 1.0))
        rows = lease.sample_ids.tolist()
        if chance.random() < 0.03:
            self.store.nack(lease.lease_id, rows, reason=f"reason {self.world.happened}")
            return
        parts = [rows] if chance.random() < 0.7 else [rows[:1], rows[1:]]
        for part in filter(None, parts):
            self._ack(lease, part, cuts)

    def _work(self, lease: Lease) -> None:
        self.world.sleep(self.world.chance.uniform(0.0, 0.3))

    def _columns(self, lease: Lease, rows: Sequence[int]) -> tuple[pa.RecordBatch | None, list[int | None]]:
        names = [f"{row}.{lease.lease_id}" for row in rows]
        if self.stage == REWARD.name:
            return batch({"reward": [float(number_of(name)) for name in names]}), []
        if self.stage == JUDGE.name:
            return batch({"reward_parts": names}), []
        return None, []

    def _ack(self, lease: Lease, rows: Sequence[int], cuts: int) -> None:
        columns, real = self._columns(lease, rows)
        append, frame = self.frames.append, -1

        def remembered(data: pa.RecordBatch) -> int:
            nonlocal frame
            frame = append(data)
            if real:
                self.server.real_of[frame] = real
            return frame

        self.frames.append = remembered  # type: ignore[method-assign, assignment]
        try:
            self.store.ack(lease.lease_id, rows, columns)
        finally:
            self.frames.append = append  # type: ignore[method-assign]
        self.server.promise(("ack", lease.lease_id, tuple(rows), frame), cuts)
        if self.world.chance.random() < 0.05:
            try:
                self.store.ack(lease.lease_id, rows, columns)
            except LeaseLost:
                return
            insist(False, "an ack that is repeated is refused", lease.lease_id, rows)


@dataclass(eq=False)
class Engine(Worker):
    serves: PolicyVersion | None = None

    def begin(self) -> None:
        self.serves = None

    def act(self) -> None:
        if self.serves is None or self.world.chance.random() < 0.4:
            self._load()
        super().act()

    def _load(self) -> None:
        learner = self.store.counts().learner
        if self.serves == learner:
            if self.world.chance.random() < 0.3:  # a late copy of an earlier word may have come after the last one
                self.store.serve(self.name, learner)
            return
        if self.serves is None or self.serves.incarnation != learner.incarnation or learner.n < self.serves.n:
            self.serves = None
            self.store.serve(self.name, None)
        self.store.serve(self.name, learner)
        self.serves = learner

    def _work(self, lease: Lease) -> None:
        self._started = self.serves
        super()._work(lease)

    def _columns(self, lease: Lease, rows: Sequence[int]) -> tuple[pa.RecordBatch | None, list[int | None]]:
        assert self._started is not None
        names = [f"{row}.{lease.lease_id}" for row in rows]
        versions = (self._started, self.serves or self._started)
        return batch(response_columns(names, [versions] * len(rows))), [self._started.n] * len(rows)


@dataclass(eq=False)
class Learner(Actor):
    leases: dict[int, Lease] = field(default_factory=dict)
    version: PolicyVersion | None = None
    saved: list[int] = field(default_factory=lambda: [0])
    """Checkpoints that are complete."""
    slots: int = 0
    knows: bool = False

    def begin(self) -> None:
        self.knows = False
        self._forget()

    def _forget(self) -> None:
        self.leases, self.slots, self.version = {}, 0, None

    def act(self) -> None:
        chance, cuts, batch_size = self.world.chance, self.server.cuts, self.server.terms.train_batch_size
        if not self.knows:
            self.store.gone(self.name)  # what its last life asked for must not come after what this one does
            self.knows = True
        if self.version is None or chance.random() < 0.1:
            version = self.store.counts().learner
            if self.version is not None and version != self.version:
                self._forget()  # the run went on from elsewhere
            self.version = version
        lease = self.store.lease(
            TRAIN.name,
            worker=self.name,
            max_rows=chance.randint(1, batch_size),
            request=f"{self.process.name} {self.world.happened}" if chance.random() < 0.5 else None,
            ttl=TTL * 3,
            timeout=chance.choice([0.0, 1.0, 2.5]),
        )
        if lease is not None:
            self.check_data(lease)
            self.leases[lease.lease_id] = lease
            self.slots += lease.slots
        if self.world.fault("client hangs", TRAIN.name, 0.01):
            self.world.sleep(TTL * 4)
        if self.slots < batch_size:
            if self.leases and chance.random() < 0.3:
                self._renew()
            return
        try:
            self._commit(cuts)
        except StoreError:
            self.store.gone(self.name)
            self._forget()
            raise
        if chance.random() < 0.6:
            self._checkpoint()

    def _renew(self) -> None:
        try:
            for lease_id in self.leases:
                self.store.renew(lease_id, ttl=TTL * 3)
        except LeaseLost:
            self.store.gone(self.name)
            self._forget()

    def _commit(self, cuts: int) -> None:
        assert self.version is not None
        chance = self.world.chance
        groups: dict[int, list[int]] = {}
        masked: dict[int, PolicyVersion] = {}
        for lease in self.leases.values():
            versions = lease.data.column("token_versions").to_pylist()
            for sample, group, of in zip(lease.sample_ids.tolist(), lease.group_ids.tolist(), versions, strict=True):
                groups.setdefault(group, []).append(sample)
                young = [v for v in of if PolicyVersion.unpack(v).n >= lease.oldest_trainable]
                if len(young) < len(of) and young:
                    masked[sample] = PolicyVersion.unpack(min(young))
        skipped = [row for rows in groups.values() if chance.random() < 0.1 for row in rows]
        trained = [row for rows in groups.values() for row in rows if row not in skipped]
        version = PolicyVersion(incarnation=self.version.incarnation, n=self.version.n + 1)
        self.store.commit(
            leases=list(self.leases),
            trained=trained,
            skipped=skipped,
            version=version,
            masked={row: oldest for row, oldest in masked.items() if row in trained},
        )
        self.server.promise(("commit", version.packed, tuple(sorted(trained)), tuple(sorted(skipped))), cuts)
        self._forget()
        self.version = version

    def _checkpoint(self) -> None:
        """It is complete when the store's data are as safe as its own."""
        assert self.version is not None
        for _ in range(2):
            if self.server.sync():
                break
            self.world.sleep(0.2)
        else:
            return
        version = self.server.book.version
        number = min(self.version.n, version.n)
        if version.incarnation != self.version.incarnation:
            return
        self.saved = [*[n for n in self.saved if n < number][-1:], number]
        oldest = PolicyVersion(incarnation=version.incarnation, n=self.saved[0])
        self.store.checkpointed(PolicyVersion(incarnation=version.incarnation, n=number), oldest=oldest)


@dataclass(eq=False)
class Operator(Actor):
    """Looks at things, and changes them."""

    def act(self) -> None:
        chance, book = self.world.chance, self.server.book
        there = sorted(book.open)
        some = chance.sample(there, min(len(there), chance.randint(1, 3)))
        # Quarantine is seldom, and ends with its group.
        match 3 if book.quarantine and chance.random() < 0.7 else chance.randrange(12):
            case 0:
                self.store.amend(max_staleness=chance.randrange(4))
            case 1 if some:
                self.store.drop(some[:1], reason="cancelled")
            case 2 if some:
                self.store.prioritise(chance.randint(-3, 3), samples=some)
            case 3 if book.quarantine:
                self.store.restore([chance.choice(sorted(book.quarantine))])
            case 4:
                self.store.gone(chance.choice(["rollout a", "reward a", "nobody"]))
            case 5:
                self.server.take_snapshot()
            case 6:
                self.server.disk.flip()
            case 7:
                self.world.wall_offset += chance.uniform(-1e6, 1e6)
            case _:
                ids = [chance.randrange(book.admitted + 1) for _ in range(2)] if chance.random() < 0.5 else some
                names = chance.choice([None, ["prompt"], ["response"]])
                self.check_columns(ids, self.store.read(ids, names))


def crew(world: World, server: Server, *, judge: bool) -> list[Actor]:
    made: list[Actor] = [
        Producer(world, server, "producer a", pace=0.4),
        Producer(world, server, "producer b", pace=0.8),
        Engine(world, server, "rollout a", stage=ROLLOUT.name),
        Engine(world, server, "rollout b", stage=ROLLOUT.name, pace=0.3),
        Worker(world, server, "reward a", stage=REWARD.name),
        Learner(world, server, "learner", pace=0.2),
        Operator(world, server, "operator", pace=0.7),
    ]
    if judge:
        made += [Worker(world, server, "judge", stage=JUDGE.name), Worker(world, server, "look", stage=LOOK.name)]
    return made
