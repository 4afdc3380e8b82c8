"""What workers hold: results of some rows must not suffer from what happened to others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from asyncflow.clock import ManualClock
from asyncflow.engines.fake import FakeRollout
from asyncflow.engines.models import resolve_model
from asyncflow.errors import LeaseLost
from asyncflow.launch import resolve
from asyncflow.pipeline import stages
from asyncflow.runtime.timeline import NoTimeline
from asyncflow.store.client import Lease
from asyncflow.store.lifecycle import State
from asyncflow.store.schema import Schema
from asyncflow.store.store import EmbeddedStore
from asyncflow.types import PolicyVersion, Sampling
from asyncflow.workers.actor_update import groups_of
from asyncflow.workers.attestation import FreshSamples
from asyncflow.workers.base import Heartbeat, HeldLease
from asyncflow.workers.host import EngineHost
from asyncflow.workers.rollout import RolloutWorker
from tests.conftest import TINY
from tests.processes import DEADLINE, wait_until
from tests.test_store import Bench, ids, prompts, responses, terms


class Held:
    """One group of four, out on one lease of the rollout stage of a real store."""

    def __init__(self, folder: Path) -> None:
        self.clock = ManualClock()
        self.bench = Bench(folder, clock=self.clock, num_generations=4)
        self.bench.admit()
        self.store = self.bench.store
        self.lease = self.bench.take("rollout", ttl=10.0)
        self.held = HeldLease(self.lease, self.store, Heartbeat(self.store))

    def states(self) -> dict[int, State]:
        return {sample_id: row.state for sample_id, row in self.store.table.samples().items()}


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Held]:
    one = Held(tmp_path)
    yield one
    one.store.close()


def test_results_of_rows_that_are_still_held_are_kept_when_another_was_lost(one: Held) -> None:
    one.store.drop([1], reason="cancelled")

    one.held.ack([3, 2, 1, 0], responses([3, 2, 1, 0]))

    assert one.states() == dict.fromkeys((0, 2, 3), State.GENERATED)
    reward = one.bench.take("reward")
    assert ids(reward) == [0, 2, 3]
    assert reward.data.column("response").to_pylist() == [f"Ünï {i}" for i in (0, 2, 3)]  # each got its own


def test_rows_that_are_given_back_come_back_at_once_when_another_was_lost(one: Held) -> None:
    one.store.drop([1], reason="cancelled")

    one.held.nack([0, 1, 2], "the engine went away")

    assert one.states() == {0: State.PROMPTED, 2: State.PROMPTED, 3: State.GENERATING}
    assert ids(one.bench.take("rollout")) == [0, 2]


def test_a_final_nack_stays_final_for_the_rest(one: Held) -> None:
    one.store.drop([1], reason="cancelled")

    one.held.nack([0, 1], "the prompt is too long", final=True)

    assert one.store.counts().quarantined == 1


def test_whatever_is_left_is_given_back_though_some_of_it_was_lost(one: Held) -> None:
    one.held.ack([0], responses([0]))
    one.store.drop([1], reason="cancelled")

    one.held.nack_rest("the worker failed")

    assert one.states() == {0: State.GENERATED, 2: State.PROMPTED, 3: State.PROMPTED}


def test_results_that_come_after_the_lease_ran_out_are_thrown_away(one: Held) -> None:
    one.clock.advance(10.0)
    again = one.bench.take("rollout")

    one.held.ack([0, 1], responses([0, 1]))
    one.held.nack([2, 3], "too late as well")

    assert one.states() == dict.fromkeys(range(4), State.GENERATING)
    one.store.ack(again.lease_id, ids(again), responses(ids(again)))


class Refusing:
    """A store that refuses every row, in its own way of naming what is lost."""

    def __init__(self, lost: Callable[[Sequence[int]], Sequence[int]]) -> None:
        self._lost = lost
        self.calls: list[list[int]] = []

    def ack(self, lease_id: int, sample_ids: Sequence[int], columns: Any) -> None:
        assert len(columns) == len(sample_ids)
        self.nack(lease_id, sample_ids)

    def nack(self, lease_id: int, sample_ids: Sequence[int], **options: Any) -> None:
        self.calls.append(list(sample_ids))
        raise LeaseLost("no", rows=self._lost(sample_ids))


@pytest.mark.parametrize(
    ("lost", "calls"),
    [
        (lambda rows: (), [[0, 1, 2]]),
        (lambda rows: (77,), [[0, 1, 2]]),
        (lambda rows: rows, [[0, 1, 2]]),
        (lambda rows: rows[-1:], [[0, 1, 2], [0, 1], [0]]),
    ],
)
def test_every_try_is_for_fewer_rows_than_the_one_before(
    one: Held, lost: Callable[[Sequence[int]], Sequence[int]], calls: list[list[int]]
) -> None:
    acks, nacks = Refusing(lost), Refusing(lost)

    HeldLease(one.lease, acks, Heartbeat(one.store)).ack([0, 1, 2], responses([0, 1, 2]))  # type: ignore[arg-type]
    HeldLease(one.lease, nacks, Heartbeat(one.store)).nack([0, 1, 2], "no")  # type: ignore[arg-type]

    assert acks.calls == nacks.calls == calls


def test_a_lease_that_is_renewed_holds_for_a_whole_time_to_live(one: Held) -> None:
    one.clock.advance(9.0)

    one.held.renew()

    one.clock.advance(9.0)
    one.held.ack([0, 1, 2, 3], responses([0, 1, 2, 3]))
    assert set(one.states().values()) == {State.GENERATED}


def test_renewing_a_lease_that_ran_out_says_so_before_anything_is_done_with_its_rows(one: Held) -> None:
    one.clock.advance(11.0)

    with pytest.raises(LeaseLost):
        one.held.renew()


class Slow:
    """A store whose first ack takes until it is released."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.release = threading.Event()
        self.acked: list[int] = []
        """Rows of each ack."""

    def ack(self, lease_id: int, sample_ids: Sequence[int], columns: Any = None) -> None:
        self.acked.append(len(sample_ids))
        assert self.release.wait(DEADLINE)
        self._store.ack(lease_id, sample_ids, columns)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_an_engine_does_not_wait_for_a_slow_store_which_then_gets_all_that_has_gathered_at_once(
    tmp_path: Path,
) -> None:
    schema = Schema(stages(resolve(TINY)))
    store = EmbeddedStore.create(
        schema, terms(train_batch_size=12, num_generations=12), ledger=tmp_path / "ledger.sqlite"
    )
    store.serve("rollout-0", PolicyVersion(n=0))
    store.admit(prompts(1), timeout=0.0)
    slow = Slow(store)
    host = EngineHost(FakeRollout(resolve_model("tiny")), "rollout-0", NoTimeline())
    worker = RolloutWorker(
        schema.stages["rollout"],
        slow,
        Heartbeat(store),
        NoTimeline(),
        host=host,
        sampling=Sampling(max_new_tokens=8),
        max_concurrency=12,
        seed=None,
        fresh=FreshSamples(0),
    )
    host.start()

    worker.turn()
    wait_until(lambda: host.finished == 12)
    slow.release.set()
    wait_until(lambda: store.counts().states.get("generated") == 12)

    assert sum(slow.acked) == 12
    assert len(slow.acked) <= 2
    lease = store.lease("reward", worker="reward", max_rows=12, ttl=60.0, timeout=0.0)
    assert lease is not None
    assert [len(tokens) > 0 for tokens in lease.data.column("response_ids").to_pylist()] == [True] * 12
    host.stop()
    store.close()


