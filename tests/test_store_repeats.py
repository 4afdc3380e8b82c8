"""Calls that are made again, at the same time, or cut off; and a disk, or a process, that fails for a moment."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.flight as fl
import pytest

from asyncflow.errors import Closed, LedgerError
from asyncflow.store.account import Account
from asyncflow.store.broker import Broker
from asyncflow.store.events import PutId
from asyncflow.store.journal import Journal
from asyncflow.store.memory_frames import MemoryFrames
from asyncflow.store.remote import RemoteControl
from asyncflow.store.store import EmbeddedStore, Store
from asyncflow.store.table import Table
from asyncflow.types import PolicyVersion
from tests.processes import wait_until
from tests.test_flight import TOKEN, Served, take
from tests.test_store import SCHEMA, Bench, Parked, Waiter, ids, parked, prompts, responses, rewards, terms

__all__ = ["parked"]  # the fixture


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path, max_staleness=1000)
    yield served
    served.close()


@pytest.fixture(params=["near", "far"])
def client(request: pytest.FixtureRequest, served: Served) -> Store:
    return served.connect(local=request.param == "near")


def test_puts_at_the_same_time_over_one_client_all_happen_once(client: Store, served: Served) -> None:
    def put(_: int) -> tuple[int, ...] | None:
        return client.admit(prompts(1), timeout=30.0)

    with ThreadPoolExecutor(8) as threads:
        admitted = [group for groups in threads.map(put, range(200)) for group in groups or ()]

    assert sorted(admitted) == list(range(200))
    assert served.store.counts().admitted == 400


def test_a_put_that_waits_does_not_keep_a_later_one_of_its_client_from_being_told(tmp_path: Path) -> None:
    served = Served(tmp_path)
    client = served.connect()
    client.admit(prompts(4), timeout=0.0)
    waiters = [Waiter(lambda: client.admit(prompts(1), timeout=60.0)) for _ in range(2)]
    wait_until(lambda: served.store.broker.waiting() == 2)

    served.store.drop([0, 1, 2, 3], reason="test")

    assert sorted(group for waiter in waiters for group in waiter.join()) == [4, 5]
    served.close()


@pytest.mark.parametrize("line", ["empty", "somebody waits"])
def test_a_put_that_has_happened_is_told_so_though_there_is_no_room(parked: Parked, line: str) -> None:
    bench, park = parked
    name = PutId(producer="p", sequence=1)
    first = bench.store.admit(prompts(4), put=name, timeout=0.0)
    waiter = park(lambda: bench.admit(1, timeout=60.0)) if line == "somebody waits" else None
    assert bench.admit(1, timeout=0.0) is None

    assert bench.store.admit(prompts(4), put=name, timeout=0.0) == first == (0, 1, 2, 3)

    bench.store.close()
    if waiter is not None:
        with pytest.raises(Closed):
            waiter.join()


def test_a_put_for_which_there_was_no_room_is_asked_for_again_with_the_same_frame(tmp_path: Path) -> None:
    """As a client on another host does when its put has waited for as long as one call may."""
    store = Served(tmp_path)
    control = store.connect(local=False)._control
    assert isinstance(control, RemoteControl)
    store.store.admit(prompts(4), timeout=0.0)
    frame, put = control.put_frame(prompts(1)), PutId(producer="p", sequence=1)
    about: dict[str, Any] = {"frame": frame, "size": 100, "put": put, "timeout": 0.0}
    assert control.admit([3], **about) is None
    # Their segment goes with them, unless somebody waits with a frame in it.
    store.store.drop(list(range(8)), reason="test")
    store.store.broker.reclaim()

    assert control.admit([3], **about) == 4

    lease = take(store.store, "rollout")
    assert lease.data.column("prompt_ids").to_pylist() == [prompts(1).column("prompt_ids")[0].as_py()] * 2
    store.close()


def test_who_needs_less_than_somebody_who_waits_is_served_at_once(parked: Parked) -> None:
    bench, park = parked
    bench.admit(2)
    many = park(lambda: bench.store.lease("rollout", worker="a", max_rows=100, min_rows=100, ttl=60.0, timeout=60.0))

    few = bench.lease("rollout", 2, timeout=60.0)

    assert few is not None
    assert ids(few) == [0, 1]
    bench.store.close()
    with pytest.raises(Closed):
        many.join()


def test_every_process_of_a_learner_gets_its_lease_though_others_wait(parked: Parked) -> None:
    bench, park = parked
    bench.admit(2)
    asked: dict[str, Any] = {"worker": "w", "max_rows": 4, "ranks": 2, "request": "step 1", "ttl": 60.0}
    first = bench.store.lease("rollout", **asked, timeout=0.0)
    waits = park(lambda: bench.lease("rollout", timeout=60.0))

    second = bench.store.lease("rollout", **asked, timeout=60.0)

    assert first is not None
    assert second is not None
    assert (first.lease_id, ids(first)) == (second.lease_id, ids(second))
    bench.store.close()
    with pytest.raises(Closed):
        waits.join()


@contextmanager
def no_more_files() -> Iterator[None]:
    """This process cannot open any."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_process_that_cannot_open_files_takes_no_sample_for_damaged(tmp_path: Path) -> None:
    store = EmbeddedStore.create(SCHEMA, terms(), ledger=tmp_path / "ledger.sqlite", data=tmp_path / "data")
    store.serve("engine", PolicyVersion(n=0))
    store.admit(prompts(2), timeout=0.0)

    with no_more_files(), pytest.raises(LedgerError, match="no fault of its samples"):
        take(store, "rollout")

    assert store.counts().quarantined == 0
    store.gone("worker")
    assert ids(take(store, "rollout")) == [0, 1, 2, 3]
    store.close()


