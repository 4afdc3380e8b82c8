"""What a stage gets from the store, and when: partial batches, stragglers, shares, late samples, quarantine."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from asyncflow.clock import Clock, ManualClock, SystemClock
from asyncflow.errors import Closed, LeaseLost, StalenessViolation
from asyncflow.store.client import Lease
from asyncflow.store.events import Opened
from asyncflow.store.schema import Schema, Stage
from asyncflow.store.store import EmbeddedStore
from asyncflow.types import PolicyVersion
from tests.processes import wait_until

COLUMNS = {
    "question": pa.string(),
    "prompt_ids": pa.list_(pa.int32()),
    "response_ids": pa.list_(pa.int32()),
    "token_versions": pa.list_(pa.int64()),
    "grade": pa.float32(),
}
SCHEMA = Schema(
    (
        Stage(name="make", role="generate", needs=("question",), writes=("response_ids", "token_versions")),
        Stage(name="grade", role="score", needs=("response_ids",), writes=("grade",), sampler="priority"),
        Stage(name="look", role="score", needs=("question", "response_ids"), max_times_leased=2),
        Stage(name="learn", role="train", needs=("response_ids", "token_versions", "grade")),
    ),
    columns=COLUMNS,
    prompt_columns=("question", "prompt_ids"),
)


SOON = 20.0
"""Seconds after which a test gives up; nothing here takes that long."""
MOMENT = 0.05


class Bench:
    def __init__(self, folder: Path, *, clock: Clock | None = None, **terms: Any) -> None:
        self.clock = ManualClock()
        values: dict[str, Any] = {
            "train_batch_size": 4,
            "num_generations": 2,
            "max_staleness": 1,
            "last_version": None,
            "min_group": 1,
            "max_attempts": 3,
        }
        self.store = EmbeddedStore.create(
            SCHEMA,
            Opened(**values | terms),
            ledger=folder / "ledger.sqlite",
            data=folder / "data",
            clock=clock or self.clock,
        )
        self.store.serve("engine", PolicyVersion(n=0))

    def admit(self, groups: int, **options: Any) -> None:
        prompts = {"question": [f"{i}?" for i in range(groups)], "prompt_ids": [[1, 2]] * groups}
        batch = pa.RecordBatch.from_pydict({name: pa.array(v, COLUMNS[name]) for name, v in prompts.items()})
        assert self.store.admit(batch, timeout=0.0, **options) is not None

    def take(self, stage: str, rows: int = 100, **options: Any) -> Lease:
        limits: dict[str, Any] = {"worker": "w", "max_rows": rows, "ttl": 1000.0, "timeout": 0.0}
        lease = self.store.lease(stage, **limits | options)
        assert lease is not None
        return lease

    def later(self, stage: str, **options: Any) -> tuple[threading.Thread, list[list[int]]]:
        """Somebody who waits for a lease; he is in line when this returns."""
        found: list[list[int]] = []
        thread = threading.Thread(target=lambda: found.append(self.take(stage, **options).sample_ids.tolist()))
        thread.start()
        wait_until(lambda: self.store.broker.waiting() == 1)
        return thread, found

    def make(self, lease: Lease, samples: Sequence[int], versions: Sequence[int] = (0, 0, 0)) -> None:
        packed = [[PolicyVersion(n=n).packed for n in versions]] * len(samples)
        self.ack(lease, samples, response_ids=[[7] * len(versions)] * len(samples), token_versions=packed)

    def ack(self, lease: Lease, samples: Sequence[int], **columns: Any) -> None:
        arrays = {name: pa.array(values, COLUMNS[name]) for name, values in columns.items()}
        self.store.ack(lease.lease_id, list(samples), pa.RecordBatch.from_pydict(arrays) if arrays else None)

    def grade(self) -> None:
        lease = self.take("grade")
        self.ack(lease, lease.sample_ids.tolist(), grade=[1.0] * len(lease.sample_ids))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.store.close()


def test_a_store_has_columns_of_its_own_and_stages_that_write_nothing(bench: Bench) -> None:
    bench.admit(2)
    bench.make(bench.take("make"), [0, 1, 2])

    first = bench.take("look", 2)
    assert first.data.column("question").to_pylist() == ["0?", "0?"]
    bench.ack(first, [0, 1])
    again = bench.take("look")
    bench.ack(again, again.sample_ids.tolist())

    assert again.sample_ids.tolist() == [2, 0, 1]  # what was seen least comes first
    assert bench.take("look").sample_ids.tolist() == [2]


def test_a_lease_waits_for_min_rows(bench: Bench) -> None:
    bench.admit(2)
    made = bench.take("make")
    thread, found = bench.later("grade", min_rows=3, timeout=SOON)

    for sample in (0, 1):
        bench.make(made, [sample])
        assert bench.store.broker.waiting() == 1
        assert bench.store.counts().leased == {"make": 3 - sample}
    bench.make(made, [2])

    thread.join(SOON)
    assert found == [[0, 1, 2]]


def test_rows_of_a_lease_that_runs_out_are_among_those_that_are_waited_for(bench: Bench) -> None:
    bench.admit(2)
    made = bench.take("make")
    bench.make(made, [0, 1])
    bench.take("grade", ttl=60.0)
    bench.make(made, [2])
    thread, found = bench.later("grade", min_rows=3, timeout=SOON)

    bench.clock.advance(59.0)
    bench.store.stat()  # whoever calls sees to the leases
    assert bench.store.broker.waiting() == 1
    bench.clock.advance(1.0)
    bench.store.stat()

    thread.join(SOON)
    assert found == [[0, 1, 2]]


def test_who_has_waited_for_min_rows_gets_what_there_is(bench: Bench) -> None:
    bench.admit(2)
    bench.make(bench.take("make"), [0])

    assert bench.take("grade", min_rows=3, timeout=MOMENT).sample_ids.tolist() == [0]
    assert bench.store.lease("grade", worker="w", max_rows=9, min_rows=3, ttl=9.0, timeout=MOMENT) is None


def test_closed_is_another_answer_than_nothing(bench: Bench) -> None:
    bench.store.close()

    with pytest.raises(Closed):
        bench.take("grade", min_rows=3)


def test_what_has_priority_at_admission_or_by_a_later_word_comes_first(bench: Bench) -> None:
    bench.admit(3, priorities=[0, 5, 0])
    bench.make(bench.take("make"), range(6))
    bench.store.prioritise(9, samples=[5])

    assert bench.take("grade", 4).sample_ids.tolist() == [5, 2, 3, 0]


def test_all_processes_of_a_learner_get_the_same_lease_and_each_its_share(bench: Bench) -> None:
    bench.admit(2)
    lease = bench.take("make")
    for sample, length in zip(range(4), (5, 100, 90, 10), strict=True):
        bench.make(lease, [sample], [0] * length)
    bench.grade()

    first = bench.take("learn", ranks=2, request="step 1")
    others = [bench.take("learn", ranks=2, request="step 1") for _ in range(3)]

    assert all(other.lease_id == first.lease_id and other.data.equals(first.data) for other in others)
    assert sorted(share.tolist() for share in first.shares) == [[0, 1], [2, 3]]
    assert [[s.tolist() for s in other.shares] for other in others] == [[s.tolist() for s in first.shares]] * 3
    bench.store.commit(leases=[first.lease_id], trained=range(4), skipped=[], version=PolicyVersion(n=1))
    with pytest.raises(LeaseLost, match="ask under a new name"):
        bench.take("learn", ranks=2, request="step 1")


def test_a_straggler_is_given_up_while_the_learner_waits(tmp_path: Path) -> None:
    bench = Bench(tmp_path, clock=SystemClock(), group_timeout=MOMENT, train_batch_size=2)
    bench.admit(1)
    bench.make(bench.take("make"), [1])
    bench.grade()

    assert bench.take("learn", timeout=SOON).sample_ids.tolist() == [1]
    assert bench.store.counts().dropped == {"straggler": 1}
    bench.store.close()


def test_a_sample_is_put_back_from_quarantine_with_its_data(bench: Bench) -> None:
    bench.admit(1)
    bench.make(bench.take("make"), [0, 1])
    graded = bench.take("grade")
    bench.store.nack(graded.lease_id, [1], reason="a bug", final=True)
    bench.ack(graded, [0], grade=[1.0])

    bench.store.restore([1])

    counts = bench.store.counts()
    assert (counts.quarantined, counts.restored, counts.open) == (0, 1, 2)
    assert bench.take("grade").data.column("response_ids").to_pylist() == [[7, 7, 7]]


def test_tokens_that_are_too_old_are_masked_and_the_commit_says_so(tmp_path: Path) -> None:
    bench = Bench(tmp_path, late_samples="mask", max_staleness=1, train_batch_size=2, num_generations=1)
    bench.admit(4)
    lease = bench.take("make")
    bench.make(lease, [2, 3])
    bench.grade()
    step = bench.take("learn")
    bench.store.commit(leases=[step.lease_id], trained=[2, 3], skipped=[], version=PolicyVersion(n=1))
    bench.store.serve("engine", PolicyVersion(n=1))
    bench.admit(2)
    bench.make(bench.take("make"), [4, 5], [1])
    bench.grade()
    step = bench.take("learn")
    bench.store.commit(leases=[step.lease_id], trained=[4, 5], skipped=[], version=PolicyVersion(n=2))
    bench.make(lease, [0, 1], [0, 1, 2])  # it went on while others overtook it
    bench.grade()

    step = bench.take("learn")
    commit: dict[str, Any] = {"leases": [step.lease_id], "trained": [0, 1], "skipped": []}
    assert step.oldest_trainable == 1
    with pytest.raises(StalenessViolation):
        bench.store.commit(**commit, version=PolicyVersion(n=3))
    bench.store.commit(**commit, version=PolicyVersion(n=3), masked=dict.fromkeys([0, 1], PolicyVersion(n=1)))

    assert bench.store.counts().masked == 2
    bench.store.close()


def test_what_is_too_old_is_generated_again_and_its_old_data_go(tmp_path: Path) -> None:
    bench = Bench(tmp_path, late_samples="requeue", train_batch_size=2, num_generations=1)
    bench.admit(4)
    bench.make(bench.take("make"), range(4))
    bench.grade()
    bench.store.commit(leases=[bench.take("learn").lease_id], trained=[0, 1], skipped=[], version=PolicyVersion(n=1))
    bench.store.amend(max_staleness=0)
    bench.store.serve("engine", PolicyVersion(n=1))

    assert bench.store.lease("learn", worker="w", max_rows=9, ttl=9.0, timeout=0.0) is None
    assert bench.store.counts().requeued == 2
    again = bench.take("make")
    assert again.sample_ids.tolist() == [2, 3]
    bench.make(again, [2, 3], [1])
    bench.grade()
    assert bench.take("learn").data.column("response_ids").to_pylist() == [[7], [7]]
    bench.store.close()