def test_tokens_that_are_too_old_take_no_part_in_the_loss() -> None:
    packed = [PolicyVersion(incarnation=i, n=n).packed for i, n in ((0, 1), (0, 2), (1, 2), (1, 3))]
    columns = {
        "prompt_ids": pa.array([[1, 2]] * 2, pa.list_(pa.int32())),
        "response_ids": pa.array([[5, 6, 7, 8], [5, 6]], pa.list_(pa.int32())),
        "rollout_logprobs": pa.array([[-1.0] * 4, [-1.0] * 2], pa.list_(pa.float32())),
        "token_versions": pa.array([packed, packed[2:]], pa.list_(pa.int64())),
        "finish_reason": pa.array(["stop", "stop"]),
        "reward": pa.array([1.0, 0.0], pa.float32()),
    }
    lease = Lease(
        lease_id=1,
        stage="actor_update",
        sample_ids=np.arange(2),
        group_ids=np.zeros(2, np.int64),
        attempts=np.ones(2, np.int32),
        data=pa.RecordBatch.from_pydict(columns),
        deadline=60.0,
        slots=2,
        oldest_trainable=2,
    )

    ((old, young),) = groups_of(lease)

    assert old.to_train(1.0, masked=False).mask.tolist() == [False, True, True, True]
    assert not old.to_train(1.0, masked=True).mask.any()
    assert (old.oldest, old.newest) == (PolicyVersion(n=2), PolicyVersion(incarnation=1, n=3))
    assert young.young.all()
