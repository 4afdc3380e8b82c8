"""`kill -9` of the server, producers, engines, judges and the learner of a store, each a real process that talks to it
over Flight, at moments that a seed draws: whatever was acknowledged is there, once, and right."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from asyncflow.errors import LeaseLost
from asyncflow.report.audit import audit
from asyncflow.store.client import Lease
from asyncflow.store.events import Acked, Admitted, Committed
from asyncflow.store.journal import read_ledger
from asyncflow.store.replay import reenact
from asyncflow.store.store import Store
from asyncflow.types import PolicyVersion
from tests.processes import wait_until
from tests.store_server import StoreProcess
from tests.store_workers import GROUP, SPEC, STALENESS, VALUES, live, read_diary, wrong

WORKERS = {
    "producer-0": "produce",
    "producer-1": "produce",
    "engine-0": "write",
    "engine-1": "write",
    "judge-0": "judge",
    "judge-1": "judge",
    "learner-0": "learn",
}
SERVER = "server"

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.store_workers"])


class Cluster:
    """A server, and workers that begin a new life whenever they were killed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.rng = random.Random(seed)
        (folder / "spec.yaml").write_text(SPEC)
        self.server = StoreProcess(folder / "store", "--spec", str(folder / "spec.yaml"))
        self.client: Store = self.server.connect()
        self.lives: Counter[str] = Counter()
        self.workers: dict[str, ForkServerProcess] = {}
        self.dead: list[str] = []
        """Lives that have ended since the server began its own."""
        self.granted_grace: Counter[str] = Counter()
        """The lives that there were then."""
        self.kills: Counter[str] = Counter()
        for name in WORKERS:
            self.begin(name)

    def begin(self, name: str) -> None:
        self.lives[name] += 1
        far, seed = self.rng.random() < 0.4, self.rng.getrandbits(30)
        arguments = (WORKERS[name], name, self.lives[name], str(self.folder), self.server.location, far, seed)
        self.workers[name] = processes.Process(target=live, args=arguments, daemon=True)
        self.workers[name].start()

    def kill(self, name: str) -> None:
        self.kills[name.partition("-")[0]] += 1
        if name == SERVER:
            self.server.kill()
            self.server.start()
            # Every lease now lives on for a while: who holds one and is dead has to be named.
            for worker in self.dead:
                self.client.gone(worker)
            self.dead, self.granted_grace = [], Counter(self.lives)
            return
        process = self.workers[name]
        assert process.pid is not None
        assert process.is_alive(), f"{name} has ended: {list(self.entries(name))[-1]}"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        worker = f"{name}.{self.lives[name]}"
        self.dead.append(worker)
        # Without a notice, one that had a lease when the server was restarted would hold it for a minute.
        if self.lives[name] <= self.granted_grace[name] or self.rng.random() < 0.5:
            self.client.gone(worker)
        self.begin(name)

    def entries(self, name: str) -> Iterator[dict[str, Any]]:
        return read_diary(self.folder / f"{name}.diary")

    def acknowledged(self) -> int:
        files = self.folder.glob("*.diary")
        return sum(file.read_bytes().count(b" done") for file in files)

    def run(self, kills: int) -> None:
        """Kill everybody at least once, some again and again: at once, or when much more was acknowledged."""
        pause = threading.Event()
        victims = [SERVER, *WORKERS]
        victims += self.rng.choices([SERVER, SERVER, SERVER, *WORKERS], k=kills - len(victims))
        self.rng.shuffle(victims)
        for victim in victims:
            self.goes_on(self.rng.choice([0, 0, 1, 5, 40]))
            pause.wait(self.rng.random() * 0.03)
            self.kill(victim)
        self.goes_on(100)

    def goes_on(self, operations: int) -> None:
        """Wait until so many more operations were acknowledged."""
        before = self.acknowledged()
        wait_until(lambda: self.acknowledged() >= before + operations)

    def stop(self) -> None:
        (self.folder / "stop").write_text("")
        for process in self.workers.values():
            process.join(90.0)
            assert process.exitcode == 0, [list(self.entries(name))[-1] for name in WORKERS]

    def close(self) -> None:
        for process in self.workers.values():
            process.kill()
        self.client.close()
        self.server.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, seed=20261121)
    yield cluster
    cluster.close()


