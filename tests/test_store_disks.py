"""A disk that is full costs the puts that it has no room for, and nothing else; one that has failed is trusted by
nobody any more. With a store that another process serves over Flight, or with `fdatasync` that blocks and fails."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from asyncflow.errors import LedgerError
from asyncflow.store.account import Account
from asyncflow.store.broker import Broker
from asyncflow.store.data import FileFrames
from asyncflow.store.journal import Journal
from asyncflow.store.recovery import rebuild
from asyncflow.store.shelf import SegmentFolder
from asyncflow.store.store import EmbeddedStore, Store
from asyncflow.store.table import Table
from asyncflow.types import PolicyVersion
from tests.processes import wait_until
from tests.test_flight import pa_join, take
from tests.test_hostile_wire import Target
from tests.test_store import SCHEMA, ids, prompts, responses, rewards, terms

LEDGER = r"ledger\.sqlite cannot be written \(disk I/O error\).*see that its disk has room"
DATA = r"the data of a sample cannot be written \(.*\): see that their disk has room"


@contextmanager
def full(process: int, size: int = 0) -> Iterator[None]:
    """Meanwhile the system refuses this process every byte of a file behind `size`, as it does when a disk is full."""
    soft, hard = resource.prlimit(process, resource.RLIMIT_FSIZE)
    resource.prlimit(process, resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.prlimit(process, resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    with Target(tmp_path, max_attempts=1000, train_batch_size=1000) as target:
        yield target
        target.serves_others()


def goes_on(target: Target) -> None:
    """What needs no room: reads, renewals, the account."""
    target.far.renew(target.lease.lease_id, ttl=1000.0)
    assert target.far.read([0], ["prompt"]).num_rows == 1
    assert target.far.lease("reward", worker="w", max_rows=1, ttl=9.0, timeout=0.0) is None


def same(target: Target) -> tuple[int, int, int]:
    counts = target.far.counts()
    return counts.admitted, counts.open, target.ledger_end()


def test_a_full_disk_of_the_ledger_refuses_what_cannot_be_recorded_and_nothing_else(target: Target) -> None:
    near = target.connect_near()
    before = same(target)

    with full(target.process.pid):
        for call in (
            lambda: near.admit(prompts(1), timeout=0.0),
            lambda: near.ack(target.lease.lease_id, [0], responses([0])),
            lambda: near.lease("rollout", worker="w", max_rows=1, ttl=9.0, timeout=0.0),
            lambda: near.drop([3], reason="no"),
        ):
            with pytest.raises(LedgerError, match=LEDGER):
                call()
        goes_on(target)
        assert same(target) == before

    near.ack(target.lease.lease_id, [0], responses([0]))  # what was refused works when there is room
    assert near.admit(prompts(1), timeout=0.0) == (2,)
    assert rebuild(SCHEMA, target.ledger).next_sample == 6


def test_a_full_disk_of_the_segments_refuses_what_has_no_room_and_nothing_else(target: Target) -> None:
    """The ledger is small and has room; the next segment, and the end of the one that there is, have none."""
    near, before = target.connect_near(), same(target)
    large = prompts(1).set_column(0, "prompt", pa.array(["x" * (4 << 20)]))

    with full(target.process.pid, 2 << 20):
        for _ in range(3):
            with pytest.raises(LedgerError, match=DATA):
                target.far.admit(large, timeout=0.0)
        assert same(target) == before
        goes_on(target)
        assert near.admit(prompts(1), timeout=0.0) == (2,)  # a client that writes its own segments elsewhere

    assert target.far.admit(large, timeout=0.0) == (3,)
    assert target.far.read([6], ["prompt"]).equals(large.select(["prompt"]))
    assert target.far.read([0], ["prompt"]).equals(prompts(1).select(["prompt"]))


def test_a_full_disk_of_a_client_costs_only_what_it_puts(target: Target) -> None:
    near, before = target.connect_near(), same(target)

    with full(os.getpid()):
        for _ in range(3):
            with pytest.raises(LedgerError, match=DATA):
                near.admit(prompts(1), timeout=0.0)
        assert same(target) == before
        assert near.read([0], ["prompt"]).num_rows == 1
        goes_on(target)
        assert target.far.admit(prompts(1), timeout=0.0) == (2,)

    assert near.admit(prompts(1), timeout=0.0) == (3,)


def test_who_waits_while_the_disk_is_full_is_served_when_there_is_room(target: Target) -> None:
    take(target.far, "rollout", 1 << 20)
    found: list[list[int]] = []
    waiter = threading.Thread(
        target=lambda: found.append(ids(take(target.connect_near(), "rollout", 1 << 20, timeout=60.0)))
    )
    waiter.start()

    with full(target.process.pid), pytest.raises(LedgerError):
        target.connect_near().admit(prompts(1), timeout=0.0)
    target.far.admit(prompts(1), timeout=0.0)

    waiter.join(60.0)
    assert found == [[4, 5]]


# -- syncs that take their time, or fail -------------------------------------------------------------------------------


class Disk:
    """Two disks whose syncs can be held up, and can fail."""

    def __init__(self) -> None:
        self.may = {"data": threading.Event(), "ledger": threading.Event()}
        self.fails: set[str] = set()
        self.seen: list[str] = []
        for may in self.may.values():
            may.set()

    def fdatasync(self, name: str) -> Callable[[int], None]:
        def fdatasync(file: int) -> None:
            self.seen.append(name)
            assert self.may[name].wait(60.0)
            if name in self.fails:
                raise OSError(5, "Input/output error")
            os.fdatasync(file)

        return fdatasync


class Power:
    """A store with durability `power` on such disks."""

    def __init__(self, folder: Path) -> None:
        self.disk, self.folder, self.ledger = Disk(), folder / "data", folder / "ledger.sqlite"
        journal = Journal.create(self.ledger, terms(), 0.0, SCHEMA, fdatasync=self.disk.fdatasync("ledger"))
        shelf = SegmentFolder(self.folder)
        broker = Broker(Table(SCHEMA, terms()), journal, Account(shelf), shelf, durability="power")
        data = FileFrames(self.folder, broker.allocate, durable=True, fdatasync=self.disk.fdatasync("data"))
        self.store: Store = EmbeddedStore(broker, data, self.folder)
        self.store.serve("engine", PolicyVersion(n=0))
        self.disk.seen.clear()

    def later(self, call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
        """What it answers, or what it refuses."""
        answers: list[Any] = []

        def run() -> None:
            try:
                answers.append(call())
            except LedgerError as refused:
                answers.append(refused)

        thread = threading.Thread(target=run)
        thread.start()
        return thread, answers


@pytest.fixture
def power(tmp_path: Path) -> Iterator[Power]:
    power = Power(tmp_path)
    yield power
    power.store.close()


def test_an_answer_comes_after_the_data_and_then_the_ledger_are_on_disk(power: Power) -> None:
    power.disk.may["data"].clear()
    power.disk.may["ledger"].clear()
    thread, answers = power.later(lambda: power.store.admit(prompts(1), timeout=0.0))

    wait_until(lambda: power.disk.seen == ["data"])
    assert power.store.counts().admitted == 0  # the ledger does not name what may still be lost
    power.disk.may["data"].set()
    wait_until(lambda: power.disk.seen == ["data", "ledger"])
    assert answers == []
    assert power.store.counts().admitted == 2  # and others are not held up
    power.disk.may["ledger"].set()
    thread.join(60.0)

    assert answers == [(0,)]


@pytest.mark.parametrize("call", ["lease", "ack", "nack", "drop"])
def test_every_decision_is_on_disk_before_it_is_answered(power: Power, call: str) -> None:
    power.store.admit(prompts(1), timeout=0.0)
    lease = take(power.store, "rollout", 1)
    power.disk.seen.clear()
    power.disk.may["ledger"].clear()
    calls: dict[str, Callable[[], Any]] = {
        "lease": lambda: take(power.store, "rollout", 1),
        "ack": lambda: power.store.ack(lease.lease_id, [0], responses([0])),
        "nack": lambda: power.store.nack(lease.lease_id, [0], reason="no"),
        "drop": lambda: power.store.drop([1], reason="no"),
    }

    thread, answers = power.later(calls[call])

    wait_until(lambda: "ledger" in power.disk.seen)
    assert answers == []
    power.disk.may["ledger"].set()
    thread.join(60.0)
    assert len(answers) == 1


def test_a_commit_that_is_repeated_while_it_is_being_synced_waits_as_well(power: Power) -> None:
    """Its answer was lost; that the table has it says nothing yet."""
    power.store.admit(prompts(2), pa_join(responses(range(4)), rewards(range(4))), timeout=0.0)
    lease = take(power.store, "train")
    step: dict[str, Any] = {"leases": [lease.lease_id], "trained": ids(lease), "skipped": []}
    power.disk.seen.clear()
    power.disk.may["ledger"].clear()
    calls = [power.later(lambda: power.store.commit(**step, version=PolicyVersion(n=1)))]
    wait_until(lambda: power.disk.seen == ["ledger"])
    assert power.store.counts().trained == 4

    calls.append(power.later(lambda: power.store.commit(**step, version=PolicyVersion(n=1))))
    power.disk.fails = {"ledger"}
    power.disk.may["ledger"].set()

    for thread, answers in calls:
        thread.join(60.0)
        assert [type(answer) for answer in answers] == [LedgerError]


@pytest.mark.parametrize("fails", [False, True])
def test_who_waited_is_answered_when_what_he_was_given_is_on_disk(power: Power, fails: bool) -> None:
    """Were it before, he would have it although the sync fails."""
    thread, answers = power.later(lambda: ids(take(power.store, "rollout", timeout=60.0)))
    wait_until(lambda: power.store.broker.waiting() == 1)  # type: ignore[attr-defined]
    power.disk.may["ledger"].clear()

    other, _ = power.later(lambda: power.store.admit(prompts(1), timeout=0.0))

    wait_until(lambda: power.store.counts().leased == {"rollout": 2})
    power.disk.fails = {"ledger"} if fails else set()
    power.disk.may["ledger"].set()
    thread.join(60.0)
    other.join(60.0)
    (answer,) = answers
    assert isinstance(answer, LedgerError) if fails else answer == [0, 1]


def test_data_that_could_not_be_synced_are_never_named_and_nothing_is_tried_again(power: Power) -> None:
    assert power.store.admit(prompts(1), timeout=0.0) == (0,)
    power.disk.seen.clear()
    power.disk.fails = {"data"}

    with pytest.raises(LedgerError, match="Input/output error"):
        power.store.admit(prompts(1), timeout=0.0)
    power.disk.fails = set()
    for _ in range(3):
        with pytest.raises(LedgerError, match=r"an earlier sync has failed: .*Input/output error"):
            power.store.admit(prompts(1), timeout=0.0)

    assert power.disk.seen == ["data"]
    assert power.store.counts().admitted == 2
    assert power.store.read([0], ["prompt"]).num_rows == 1


def test_after_a_failed_sync_of_the_ledger_everything_is_refused_and_nothing_is_tried_again(
    power: Power, caplog: pytest.LogCaptureFixture
) -> None:
    power.store.admit(prompts(2), timeout=0.0)
    lease = take(power.store, "rollout", 2)
    power.disk.seen.clear()
    power.disk.fails = {"ledger"}

    with pytest.raises(LedgerError, match=r"cannot be synced .* nobody knows what of it is on disk"):
        power.store.ack(lease.lease_id, [0], responses([0]))
    power.disk.fails = set()
    for call in (
        lambda: power.store.admit(prompts(1), timeout=0.0),
        lambda: take(power.store, "rollout"),
        lambda: power.store.drop([2], reason="no"),
        lambda: power.store.nack(lease.lease_id, [1], reason="no"),  # which this lease still holds
    ):
        with pytest.raises(LedgerError, match=r"cannot be synced .*see that its disk works"):
            call()

    assert power.disk.seen.count("ledger") == 1
    counts = power.store.counts()
    assert (counts.admitted, counts.open, counts.leased) == (4, 4, {"rollout": 1})


def test_a_restart_goes_on_with_what_the_disk_has(power: Power) -> None:
    power.store.admit(prompts(1), timeout=0.0)
    power.disk.fails = {"ledger"}
    with pytest.raises(LedgerError):
        power.store.admit(prompts(1), timeout=0.0)
    power.store.close()

    store = EmbeddedStore.restart(ledger=power.ledger, data=power.folder, durability="power")

    # Nobody was told that the second one is there. After a power cut it might not be; here the system has it.
    assert store.counts().admitted == 4
    assert store.read(range(4)).equals(prompts(1).take([0, 0, 0, 0]))
    store.close()
