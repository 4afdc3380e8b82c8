"""A broker's process that dies and comes back, and a network that loses, delays, repeats and reorders calls to it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pyarrow.flight as fl

from asyncflow.errors import Closed, IllegalTransition, LedgerError, StoreError
from asyncflow.store import wire
from asyncflow.store.account import Account
from asyncflow.store.broker import TIDY_EVERY, Broker, _Parked
from asyncflow.store.events import Event, Leased, Opened, Returned
from asyncflow.store.image import Image
from asyncflow.store.journal import Durability
from asyncflow.store.recovery import apply_all
from asyncflow.store.remote import RemoteControl
from asyncflow.store.rows import NONE
from asyncflow.store.schema import Schema
from asyncflow.store.segments import segment_of
from asyncflow.store.store import Store
from asyncflow.store.table import Table
from tests.test_table_model import insist

from .book import Book, Key, key_of_request
from .disk import LedgerFile, PowerCut, SegmentDisk, SimFrames, SimJournal
from .world import Killed, Process, World

OFTEN = 0.015
"""How often something is wrong with a call."""
GRACE = 20.0
"""Seconds for which leases live on after a restart."""
DAMAGED = re.compile(r"segment \d+ is damaged at ")
"""How the reason of a client begins that could not read what it was given."""


class Waiting(BaseException):
    """A call that has been parked: its answer comes later."""

    def __init__(self, topic: str, parked: _Parked[Any], timeout: float) -> None:
        self.topic, self.parked, self.timeout = topic, parked, timeout


class SimBroker(Broker):
    """The real one, in which nobody blocks and the housekeeper is no thread."""

    def __init__(
        self, *args: Any, world: World, process: Process, on_death: Callable[[bool], None], **more: Any
    ) -> None:
        super().__init__(*args, clock=world, **more)
        self._world, self._process, self._on_death = world, process, on_death
        self._alarm: Any = SimpleNamespace(notify_all=self._wake)
        self._awake = False

    def _wait(self, topic: str, parked: _Parked[Any], timeout: float) -> Any:
        self._park(topic, parked, timeout)
        if timeout <= 0 or parked.done.is_set():
            return self._collect(topic, parked)
        raise Waiting(topic, parked, timeout)

    def _see_to_it(self) -> None:
        if not self._awake or self._asleep_until > self._next_chore():
            self._awake = True
            self._wake()

    def _wake(self) -> None:
        due = self._next_chore()
        self._asleep_until = due
        if due < math.inf:
            self._world.at(max(0.0, due - self.clock.monotonic()), self._chore)

    def _chore(self) -> None:
        if self._process.dead or self._closed or self._asleep_until > self.clock.monotonic():
            return
        self._asleep_until = -math.inf
        try:
            self._do_chores()
        except Closed:
            return
        except LedgerError:
            self._asleep_until = self.clock.monotonic() + TIDY_EVERY
            self._world.at(TIDY_EVERY, self._chore)
            return
        except Killed as death:
            self._on_death(isinstance(death, PowerCut))
            return
        insist(self._next_chore() > self.clock.monotonic(), "leases run out in time", self._next_chore())
        self._wake()


@dataclass
class Parts:
    """What a store is made of: planted faults replace one."""

    table: type[Table] = Table
    broker: type[SimBroker] = SimBroker
    account: type[Account] = Account
    journal: type[SimJournal] = SimJournal
    frames: type[SimFrames] = SimFrames
    disk: type[SegmentDisk] = SegmentDisk
    store: type[Store] = Store
    records_after: int = 0
    """How many events are forgotten after a snapshot."""


@dataclass(eq=False)
class Call:
    name: str
    body: bytes
    number: int
    done: bool = False
    result: bytes | None = None
    error: StoreError | None = None
    cut: bool = False
    cancelled: bool = False
    delivered: bool = False


@dataclass(eq=False)
class Server:
    """The host of the broker and of the ledger."""

    world: World
    schema: Schema
    terms: Opened
    durability: Durability
    parts: Parts
    disk: SegmentDisk
    file: LedgerFile = field(default_factory=LedgerFile)
    real_of: dict[int, list[int | None]] = field(default_factory=dict)
    promised: dict[Key, int] = field(default_factory=dict)
    """What clients were told has happened → where in the ledger."""
    floor: int = 0
    """The lsn up to which everything survives a power cut, as `sync` has said."""
    broker: SimBroker | None = None
    on_power_cut: list[Callable[[], None]] = field(default_factory=list)
    waiting: list[tuple[Call, Waiting, Any]] = field(default_factory=list)
    latest: int = 0
    """Number of the youngest call that has arrived."""
    calls: int = 0
    deliveries: int = 0
    over: str | None = None
    """Why the run cannot go on."""
    steps: int = 0
    after_cut: bool = False
    """The power was cut since the last process."""
    cuts: int = 0
    """How often the power was cut."""

    def begin(self) -> None:
        self.file.lines.append((self.world.wall(), self.terms.kind, self.terms.to_json()))
        self.file.ends.append(1)
        self.file.synced = 1
        self._open(self.parts.table(self.schema, self.terms))

    def new_book(self) -> Book:
        book = Book(self.terms, list(self.schema.stages.values()), self.real_of)
        book.reward_bit = self.schema.mask(["reward"])
        book.now = self.world.now
        return book

    def _open(self, table: Table, book: Book | None = None) -> None:
        self.process = Process("broker")
        self.disk.broker = self.process
        self.book = self.new_book() if book is None else book
        self.journal = self.parts.journal(self.world, self.file, self.process, self._told)
        account = self.parts.account(self.disk, table.frames(), after=table.last_frame)
        self.broker = self.parts.broker(
            table,
            self.journal,
            account,
            self.disk,
            durability=self.durability,
            world=self.world,
            process=self.process,
            on_death=self.die,
        )

    def _told(self, events: Sequence[Event]) -> None:
        self.book.now = self.world.now
        for event in events:
            if isinstance(event, Returned) and DAMAGED.match(event.reason):
                self._check_damaged(event.rows)
            self.book.enter(event)
            self.steps += event.kind == "committed"

    def _check_damaged(self, samples: Sequence[int]) -> None:
        """A client has given these up because their data are damaged."""
        assert self.broker is not None
        rows = self.broker.table.rows
        for sample, frames in zip(samples, rows.frame[:, np.array(samples) - rows.base].T.tolist(), strict=True):
            hurt = any(frame != NONE and self.disk.is_hurt(frame) for frame in frames)
            insist(hurt, "only what is damaged is given up", sample, frames)

    # death and life

    def die(self, power: bool = False) -> None:
        """The broker's process ends; with the power, everybody on the host does."""
        power = power or self.disk.failed
        self.process.dead = True
        self.after_cut = self.after_cut or power
        self.broker = None
        waiting, self.waiting = self.waiting, []
        for call, _, _ in waiting:
            call.cut = True
        if power:
            self.cuts += 1
            self.world.note("the power is cut")
            self.file.cut_power(self.world)
            self.disk.cut_power()
            for call_ in self.on_power_cut:
                call_()
        else:
            self.world.note("the broker dies")
        self.world.at(self.world.chance.uniform(0.1, 2.0), self.come_back)

    def come_back(self, *, step: int | None = None) -> None:
        """Another process goes on, from what is on the disk."""
        if self.broker is not None or self.over is not None:
            return
        power, self.after_cut = self.after_cut, False
        book = self.new_book()
        book.replays = True
        for record in self.file.records(after=1):
            book.enter(record.event)
        book.replays = False
        self._check_promises(book, power)
        table: Table | None = None
        missing: set[int] = set()
        try:
            table = self._rebuild()
            missing = {segment_of(frame) for frame in table.frames()} - self.disk.files.keys()
            self._open(table, book)
        except LedgerError as error:
            named = [frame for frame, lsn in book.frames.items() if segment_of(frame) in missing and self._durable(lsn)]
            needed = [frame for frame in named if table is None or frame in table.frames()]
            insist(power and table is not None and not needed, "what was promised can be gone on with", error, needed)
            self.over = str(error)
            self.world.note("the run is over")
            return
        self._check_data(table, book)
        resumes = power or step is not None or self.world.chance.random() < 0.2
        assert self.broker is not None
        try:
            if resumes:
                events = table.resume(table.learner.n if step is None else step)
                self.broker.perform(events)
            else:
                self.broker.perform(table.restart(deadline=self.world.now + GRACE))
        except IllegalTransition as error:
            insist(step is None, "a checkpoint that is complete can be gone back to", error)
        except LedgerError:
            self.die()
            return
        except Killed as death:
            self.die(isinstance(death, PowerCut))
            return
        self.world.note(f"the broker is back at {len(self.file.lines)}")

    def _rebuild(self) -> Table:
        """As `recovery.rebuild`, which is compared with applying every event."""
        ledger: Any = self.file
        whole = apply_all(self.parts.table(self.schema, self.file.terms()), ledger, self.file.records(after=1))
        if self.file.snapshot is None:
            return whole
        lsn, image, arrays = self.file.snapshot
        image = msgspec.convert(msgspec.to_builtins(image), Image)
        table = self.parts.table.load(self.schema, image, {name: array.copy() for name, array in arrays.items()})
        apply_all(table, ledger, self.file.records(after=lsn + self.parts.records_after))
        insist(table.snapshot() == whole.snapshot(), "a snapshot and its tail are the whole ledger", lsn)
        self.world.faults["restarted from", "snapshot"] += 1
        return table

    def _durable(self, lsn: int) -> bool:
        return self.durability == "power" or lsn <= self.floor

    def _check_promises(self, book: Book, power: bool) -> None:
        for key, lsn in list(self.promised.items()):
            if key in book.keys:
                continue
            insist(power and not self._durable(lsn), "what was acknowledged is not lost", key, lsn, self.floor)
            del self.promised[key]
        self.floor = min(self.floor, len(self.file.lines))

    def _check_data(self, table: Table, book: Book) -> None:
        for frame in table.frames():
            lost = frame not in self.disk.flipped and not self.disk.whole(frame)
            insist(not lost or not self._durable(book.frames[frame]), "data that were acknowledged are not lost", frame)

    def take_snapshot(self) -> None:
        broker = self.broker
        if broker is None:
            return
        table, lsn = broker.table.copy(), self.journal.lsn
        try:
            self.journal.sync()
        except LedgerError:
            return
        except Killed as death:
            self.die(isinstance(death, PowerCut))
            return
        self.file.snapshot = (lsn, *table.dump())
        self.world.note(f"a snapshot of {lsn}")

    def sync(self) -> bool:
        """The learner, which is in the broker's process, wants its checkpoint to survive a power cut."""
        broker = self.broker
        if broker is None:
            return False
        try:
            self.floor = max(self.floor, broker.sync())
        except LedgerError as error:
            self.world.note(f"no sync: {error}")
            return False
        except Killed as death:
            self.die(isinstance(death, PowerCut))
            return False
        self.check()
        return True

    # calls

    def deliver(self, call: Call) -> None:
        broker = self.broker
        if broker is None:
            call.cut = True
            return
        if call.number < self.latest and not call.delivered:
            self.world.faults["reordered", call.name] += 1
        self.latest = max(self.latest, call.number)
        call.delivered = True
        request = wire.REQUESTS[call.name].decode(call.body)
        values = {name: getattr(request, name) for name in request.__struct_fields__}
        if call.name in ("admit", "lease"):
            values["alive"] = lambda: not call.cancelled
        key, failed, lsn = key_of_request(call.name, request), self.journal.failed, self.journal.lsn
        before, acks = key in self.book.keys, self.book.acks
        try:
            answer = getattr(broker, call.name)(**values)
        except Waiting as parked:
            waiting = parked
            self.waiting.append((call, waiting, request))
            self.world.at(waiting.timeout, lambda: self._time_up(call, waiting))
        except StoreError as error:
            if not (isinstance(error, LedgerError) and failed is None and self.journal.failed is not None):
                insist(key is None or (key in self.book.keys) == before, "a refusal changes nothing", error, key)
            if isinstance(error, Closed):
                insist(self.journal.lsn == lsn, "a closed store changes nothing")
            call.error, call.done = error, True
            self._see_error(error)
        except Killed as death:
            call.cut = True
            self.die(isinstance(death, PowerCut))
            return
        else:
            self._check_read(call.name, request)
            call.result, call.done = wire.encode(answer), True
        insist(self.book.acks == acks or call.name == "ack", "who holds a row says that it is done", call.name)
        self.settle()

    def _see_error(self, error: StoreError) -> None:
        """Somebody starts the store again when its disk has failed."""
        if isinstance(error, LedgerError) and self.journal.failed is not None and self.broker is not None:
            self.world.at(self.world.chance.uniform(0.1, 4.0), self._start_again)

    def _start_again(self) -> None:
        if self.broker is not None and self.journal.failed is not None:
            self.die()

    def _time_up(self, call: Call, waiting: Waiting) -> None:
        if any(other is waiting for _, other, _ in self.waiting):
            self._answer(call, waiting)
            self.settle()

    def _answer(self, call: Call, waiting: Waiting) -> None:
        self.waiting = [place for place in self.waiting if place[1] is not waiting]
        if self.broker is None:
            call.cut = True
            return
        try:
            result = self.broker._collect(waiting.topic, waiting.parked)
        except StoreError as error:
            call.error, call.done = error, True
            self._see_error(error)
        except Killed as death:
            call.cut = True
            self.die(isinstance(death, PowerCut))
        else:
            call.result, call.done = wire.encode(bool(result) if call.name == "room" else result), True

    def settle(self) -> None:
        """Answer those who got what they waited for, and look whether somebody was forgotten."""
        while ready := [(call, waiting) for call, waiting, _ in self.waiting if waiting.parked.done.is_set()]:
            for call, waiting in ready:
                self._answer(call, waiting)
        self.deliveries += 1
        self.check_waiting()
        if self.deliveries % 8 == 0:
            self.check()

    # checks

    def check(self) -> None:
        if self.broker is None:
            return
        table = self.broker.table
        self.book.check_account(table)
        needed: dict[int, int] = {}
        for frame, rows in table.frames().items():
            insist(frame in self.disk.hurt or segment_of(frame) in self.disk.files, "data that are needed stay", frame)
            needed[segment_of(frame)] = needed.get(segment_of(frame), 0) + rows
        uses = {number: use.needed for number, use in self.broker._account._uses.items() if use.needed}
        insist(uses == needed, "the account knows what is needed", uses, needed)
        deadline = table.next_deadline()
        late = deadline is not None and deadline < self.world.now - 5.0
        insist(not late or not self.broker._awake or self.journal.failed is not None
               or self.world.now < self.journal.full_until + 5.0,
               "leases run out in time", deadline, self.world.now)  # fmt: skip

    def check_waiting(self) -> None:
        """Nobody waits for what he could have."""
        broker = self.broker
        full = self.world.now < self.journal.full_until  # then nothing can be given to anybody
        if broker is None or self.journal.failed is not None or full:
            return
        heads = {id(parked[0]): topic for topic, parked in broker._parked.items() if parked}
        for call, waiting, request in self.waiting:
            if id(waiting.parked) not in heads or call.cancelled:
                continue
            insist(not self._possible(call, request), "who waits is not forgotten", call.name, request)

    def _possible(self, call: Call, request: Any) -> bool:
        assert self.broker is not None
        table = self.broker.table
        if call.name == "lease":
            if request.request is not None and (request.stage, request.request) in table.requests:
                return True
            limits = {name: getattr(request, name) for name in ("worker", "max_rows", "max_tokens", "min_rows")}
            events = table.lease(request.stage, **limits, deadline=0.0, now=None)
            return any(isinstance(event, Leased) for event in events)
        groups = request.groups if call.name == "room" else len(request.prompt_tokens)
        return table.capacity() >= groups * table.group_size

    def _check_read(self, name: str, request: Any) -> None:
        if name == "places":
            insist(set(request.sample_ids) <= self.book.readable, "data of a sample that has ended are not served")

    def promise(self, key: Key, cuts: int) -> None:
        """A client was told that this has happened. `cuts`: how often the power had been cut when it asked."""
        there = key in self.book.keys
        insist(there or (cuts < self.cuts and self.durability != "power"), "what is acknowledged has happened", key)
        if there:
            self.promised[key] = self.book.keys[key]
            synced = self.durability != "power" or self.promised[key] <= self.file.synced
            insist(synced, "what is acknowledged is synced", key)


