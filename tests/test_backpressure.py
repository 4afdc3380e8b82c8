"""Who puts more than there is room for waits, in the order in which he came, and is told for what. What is in the store
can always go on: neither the bytes nor the rows that are allowed keep a step from being made."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from asyncflow.errors import StoreError
from asyncflow.launch import resolve
from asyncflow.pipeline import open_store
from asyncflow.plan import plan
from asyncflow.store.broker import _Parked
from asyncflow.store.store import Store
from asyncflow.store.topics import ADMISSION
from asyncflow.types import PolicyVersion
from tests.conftest import TINY
from tests.processes import wait_until
from tests.test_flight import Served, take
from tests.test_store import ids, prompts, responses, rewards

GROUP, BATCH = 2, 4
"""Samples of a group and of a step, as `test_store.terms` has them."""


def alike(groups: int) -> pa.RecordBatch:
    """Prompts of the same size."""
    return prompts(1).take([0] * groups)


ONE = alike(1).nbytes
LONG = 30.0
"""Seconds that no test takes."""


class Bench(Served):
    """A served store with a bound that lets 32 samples in, and the client under test."""

    def __init__(self, folder: Path, kind: str, **terms: Any) -> None:
        super().__init__(folder, **{"max_staleness": 7, "max_attempts": 99, **terms})
        self.client: Store = self.store if kind == "embedded" else self.connect(local=kind == "near")
        self.version = 0
        self.done: list[str] = []

    def put(self, groups: int = 1, timeout: float = 0.0) -> tuple[int, ...] | None:
        return self.client.admit(alike(groups), timeout=timeout)

    def later(self, name: str, groups: int = 1) -> threading.Thread:
        """Somebody who puts as soon as there is room, and says so; he is in line when this returns."""
        client, before = self.connect(), self.store.broker.waiting()

        def put() -> None:
            assert client.admit(alike(groups), timeout=LONG) is not None
            self.done.append(name)

        thread = threading.Thread(target=put)
        thread.start()
        wait_until(lambda: self.store.broker.waiting() == before + 1)
        return thread

    def end(self, *groups: int) -> None:
        self.client.drop([sample for group in groups for sample in (2 * group, 2 * group + 1)], reason="to make room")

    def step(self) -> int:
        """Bring what can be to the learner, and train one step. How many samples it has."""
        for stage, columns in (("rollout", responses), ("reward", rewards)):
            lease = self.client.lease(stage, worker="w", max_rows=99, ttl=99.0, timeout=0.0)
            if lease is not None:
                made = (self.version,) if columns is responses else ()
                self.client.ack(lease.lease_id, ids(lease), columns(ids(lease), *made))
        lease = take(self.client, "train", BATCH)
        self.version += 1
        self.client.commit(
            leases=[lease.lease_id], trained=ids(lease), skipped=[], version=PolicyVersion(n=self.version)
        )
        self.client.serve("engine", PolicyVersion(n=self.version))
        return len(ids(lease))

    def awaited(self) -> str:
        return self.client.awaited("admission")


@pytest.fixture(params=["embedded", "near", "far"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def make(**terms: Any) -> Bench:
        benches.append(Bench(tmp_path, request.param, **terms))
        return benches[-1]

    yield make
    for bench in benches:
        bench.close()


# -- what it waits for -------------------------------------------------------------------------------------------------


def test_a_put_says_that_it_waits_for_rows(make: Callable[..., Bench]) -> None:
    bench = make(max_rows=6)
    assert bench.put(3) == (0, 1, 2)

    assert bench.put() is None

    assert bench.awaited() == "max_rows"
    bench.end(1)
    assert bench.put() == (3,)


def test_a_put_says_that_it_waits_for_bytes(make: Callable[..., Bench]) -> None:
    bench = make(max_bytes=4 * ONE)
    for group in range(4):
        assert bench.put() == (group,)

    assert bench.put() is None

    assert bench.awaited() == "max_bytes"
    assert bench.client.counts().bytes <= 4 * ONE
    bench.end(1)
    assert bench.put() == (4,)


def test_a_large_put_says_what_it_waits_for_where_a_small_one_has_room(make: Callable[..., Bench]) -> None:
    bench = make(max_bytes=6 * ONE)
    for _ in range(4):
        bench.put()

    assert bench.put(4) is None
    assert bench.awaited() == "max_bytes"

    assert bench.put() == (4,)
    assert bench.awaited() == "feeder"  # there is room for another one


def test_many_groups_at_once_say_what_they_wait_for(make: Callable[..., Bench]) -> None:
    bench = make(max_staleness=1)
    bench.put(3)

    assert bench.put(2) is None

    assert bench.awaited() == "bound"
    assert bench.put(1) == (3,)


def test_a_stage_that_has_nothing_to_do_says_that_bytes_keep_the_next_prompt_out(make: Callable[..., Bench]) -> None:
    bench = make(max_bytes=2 * ONE)
    for _ in range(2):
        bench.put()
    take(bench.client, "rollout")

    assert bench.put() is None

    assert bench.client.awaited("rollout") == "max_bytes"


def test_a_put_says_that_it_waits_for_the_bound_or_for_weights(make: Callable[..., Bench]) -> None:
    bench = make(max_staleness=1)
    assert bench.put(4) is not None
    assert bench.put() is None
    assert bench.awaited() == "bound"

    bench.client.serve("late", PolicyVersion(n=0))
    bench.step()

    assert bench.put() is None
    assert bench.awaited() == "weights"


# -- who waits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [{"max_rows": 6}, {"max_bytes": 3 * ONE}, {"max_staleness": 1}])
def test_a_put_gives_up_at_its_deadline_and_leaves_nothing_behind(
    make: Callable[..., Bench], limit: dict[str, int]
) -> None:
    bench = make(**limit)
    while bench.put() is not None:
        pass
    before = bench.store.table.snapshot(), bench.client.counts().bytes

    assert bench.put(timeout=0.05) is None
    assert bench.put(timeout=0.05) is None

    assert (bench.store.table.snapshot(), bench.client.counts().bytes) == before
    assert bench.store.broker.waiting() == 0


@pytest.mark.parametrize("limit", [{"max_rows": 8}, {"max_bytes": 4 * ONE}, {"max_staleness": 1}])
def test_room_goes_to_those_who_wait_in_the_order_in_which_they_came(
    make: Callable[..., Bench], limit: dict[str, int]
) -> None:
    bench = make(**limit)
    for _ in range(4):
        bench.put()
    threads = [bench.later(name) for name in ("first", "second", "third")]

    for number, name in enumerate(("first", "second", "third")):
        bench.end(number)
        threads[number].join(LONG)
        assert bench.done[-1:] == [name]
        assert bench.store.broker.waiting() == 2 - number


@pytest.mark.parametrize("limit", [{"max_rows": 8}, {"max_bytes": 4 * ONE}])
def test_a_large_put_is_not_starved_by_small_ones(make: Callable[..., Bench], limit: dict[str, int]) -> None:
    bench = make(**limit)
    for _ in range(4):
        bench.put()
    large = bench.later("large", groups=2)
    small = bench.later("small")

    bench.end(0)
    assert bench.put() is None  # nor does anybody come past him who does not wait at all
    assert bench.done == []
    bench.end(1)
    large.join(LONG)

    assert bench.done == ["large"]
    bench.end(2)
    small.join(LONG)
    assert bench.done == ["large", "small"]


def test_who_gives_up_makes_way_for_those_behind_him(make: Callable[..., Bench]) -> None:
    bench = make(max_rows=8)
    bench.put(3)
    broker = bench.store.broker
    large = _Parked(lambda _now, _last: broker._has_room(2, size=0) or None)
    broker._park(ADMISSION, large, LONG)
    small = bench.later("small")
    assert bench.done == []

    assert broker._collect(ADMISSION, large) is None  # his time is up

    small.join(LONG)
    assert bench.done == ["small"]


@pytest.mark.parametrize(
    ("limit", "groups", "message"),
    [
        ({"max_rows": 6}, 4, "4 groups at once need 8 places, and max_rows 6 never leaves more than 6"),
        ({"max_staleness": 0}, 3, "3 groups at once need 6 places, and max_staleness 0 never leaves more than 4"),
        ({"max_bytes": ONE}, 2, f"more than max_bytes {ONE} ever leaves: put fewer at a time"),
    ],
)
def test_a_put_that_can_never_fit_is_refused_at_once(
    make: Callable[..., Bench], limit: dict[str, int], groups: int, message: str
) -> None:
    bench = make(**limit)
    while bench.put() is not None:
        pass

    with pytest.raises(StoreError, match=message):
        bench.store.admit(alike(groups), timeout=LONG)  # although there is no room for anything else either

    bench.end(0)
    with pytest.raises(StoreError, match=message):
        bench.put(groups, timeout=LONG)
    assert bench.store.broker.waiting() == 0


# -- nothing is stuck --------------------------------------------------------------------------------------------------


def test_what_stages_bring_is_never_kept_out(make: Callable[..., Bench]) -> None:
    bench = make(max_bytes=2 * ONE)
    for _ in range(2):
        bench.put()
    assert bench.put() is None

    for stage, columns in (("rollout", responses), ("reward", rewards)):
        lease = take(bench.client, stage)
        bench.client.ack(lease.lease_id, ids(lease), columns(ids(lease)))
        assert bench.client.counts().bytes > 2 * ONE

    assert len(ids(take(bench.client, "train"))) == BATCH


@pytest.mark.parametrize("limit", [{"max_bytes": ONE}, {"max_rows": BATCH}, {"max_rows": BATCH, "max_bytes": ONE}])
@pytest.mark.parametrize("resumable", [False, True])
def test_with_the_least_room_that_there_can_be_steps_are_made_one_by_one(
    make: Callable[..., Bench], limit: dict[str, int], resumable: bool
) -> None:
    bench = make(resumable=resumable, **limit)
    for _ in range(5):  # what a checkpoint has not passed is kept, and keeps nobody out
        admitted = 0
        while bench.put() is not None:
            admitted += GROUP
        assert admitted == BATCH
        assert bench.step() == BATCH
    assert bench.client.counts().trained == 5 * BATCH


def test_many_who_put_and_one_who_trains_all_come_to_an_end(make: Callable[..., Bench]) -> None:
    most = 12 * ONE
    bench, steps, chance = make(max_bytes=most), 20, np.random.default_rng(0)
    sizes = [[1] * 10, [2] * 5, [2, 1, 1, 2, 1, 1, 2], [1] * 10]  # 40 groups in all
    assert sum(map(sum, sizes)) * GROUP == steps * BATCH
    largest: list[int] = []

    def put(groups: list[int]) -> None:
        client = bench.connect()
        for count in groups:
            assert client.admit(alike(count), timeout=LONG) is not None

    threads = [threading.Thread(target=put, args=(groups,)) for groups in sizes]
    for thread in threads:
        thread.start()
    for _ in range(steps):
        wait_until(lambda: bench.client.counts().open >= BATCH)
        largest.append(bench.client.counts().bytes)
        if chance.random() < 0.5:
            wait_until(lambda: bench.store.broker.waiting() > 0 or not any(thread.is_alive() for thread in threads))
        bench.step()
    for thread in threads:
        thread.join(LONG)

    assert bench.client.counts().trained == steps * BATCH
    assert not any(thread.is_alive() for thread in threads)
    assert max(largest) < most + 30 * pa_size()


def pa_size() -> int:
    """Bytes that a sample can have when it is scored."""
    return max(responses([i]).nbytes + rewards([i]).nbytes for i in range(100))


# -- as it is configured -----------------------------------------------------------------------------------------------


def test_the_limits_of_a_run_are_in_its_terms(tmp_path: Path) -> None:
    settings = ["store.max_rows=64", "store.max_bytes=1000000", "store.durability=power"]

    store = open_store(plan(resolve(TINY, settings)), tmp_path)

    assert (store.table.terms.max_rows, store.table.terms.max_bytes, store.durability) == (64, 1_000_000, "power")
    assert store.folder is not None
    store.close()


def test_without_durability_there_are_no_checkpoints() -> None:
    assert plan(resolve(TINY, ["store.durability=memory"])).config.checkpoint.every == 0
    assert plan(resolve(TINY, ["store.durability=process"])).config.checkpoint.every != 0