def test_whoever_is_killed_nothing_that_was_acknowledged_is_lost_or_doubled(cluster: Cluster) -> None:
    cluster.run(kills=16)
    cluster.stop()
    check(cluster)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_five_hundred_kills_lose_and_double_nothing(cluster: Cluster) -> None:
    kills = int(os.environ.get("ASYNCFLOW_KILLS", "500"))
    cluster.run(kills)
    cluster.stop()
    assert cluster.kills.total() >= kills
    check(cluster)


def check(cluster: Cluster) -> None:
    """Compare what the workers wrote down with the ledger and with the data."""
    lines = {name: list(cluster.entries(name)) for name in WORKERS}
    assert not [line for all_ in lines.values() for line in all_ if line["what"] in ("failed", "wrong")]
    client, ledger = cluster.client, cluster.server.home / "ledger.sqlite"
    events = [record.event for record in read_ledger(ledger)]
    keys = _puts(lines, [event for event in events if isinstance(event, Admitted)])
    acks = _acks(lines, [event for event in events if isinstance(event, Acked)])
    commits = _commits(lines, [event for event in events if isinstance(event, Committed)], keys)

    # Every sample is open, with data that are right, or has ended.
    counts = client.counts()
    assert counts.admitted == len(keys) * GROUP
    assert counts.admitted == counts.open + counts.trained + sum(counts.dropped.values()) + counts.quarantined
    assert (counts.quarantined, sum(counts.dropped.values())) == (0, 0)
    trained = {row for event in events if isinstance(event, Committed) for row in event.trained}
    assert counts.trained == len(trained)
    for sample in sorted(set(range(counts.admitted)) - trained):
        data = client.read([sample])
        columns = {n: data.column(n)[0].as_py() for n in VALUES if n in data.schema.names}
        assert columns["key"] == keys[sample // GROUP]
        assert not wrong(sample, columns["key"], columns.get("response_ids"), columns.get("score"))

    # The account balances, the bound held, and all decisions come out the same when they are taken again.
    account = audit(cluster.server.home)
    assert account.violations == ()
    assert account.balanced
    assert max(account.staleness, default=0) <= STALENESS
    assert sum(1 for _ in reenact(ledger)) > 0
    done = Counter(line["what"] for all_ in lines.values() for line in all_)
    print(f"\nkills: {dict(cluster.kills)}, {cluster.kills.total()} in all")
    print(f"acknowledged: {done['put done']} puts, {done['ack done']} acks, {done['commit done']} commits; all there")
    print(f"not acknowledged, and there: {acks} acks, {commits} commits; refused: {done['lost']}, {done['refused']}")
    print(f"staleness of {account.trained} trained samples: {dict(account.staleness)}; {account.equation}")


def _puts(lines: dict[str, list[dict[str, Any]]], admitted: list[Admitted]) -> dict[int, int]:
    """Group → key of its prompt."""
    said = {
        (name, line["epoch"], line["sequence"]): line["keys"]
        for name, all_ in lines.items()
        for line in all_
        if line["what"] == "put"
    }
    there: dict[tuple[str, int, int], Admitted] = {}
    for event in admitted:
        assert event.put is not None
        put = event.put.producer, event.put.epoch, event.put.sequence
        assert put not in there, f"put {put} is there twice"
        there[put] = event
    for name, all_ in lines.items():
        for line in all_:
            if line["what"] == "put done":
                event = there[name, line["epoch"], line["sequence"]]
                assert line["groups"][0] == event.first_group
                assert len(line["groups"]) == len(event.prompt_tokens)
    keys = {event.first_group + i: key for put, event in there.items() for i, key in enumerate(said[put])}
    assert len(set(keys.values())) == len(keys) == sum(len(event.prompt_tokens) for event in admitted)
    return keys


def _acks(lines: dict[str, list[dict[str, Any]]], acked: list[Acked]) -> int:
    """Acks that happened although nobody was told."""
    there = Counter((event.lease_id, event.rows) for event in acked)
    assert not there or max(there.values()) == 1
    done = {
        (line["lease"], tuple(line["rows"])) for all_ in lines.values() for line in all_ if line["what"] == "ack done"
    }
    assert done <= there.keys()
    twice: dict[tuple[int, int], int] = defaultdict(int)
    for event in acked:
        for row in event.rows:
            twice[row, event.columns] += 1
    assert not twice or max(twice.values()) == 1, "a sample has a column from two acks"
    return len(there) - len(done)


def _commits(lines: dict[str, list[dict[str, Any]]], committed: list[Committed], keys: dict[int, int]) -> int:
    """Commits that happened although nobody was told."""
    there = {event.version: event.trained for event in committed}
    assert len(there) == len(committed)
    rows = [row for event in committed for row in event.trained]
    assert len(set(rows)) == len(rows), "a sample was trained twice"
    assert [PolicyVersion.unpack(version).n for version in there] == list(range(1, len(there) + 1))
    done = 0
    for all_ in lines.values():
        for line in all_:
            if line["what"] == "commit":
                assert line["keys"] == [keys[row // GROUP] for row in line["rows"]]
            elif line["what"] == "commit done":
                assert sorted(there[line["version"]]) == sorted(line["rows"])
                done += 1
    return len(there) - done


# -- death notices -----------------------------------------------------------------------------------------------------


def hold(home: str, location: str, ttl: float) -> None:
    """Take what there is, say so, and never come back."""
    from asyncflow.store.remote import connect

    store = connect(location, token=(Path(home) / "token").read_text())
    lease = store.lease("write", worker="holder", max_rows=99, ttl=ttl, timeout=30.0)
    assert lease is not None
    (Path(home) / "held").write_text("")
    threading.Event().wait()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[StoreProcess, Store]]:
    (tmp_path / "spec.yaml").write_text(SPEC)
    server = StoreProcess(tmp_path / "store", "--spec", str(tmp_path / "spec.yaml"))
    client = server.connect()
    yield server, client
    client.close()
    server.close()


def put_one_and_kill_its_holder(server: StoreProcess, client: Store, ttl: float) -> None:
    import pyarrow as pa

    client.serve("engine", PolicyVersion(n=0))
    client.admit(pa.RecordBatch.from_pydict({"key": pa.array([1], pa.int64())}), timeout=0.0)
    holder = processes.Process(target=hold, args=(str(server.home), server.location, ttl), daemon=True)
    holder.start()
    wait_until((server.home / "held").exists)
    holder.kill()
    holder.join()


def take(client: Store, timeout: float) -> Lease | None:
    return client.lease("write", worker="another", max_rows=9, ttl=60.0, timeout=timeout)


def test_a_supervisor_who_says_that_a_worker_has_died_gives_its_rows_back(served: tuple[StoreProcess, Store]) -> None:
    server, client = served
    put_one_and_kill_its_holder(server, client, ttl=3600.0)
    assert take(client, 0.0) is None

    client.gone("holder")

    lease = take(client, 0.0)
    assert lease is not None
    assert lease.attempts.tolist() == [2, 2]


def test_without_a_notice_the_rows_come_back_at_the_end_of_the_lease(served: tuple[StoreProcess, Store]) -> None:
    server, client = served
    put_one_and_kill_its_holder(server, client, ttl=0.5)

    lease = take(client, 60.0)

    assert lease is not None
    assert lease.attempts.tolist() == [2, 2]
    with pytest.raises(LeaseLost):
        client.renew(1, ttl=1.0)