class Client:
    """Stands in for a `FlightClient`."""

    def __init__(self, server: Server) -> None:
        self._server, self._world = server, server.world

    def do_action(self, action: fl.Action, timeout: float) -> list[Any]:
        world, server, name = self._world, self._server, action.type
        server.calls += 1
        call = Call(name, action.body.to_pybytes(), server.calls)
        if world.fault("cut before the request", name, OFTEN if name == "lease" else 4 * OFTEN):
            world.sleep(world.chance.uniform(0.0, 0.5))
            raise fl.FlightUnavailableError("cut")
        world.at(self._delay(), lambda: server.deliver(call))
        if world.fault("duplicate", name, OFTEN if name == "lease" else 4 * OFTEN):
            twin = replace(call)
            world.at(world.chance.uniform(0.0, 6.0), lambda: server.deliver(twin))
        cut = world.fault("cut after the request", name, OFTEN if name == "lease" else 4 * OFTEN)
        if cut:
            world.wait(lambda: call.done or call.cut, world.chance.uniform(0.0, 1.5))
        else:
            world.wait(lambda: call.done or call.cut, timeout)
            world.sleep(self._delay() / 2)
        if not call.done or cut:
            # The server may notice it at once, later, or never.
            world.at(world.chance.choice([0.0, 0.5, 3.0]), lambda: setattr(call, "cancelled", True))
        if cut or call.cut:
            raise fl.FlightUnavailableError("cut")
        if not call.done:
            raise fl.FlightTimedOutError("no answer")
        if call.error is not None:
            raise fl.FlightServerError(str(call.error), wire.encode_json(wire.Refusal.of(call.error)))
        return [SimpleNamespace(body=call.result)]

    def _delay(self) -> float:
        chance = self._world.chance
        return chance.uniform(0.0, 2.0) if chance.random() < 0.04 else chance.uniform(0.0005, 0.02)

    def close(self) -> None:
        """There is nothing to give back."""


def control_of(server: Server, process: Process) -> RemoteControl:
    """The real client of a broker, over the simulated network."""

    class Control(RemoteControl):
        def _connect(self) -> Any:
            return Client(server)

        def _options(self, timeout: float) -> Any:
            return timeout

    control = Control("sim", token="", patience=4.0, clock=server.world, sleep=server.world.sleep)
    control._name = f"auto {process.name}"
    return control