class Shaky(MemoryFrames):
    """Segments that cannot be looked at, or removed, as often as it says."""

    def __init__(self) -> None:
        super().__init__()
        self.failures = 0
        self.removed: list[int] = []

    def present(self) -> dict[int, int]:
        return {1: 64}

    def in_use(self, number: int) -> bool:
        return False

    def remove(self, number: int) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError("too many open files")
        self.removed.append(number)


def shaky_broker(folder: Path, shelf: Shaky) -> Broker:
    journal = Journal.create(folder / "ledger.sqlite", terms(), 0.0)
    return Broker(Table(SCHEMA, terms()), journal, Account(shelf), shelf)


def test_a_segment_that_could_not_be_removed_is_removed_later(tmp_path: Path) -> None:
    shelf = Shaky()
    broker = shaky_broker(tmp_path, shelf)
    shelf.failures = 1

    with pytest.raises(OSError, match="too many"):
        broker.reclaim()
    broker.reclaim()

    assert shelf.removed == [1]
    broker.close()


def test_the_housekeeper_goes_on_after_a_chore_that_failed(tmp_path: Path) -> None:
    shelf = Shaky()
    broker = shaky_broker(tmp_path, shelf)
    shelf.failures = 1

    broker.serve("engine", PolicyVersion(n=0))  # any call has it look

    wait_until(lambda: shelf.removed == [1])
    broker.close()


class Interrupted(threading.Event):
    def wait(self, timeout: float | None = None) -> bool:
        raise KeyboardInterrupt


def test_who_is_interrupted_waits_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path)
    monkeypatch.setattr("asyncflow.store.broker.threading.Event", Interrupted)

    with pytest.raises(KeyboardInterrupt):
        bench.lease("rollout", timeout=60.0)

    monkeypatch.undo()
    assert bench.store.broker.waiting() == 0
    bench.admit(2)
    assert ids(bench.take("rollout")) == [0, 1, 2, 3]
    bench.store.close()


def test_a_failure_of_the_ledger_is_remembered_though_a_sync_ends_well(tmp_path: Path) -> None:
    def fails_meanwhile(_: int) -> None:
        journal._failed = LedgerError("the checkpoint has failed")

    journal = Journal.create(tmp_path / "ledger.sqlite", terms(), 0.0, fdatasync=fails_meanwhile)
    journal.sync_to(journal.lsn)

    with pytest.raises(LedgerError, match="the checkpoint has failed"):
        journal.append([terms()], 0.0)
    journal.close()


def test_a_refused_first_start_leaves_nothing_in_the_way_of_the_next(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    create: Callable[[], EmbeddedStore] = lambda: EmbeddedStore.create(  # noqa: E731
        SCHEMA, terms(), ledger=tmp_path / "ledger.sqlite", data=tmp_path / "data"
    )
    with pytest.raises(LedgerError, match="cannot be opened"):
        create()

    (tmp_path / "data").unlink()

    create().close()


def test_bytes_after_a_restart_are_those_of_the_samples(tmp_path: Path) -> None:
    """A segment whose writer was killed has room that nobody has used."""
    paths: dict[str, Any] = {"ledger": tmp_path / "ledger.sqlite", "data": tmp_path / "data"}
    store = EmbeddedStore.create(SCHEMA, terms(), **paths)
    store.serve("engine", PolicyVersion(n=0))
    store.admit(prompts(1), timeout=0.0)
    store.broker._journal.close()  # and no more, as kill -9

    again = EmbeddedStore.restart(**paths)

    assert 0 < again.counts().bytes < 4096
    again.close()


def test_a_client_that_never_ends_its_put_does_not_keep_the_server_from_stopping(served: Served) -> None:
    raw = fl.FlightClient(served.server.location)
    options = fl.FlightCallOptions(headers=[(b"authorization", f"Bearer {TOKEN}".encode())])
    writer, _ = raw.do_put(fl.FlightDescriptor.for_path("put"), prompts(1).schema, options)
    writer.write_batch(prompts(1))

    served.server.close()

    assert served.server._ending.is_alive()
    with pytest.raises(fl.FlightError, match="closed"):
        writer.close()
    raw.close()
    served.server._ending.join(20.0)
    assert not served.server._ending.is_alive()


def test_a_sample_that_ends_while_its_lease_is_read_costs_no_other(served: Served) -> None:
    """Its data may be gone by then, which is no damage."""
    client, other = served.connect(), served.connect()
    for _ in range(2):
        client.admit(prompts(1), timeout=0.0)
    rollout = take(client, "rollout")
    client.ack(rollout.lease_id, [0, 1, 2], responses([0, 1, 2]))
    other.ack(rollout.lease_id, [3], responses([3]))
    other.close()  # nobody writes to its segment any more
    scored = take(served.store, "reward")  # the client has not read it yet
    served.store.ack(scored.lease_id, ids(scored), rewards(ids(scored)))
    control = client._control
    lease = control.lease("train", worker="w", max_rows=4, ttl=60.0, timeout=0.0)
    assert lease is not None
    segments = len(list(served.folder.glob("*.segment")))
    served.store.drop([3], reason="test")
    served.store.broker.reclaim()
    wait_until(lambda: len(list(served.folder.glob("*.segment"))) < segments)  # the housekeeper may be at it as well

    delivered = client._deliver(lease)

    assert delivered is not None
    assert ids(delivered) == [0, 1]
    assert client.counts().quarantined == 0
