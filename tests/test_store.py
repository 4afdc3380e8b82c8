"""The store as its callers see it: waiting, refusing, data there and back, and a ledger that survives everything."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from asyncflow.clock import Clock, ManualClock
from asyncflow.errors import Closed, IllegalTransition, LeaseLost, LedgerError, StoreError
from asyncflow.store.client import Lease
from asyncflow.store.events import Acked, Admitted, Committed, Opened, Quarantined
from asyncflow.store.frames import HEADER_BYTES, headers_of
from asyncflow.store.journal import read_ledger
from asyncflow.store.memory_frames import MemoryFrames
from asyncflow.store.schema import COLUMNS, PROMPT_COLUMNS, Schema, Stage
from asyncflow.store.store import EmbeddedStore
from asyncflow.store.table import Table
from asyncflow.types import PolicyVersion
from tests.processes import wait_until

RESPONSE = ("response_ids", "rollout_logprobs", "token_versions", "response", "finish_reason")
SCHEMA = Schema(
    (
        Stage(name="rollout", role="generate", needs=PROMPT_COLUMNS, writes=RESPONSE),
        Stage(name="reward", role="score", needs=("response", "prompt_columns"), writes=("reward", "reward_parts")),
        Stage(name="train", role="train", needs=(*PROMPT_COLUMNS, *RESPONSE, "reward", "reward_parts")),
    )
)
SOON = 20.0
"""Seconds after which a test gives up; nothing here takes that long."""


def terms(**changes: Any) -> Opened:
    values: dict[str, Any] = {
        "train_batch_size": 4,
        "num_generations": 2,
        "max_staleness": 1,
        "last_version": None,
        "min_group": 2,
        "max_attempts": 3,
    }
    return Opened(**values | changes)


class Bench:
    """A store in a folder, and prompts and responses to put into it."""

    def __init__(self, folder: Path, *, clock: Clock | None = None, serves: bool = True, **changes: Any) -> None:
        self.ledger = folder / "ledger.sqlite"
        self.terms = terms(**changes)
        self.store = EmbeddedStore.create(SCHEMA, self.terms, ledger=self.ledger, clock=clock)
        if serves:
            self.store.serve("engine", PolicyVersion(n=0))

    def admit(self, groups: int = 1, timeout: float = 0.0) -> tuple[int, ...] | None:
        return self.store.admit(prompts(groups), timeout=timeout)

    def lease(self, stage: str, rows: int = 100, *, timeout: float = 0.0, ttl: float = 60.0) -> Lease | None:
        return self.store.lease(stage, worker="worker", max_rows=rows, ttl=ttl, timeout=timeout)

    def take(self, stage: str, rows: int = 100, **options: float) -> Lease:
        lease = self.lease(stage, rows, **options)
        assert lease is not None, f"nothing is ready for {stage}"
        return lease

    def generate(self, version: int = 0) -> None:
        lease = self.take("rollout")
        self.store.ack(lease.lease_id, ids(lease), responses(ids(lease), version))

    def score(self) -> None:
        lease = self.take("reward")
        self.store.ack(lease.lease_id, ids(lease), rewards(ids(lease)))

    def commit(self, *leases: Lease, skipped: Sequence[int] = (), version: int = 1) -> None:
        """Train all rows of the leases as one step, except those that are skipped."""
        self.store.commit(
            leases=[lease.lease_id for lease in leases],
            trained=[row for lease in leases for row in ids(lease) if row not in skipped],
            skipped=skipped,
            version=PolicyVersion(n=version),
        )

    def nbytes(self) -> int:
        self.store.awaited("admission")  # what nobody needs goes at the end of a call
        data = self.store._data
        assert isinstance(data, MemoryFrames)
        return sum(batch.nbytes for batch in data.frames.values())

    def rebuilt(self) -> Table:
        """The table as the ledger tells it."""
        events = [record.event for record in read_ledger(self.ledger)]
        assert events[0] == self.terms
        table = Table(SCHEMA, self.terms)
        for event in events[1:]:
            table.apply(event)
        return table


def ids(lease: Lease) -> list[int]:
    return [row.sample_id for row in lease.rows]


def batch(columns: Mapping[str, Sequence[Any]]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({name: pa.array(values, COLUMNS[name]) for name, values in columns.items()})


def prompts(groups: int) -> pa.RecordBatch:
    return batch(
        {
            "prompt": [json.dumps(f"What is {i} + 1?") for i in range(groups)],
            "prompt_columns": [json.dumps({"answer": i + 1}) for i in range(groups)],
            "prompt_ids": [list(range(10 + i)) for i in range(groups)],
        }
    )


def responses(samples: Sequence[int], version: int = 0) -> pa.RecordBatch:
    """A response of `sample_id` tokens for each sample; the first one has none at all."""
    packed = PolicyVersion(n=version).packed
    return batch(
        {
            "response_ids": [list(range(i)) for i in samples],
            "rollout_logprobs": [[-0.5] * i for i in samples],
            "token_versions": [[packed] * i for i in samples],
            "response": [f"Ünï {i}" for i in samples],
            "finish_reason": ["stop" if i % 2 else "length" for i in samples],
        }
    )


def rewards(samples: Sequence[int]) -> pa.RecordBatch:
    return batch({"reward": [i / 2 for i in samples], "reward_parts": [json.dumps({"exact": i}) for i in samples]})


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.store.close()


# -- data --------------------------------------------------------------------------------------------------------------


def test_every_column_comes_back_as_it_was_put(bench: Bench) -> None:
    bench.admit(2)
    lease = bench.take("rollout")
    assert lease.data.column("prompt_ids").to_pylist() == [list(range(10)), list(range(10)), *[list(range(11))] * 2]
    for sample in (3, 0, 2, 1):  # completions end in any order, one by one
        bench.store.ack(lease.lease_id, [sample], responses([sample]))
    bench.score()

    train = bench.take("train")

    assert ids(train) == [0, 1, 2, 3]
    assert [row.group_id for row in train.rows] == [0, 0, 1, 1]
    assert train.slots == 4
    data = train.data.to_pydict()
    expected = {**prompts(2).to_pydict(), **responses(range(4)).to_pydict(), **rewards(range(4)).to_pydict()}
    for name in PROMPT_COLUMNS:
        expected[name] = [expected[name][group] for group in (0, 0, 1, 1)]
    assert data == expected
    assert {name: train.data.schema.field(name).type for name in train.data.schema.names} == {
        name: COLUMNS[name] for name in SCHEMA.train.needs
    }


def test_a_lease_brings_the_columns_of_its_stage_and_no_others(bench: Bench) -> None:
    bench.admit()
    bench.generate()

    assert bench.take("reward").data.schema.names == ["response", "prompt_columns"]


def test_columns_in_another_integer_type_are_converted(bench: Bench) -> None:
    columns = prompts(1)
    wide = columns.set_column(2, "prompt_ids", pa.array([[1, 2]], pa.list_(pa.int64())))

    bench.store.admit(wide, timeout=0.0)

    assert bench.take("rollout").data.column("prompt_ids").type == COLUMNS["prompt_ids"]


def test_slices_of_a_larger_batch_are_put_as_they_read(bench: Bench) -> None:
    bench.store.admit(prompts(5).slice(3, 1), timeout=0.0)

    lease = bench.take("rollout", 1)
    bench.store.ack(lease.lease_id, [0], responses(range(9)).slice(7, 1))

    assert bench.take("reward").data.column("response").to_pylist() == ["Ünï 7"]
    assert bench.store.table.samples()[0].tokens == 13 + 7


def test_a_prompt_is_stored_once_for_its_group(tmp_path: Path) -> None:
    bench = Bench(tmp_path, num_generations=4)
    bench.admit()

    assert bench.nbytes() == prompts(1).nbytes
    assert bench.take("rollout").data.column("prompt").to_pylist() == prompts(1).column("prompt").to_pylist() * 4
    bench.store.close()


def test_data_are_released_when_their_samples_end(bench: Bench) -> None:
    bench.admit(3)
    bench.generate()
    bench.score()
    assert bench.nbytes() > 0

    train = bench.take("train")
    bench.commit(train, skipped=ids(train)[2:])
    bench.store.drop([4, 5], reason="cancelled")

    assert bench.nbytes() == 0


def test_a_frame_lives_as_long_as_one_of_its_rows(bench: Bench) -> None:
    bench.admit()
    bench.generate()
    before = bench.nbytes()

    bench.store.drop([1], reason="cancelled")  # the group is too short then

    assert before > 0
    assert bench.nbytes() == 0


def test_a_refused_ack_keeps_no_data(bench: Bench) -> None:
    bench.admit()
    lease = bench.take("rollout")
    bench.store.nack(lease.lease_id, ids(lease), reason="no")
    before = bench.nbytes()

    with pytest.raises(LeaseLost):
        bench.store.ack(lease.lease_id, ids(lease), responses(ids(lease)))

    assert bench.nbytes() == before


# -- what does not fit is refused, and nothing is lost -----------------------------------------------------------------

GOOD = responses([5]).to_pydict()


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"reward": [1.0]}, r"stage rollout writes response_ids, .* its ack brings reward"),
        ({**GOOD, "reward": [1.0]}, r"its ack brings .*reward"),
        ({k: v for k, v in GOOD.items() if k != "response"}, r"stage rollout writes .*response,"),
        ({**GOOD, "invented": [1.0]}, "columns do not fit: invented not expected"),
        ({**GOOD, "response_ids": ["text"]}, r"column response_ids must be list<.*int32>, not string"),
        ({**GOOD, "response_ids": [[2**40] * 5]}, r"column response_ids must be .*, not list<.*int64>: .*"),
        ({**GOOD, "finish_reason": [None]}, "column finish_reason has 1 empty values"),
        ({**GOOD, "rollout_logprobs": [[0.5, None, 0.5, None, 0.5]]}, "column rollout_logprobs has 2 empty values"),
        ({**GOOD, "response_ids": [None]}, "column response_ids has 1 empty values"),
        ({**GOOD, "token_versions": [[0, 0]]}, "response_ids and token_versions do not have the same number of tokens"),
        ({k: v * 2 for k, v in GOOD.items()}, "an ack for 1 samples brings 2 rows of columns"),
        ({k: [] for k in GOOD}, "an ack for 1 samples brings 0 rows of columns"),
    ],
)
def test_columns_that_do_not_fit_are_refused_in_a_sentence(
    bench: Bench, columns: dict[str, list[Any]], sentence: str
) -> None:
    bench.admit()
    lease = bench.take("rollout")
    before, bytes_before = bench.store.table.snapshot(), bench.nbytes()

    with pytest.raises(StoreError, match=sentence):
        bench.store.ack(lease.lease_id, [1], pa.RecordBatch.from_pydict(columns))

    assert (bench.store.table.snapshot(), bench.nbytes()) == (before, bytes_before)
    bench.store.ack(lease.lease_id, [1], responses([1]))  # and the worker can go on


def test_a_column_that_is_there_twice_is_refused(bench: Bench) -> None:
    bench.admit()
    lease = bench.take("rollout")
    good = responses([1])
    twice = pa.RecordBatch.from_arrays([*good.columns, good.column(3)], names=[*good.schema.names, "response"])

    with pytest.raises(StoreError, match="response there twice"):
        bench.store.ack(lease.lease_id, [1], twice)


def test_prompts_that_do_not_fit_are_refused(bench: Bench) -> None:
    without = prompts(1).select(["prompt", "prompt_ids"])

    with pytest.raises(StoreError, match="columns do not fit: prompt_columns missing"):
        bench.store.admit(without, timeout=0.0)

    assert bench.store.counts().admitted == 0


def test_an_unknown_stage_is_refused_with_the_names_of_the_known_ones(bench: Bench) -> None:
    with pytest.raises(StoreError, match="no stage 'judge'; the stages are rollout, reward, train"):
        bench.lease("judge")


def test_nothing_at_all_is_put_without_a_trace(bench: Bench) -> None:
    bench.admit()
    lease = bench.take("rollout")
    before = bench.store.table.snapshot()

    assert bench.admit(0) == ()
    bench.store.ack(lease.lease_id, [], responses([]))

    assert bench.store.table.snapshot() == before


def test_a_commit_that_is_no_step_is_refused_and_the_samples_stay(bench: Bench) -> None:
    bench.admit(2)
    bench.generate()
    bench.score()
    train = bench.take("train")

    with pytest.raises(IllegalTransition, match="consumes 4 places, this one 2"):
        bench.store.commit(leases=[train.lease_id], trained=[0, 1], skipped=[], version=PolicyVersion(n=1))

    bench.commit(train)


# -- waiting -----------------------------------------------------------------------------------------------------------


class Waiter:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._call()
        except BaseException as error:
            self.error = error

    def join(self) -> Any:
        self._thread.join(SOON)
        assert not self._thread.is_alive(), "the call still waits"
        if self.error is not None:
            raise self.error
        return self.result


@pytest.fixture
def parked(tmp_path: Path) -> Iterator[tuple[Bench, Callable[[Callable[[], Any]], Waiter]]]:
    """A bench, and a way to start a call that is known to be asleep when it returns."""
    bench = Bench(tmp_path, max_attempts=1)

    def park(call: Callable[[], Any]) -> Waiter:
        before = bench.store.broker.waiting()
        waiter = Waiter(call)
        wait_until(lambda: bench.store.broker.waiting() > before)
        return waiter

    yield bench, park
    bench.store.close()


Parked = tuple[Bench, Callable[[Callable[[], Any]], Waiter]]


def test_a_lease_that_waits_is_woken_by_the_ack_it_waits_for(parked: Parked) -> None:
    bench, park = parked
    bench.admit()
    waiter = park(lambda: bench.lease("reward", timeout=600.0))

    bench.generate()

    assert ids(waiter.join()) == [0, 1]


def test_the_training_stage_is_woken_by_tokens_that_are_too_old_to_wait_for(parked: Parked) -> None:
    """The place of a group that comes too late goes to the next one."""
    bench, park = parked
    bench.admit(4)
    slow = bench.take("rollout", 6)
    bench.store.ack(slow.lease_id, [0, 1, 2, 3], responses([0, 1, 2, 3]))
    bench.score()
    bench.commit(bench.take("train"))
    bench.store.serve("engine", PolicyVersion(n=1))
    bench.admit()
    bench.generate(version=1)
    bench.score()
    bench.store.amend(max_staleness=0)
    assert ids(bench.take("train")) == [6, 7]
    waiter = park(lambda: bench.lease("train", timeout=600.0))

    bench.store.ack(slow.lease_id, [4, 5], responses([4, 5], version=0))

    assert ids(waiter.join()) == [8, 9]


def test_an_admission_that_waits_is_woken_by_a_commit_that_is_served(parked: Parked) -> None:
    bench, park = parked
    bench.admit(4)
    bench.generate()
    bench.score()
    waiter = park(lambda: bench.admit(timeout=600.0))

    bench.commit(bench.take("train"))
    bench.store.serve("engine", PolicyVersion(n=1))

    assert waiter.join() == (4,)


def test_the_training_stage_is_woken_when_a_lost_row_completes_its_group(tmp_path: Path) -> None:
    bench = Bench(tmp_path, num_generations=4, min_group=2)
    bench.admit()
    lease = bench.take("rollout")
    bench.store.ack(lease.lease_id, [0, 1, 2], responses([0, 1, 2]))
    bench.score()
    waiter = Waiter(lambda: bench.lease("train", timeout=600.0))
    wait_until(lambda: bench.store.broker.waiting() > 0)

    bench.store.nack(lease.lease_id, [3], reason="too long", final=True)

    train = waiter.join()
    assert (ids(train), train.slots) == ([0, 1, 2], 4)
    bench.store.close()


def test_rows_of_a_dead_worker_come_back_though_nothing_else_happens(parked: Parked) -> None:
    """The waiter slept before the lease was given, so it must hear of its deadline."""
    bench, park = parked
    bench.admit(4)
    waiter = park(lambda: bench.admit(timeout=600.0))

    bench.take("rollout", 2, ttl=0.05)  # its worker is never heard of again; one attempt is all there is

    assert waiter.join() == (4,)
    assert bench.store.counts().quarantined == 2


def test_waiting_ends_with_none_when_the_time_is_up(bench: Bench) -> None:
    assert bench.lease("rollout", timeout=0.0) is None
    assert bench.lease("rollout", timeout=0.02) is None
    bench.admit()
    assert bench.admit(4, timeout=0.02) is None


def test_what_there_will_never_be_room_for_is_not_waited_for(bench: Bench) -> None:
    with pytest.raises(StoreError, match="5 groups at once need 10 places"):
        bench.admit(5, timeout=600.0)

    assert bench.nbytes() == 0


def test_closing_wakes_everybody_who_waits(parked: Parked) -> None:
    bench, park = parked
    bench.admit(4)
    waiters = [
        park(lambda: bench.lease("reward", timeout=600.0)),
        park(lambda: bench.lease("train", timeout=600.0)),
        park(lambda: bench.admit(timeout=600.0)),
    ]

    bench.store.close()

    for waiter in waiters:
        with pytest.raises(Closed):
            waiter.join()


def test_a_closed_store_refuses_every_call_and_can_be_closed_again(bench: Bench) -> None:
    bench.admit()
    lease = bench.take("rollout")
    bench.store.close()
    bench.store.close()

    calls: list[Callable[[], object]] = [
        bench.admit,
        lambda: bench.lease("rollout"),
        lambda: bench.store.ack(lease.lease_id, [0], responses([0])),
        lambda: bench.store.nack(lease.lease_id, [0], reason="no"),
        lambda: bench.store.renew(lease.lease_id, ttl=1.0),
        lambda: bench.commit(lease),
        lambda: bench.store.drop([0], reason="no"),
        lambda: bench.store.serve("engine", None),
    ]
    for call in calls:
        with pytest.raises(Closed):
            call()
    assert bench.store.counts().admitted == 2  # the account stays readable


# -- leases and time ---------------------------------------------------------------------------------------------------


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def timed(tmp_path: Path, clock: ManualClock) -> Iterator[Bench]:
    bench = Bench(tmp_path, clock=clock)
    bench.admit()
    yield bench
    bench.store.close()


def test_a_learner_cannot_commit_what_another_one_holds_by_now(timed: Bench, clock: ManualClock) -> None:
    timed.admit()
    timed.generate()
    timed.score()
    late = timed.take("train", ttl=10.0)
    clock.advance(10.0)
    held = timed.take("train")

    with pytest.raises(LeaseLost) as lost:
        timed.commit(late)

    assert lost.value.rows == (0, 1, 2, 3)
    timed.commit(held)
    assert timed.store.counts().trained == 4


def test_an_ack_after_the_deadline_is_refused(timed: Bench, clock: ManualClock) -> None:
    lease = timed.take("rollout", ttl=10.0)
    clock.advance(10.0)

    with pytest.raises(LeaseLost):
        timed.store.ack(lease.lease_id, ids(lease), responses(ids(lease)))

    again = timed.take("rollout")
    assert ids(again) == ids(lease)
    assert [row.attempt for row in again.rows] == [2, 2]


def test_a_renewed_lease_is_kept(timed: Bench, clock: ManualClock) -> None:
    lease = timed.take("rollout", ttl=10.0)
    clock.advance(9.0)
    timed.store.renew(lease.lease_id, ttl=10.0)
    clock.advance(9.0)

    timed.store.ack(lease.lease_id, ids(lease), responses(ids(lease)))

    assert timed.store.counts().states["generated"] == 2


def test_a_lease_that_ran_out_cannot_be_renewed(timed: Bench, clock: ManualClock) -> None:
    lease = timed.take("rollout", ttl=10.0)
    clock.advance(10.0)

    with pytest.raises(LeaseLost):
        timed.store.renew(lease.lease_id, ttl=10.0)


def test_a_row_whose_workers_keep_dying_is_quarantined(timed: Bench, clock: ManualClock) -> None:
    for _ in range(3):
        timed.take("rollout", 1, ttl=10.0)
        clock.advance(10.0)

    assert timed.lease("rollout") is None  # what was left of its group is too short
    counts = timed.store.counts()
    assert (counts.quarantined, counts.dropped) == (1, {"short_group": 1})


# -- the account and the ledger ----------------------------------------------------------------------------------------


def test_the_account_balances_and_says_where_everything_is(bench: Bench) -> None:
    bench.admit(4)
    bench.generate()
    bench.score()
    bench.commit(bench.take("train"), skipped=[3])
    bench.store.drop([4, 5], reason="cancelled")
    bench.store.serve("engine", PolicyVersion(n=1))

    counts = bench.store.counts()

    assert counts.admitted == counts.trained + sum(counts.dropped.values()) + counts.quarantined + counts.open
    assert counts.dropped == {"zero_variance_skipped": 1, "cancelled": 2}
    assert (counts.trained, counts.open, counts.capacity) == (3, 2, 6)
    assert (counts.learner, counts.served) == (PolicyVersion(n=1), {"engine": PolicyVersion(n=1)})
    assert counts.oldest == PolicyVersion(n=0)


def run_a_life(bench: Bench, clock: ManualClock) -> None:
    """A bit of everything."""
    for version in range(3):
        bench.admit(2)
        lease = bench.take("rollout", 3)
        bench.store.nack(lease.lease_id, ids(lease)[:1], reason="engine went away")
        bench.store.ack(lease.lease_id, ids(lease)[1:], responses(ids(lease)[1:], version))
        bench.generate(version)
        bench.take("reward", 2, ttl=5.0)
        clock.advance(5.0)
        bench.score()
        train = bench.take("train")
        bench.store.renew(train.lease_id, ttl=60.0)
        bench.commit(train, skipped=ids(train)[2:], version=version + 1)
        bench.store.serve("engine", PolicyVersion(n=version + 1))
    bench.admit(2)
    lease = bench.take("rollout")
    bench.store.nack(lease.lease_id, ids(lease)[:1], reason="prompt too long", final=True)
    bench.store.drop(ids(lease)[2:], reason="cancelled")


def test_replaying_the_ledger_rebuilds_the_table(tmp_path: Path) -> None:
    clock = ManualClock()
    bench = Bench(tmp_path, clock=clock)
    run_a_life(bench, clock)
    live = bench.store.table.snapshot()

    assert bench.rebuilt().snapshot() == live  # while the store is open
    bench.store.close()
    assert bench.rebuilt().snapshot() == live  # and after


def test_the_ledger_is_one_file_after_closing(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.admit()
    bench.store.close()

    assert [path.name for path in tmp_path.iterdir()] == ["ledger.sqlite"]
    assert len(list(read_ledger(bench.ledger))) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.sqlite"]  # and after reading it


def test_a_store_can_be_closed_while_its_ledger_is_read(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.admit()
    reader = read_ledger(bench.ledger)
    next(reader)

    bench.store.close()

    assert len(list(reader)) == 2
    assert len(list(read_ledger(bench.ledger))) == 3


def test_a_ledger_is_never_overwritten(bench: Bench) -> None:
    with pytest.raises(LedgerError, match="exists already"):
        EmbeddedStore.create(SCHEMA, bench.terms, ledger=bench.ledger)


def test_a_ledger_that_cannot_be_made_says_where(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"nowhere.*: name a directory that can be written"):
        EmbeddedStore.create(SCHEMA, terms(), ledger=tmp_path / "nowhere" / "ledger.sqlite")


@contextmanager
def full_disk() -> Iterator[None]:
    """Meanwhile the system refuses this process every byte of every file, as it does when a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


FULL = r"ledger\.sqlite cannot be written \(disk I/O error\), so what was to be recorded did not happen: see that"


@pytest.fixture
def busy(tmp_path: Path, clock: ManualClock) -> Iterator[Bench]:
    """Samples 0–3 are scored, 4 and 5 are being generated, 6 and 7 wait."""
    bench = Bench(tmp_path, clock=clock)
    bench.admit(2)
    bench.generate()
    bench.score()
    bench.admit(2)
    yield bench
    bench.store.close()


@pytest.mark.parametrize(
    "call",
    [
        lambda bench, rollout, train: bench.lease("rollout"),
        lambda bench, rollout, train: bench.store.ack(rollout.lease_id, [4], responses([4])),
        lambda bench, rollout, train: bench.store.nack(rollout.lease_id, [4, 5], reason="no"),
        lambda bench, rollout, train: bench.store.nack(rollout.lease_id, [4, 5], reason="several events", final=True),
        lambda bench, rollout, train: bench.commit(train),
        lambda bench, rollout, train: bench.store.drop([7], reason="the rest is too short"),
        lambda bench, rollout, train: bench.store.serve("engine", None),
    ],
)
def test_what_cannot_be_recorded_does_not_happen(busy: Bench, call: Callable[[Bench, Lease, Lease], object]) -> None:
    rollout, train = busy.take("rollout", 2), busy.take("train")
    before, bytes_before = busy.store.table.snapshot(), busy.nbytes()

    with full_disk(), pytest.raises(LedgerError, match=FULL):
        call(busy, rollout, train)

    assert (busy.store.table.snapshot(), busy.nbytes()) == (before, bytes_before)
    assert busy.rebuilt().snapshot() == before
    call(busy, rollout, train)  # and when there is room again, it does
    assert busy.rebuilt().snapshot() == busy.store.table.snapshot() != before


def test_an_admission_that_cannot_be_recorded_keeps_no_data(bench: Bench) -> None:
    with full_disk(), pytest.raises(LedgerError, match=FULL):
        bench.admit(2)

    assert bench.nbytes() == 0
    assert bench.admit(2) == (0, 1)


def test_leases_that_ran_out_while_the_disk_was_full_come_back_later(busy: Bench, clock: ManualClock) -> None:
    busy.take("rollout", 2, ttl=10.0)
    clock.advance(10.0)
    before = busy.store.table.snapshot()

    with full_disk(), pytest.raises(LedgerError, match=FULL):
        busy.lease("rollout")

    assert busy.store.table.snapshot() == before
    assert ids(busy.take("rollout")) == [4, 5, 6, 7]


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_store import Bench, ids, responses, rewards
from asyncflow.types import PolicyVersion

bench, step = Bench(Path(sys.argv[1])), 0

def say(*words):
    print(*words, flush=True)

while True:
    say("admitted", *bench.admit(2))
    lease = bench.take("rollout")
    for sample in ids(lease):
        bench.store.ack(lease.lease_id, [sample], responses([sample % 5], step))
        say("acked", sample)
    lease = bench.take("reward")
    bench.store.ack(lease.lease_id, ids(lease), rewards(ids(lease)))
    lease, step = bench.take("train"), step + 1
    bench.commit(lease, version=step)
    say("committed", *ids(lease))
    bench.store.serve("engine", PolicyVersion(n=step))
"""


@pytest.mark.parametrize("lines", [1, 23, 230])
def test_whatever_was_acknowledged_survives_kill_9(tmp_path: Path, lines: int) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(tests=str(Path(__file__).parent)), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    said = [child.stdout.readline() for _ in range(lines)]
    os.kill(child.pid, signal.SIGKILL)
    said += child.stdout.read().splitlines(keepends=True)  # what it said before the signal reached it
    assert child.wait(SOON) == -signal.SIGKILL
    child.stdout.close()

    events = [record.event for record in read_ledger(tmp_path / "ledger.sqlite")]
    kept: dict[str, set[int]] = {"admitted": set(), "acked": set(), "committed": set()}
    for event in events:
        match event:
            case Admitted():
                kept["admitted"] |= {event.first_group + i for i in range(len(event.prompt_tokens))}
            case Acked():
                kept["acked"] |= set(event.rows)
            case Committed():
                kept["committed"] |= set(event.trained)
    whole = [line.split() for line in said if line.endswith("\n")]
    assert len(whole) >= lines
    for word, *numbers in whole:
        assert {int(number) for number in numbers} <= kept[word]
    table = Table(SCHEMA, terms())
    for event in events[1:]:
        table.apply(event)
    assert table.next_sample == table.ended["trained"] + len(table.samples())


# -- the reader of ledgers ---------------------------------------------------------------------------------------------


def test_a_missing_ledger_is_named(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="there is no ledger"):
        list(read_ledger(tmp_path / "ledger.sqlite"))


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"not a database, but long enough to look like one" * 100)

    with pytest.raises(LedgerError, match="cannot be read as a ledger"):
        list(read_ledger(path))


# -- everybody at once -------------------------------------------------------------------------------------------------


def test_many_threads_share_one_store_and_nothing_is_lost(tmp_path: Path) -> None:
    bench = Bench(tmp_path, last_version=12)
    done, threads = threading.Event(), 3

    def feed() -> None:
        while not done.is_set() and bench.store.counts().admitted < 12 * 4:
            bench.admit(timeout=0.1)

    def work(stage: str, columns: Callable[[Sequence[int]], pa.RecordBatch]) -> None:
        while not done.is_set():
            if (lease := bench.lease(stage, 2, timeout=0.05)) is not None:
                bench.store.ack(lease.lease_id, ids(lease), columns(ids(lease)))

    def learn() -> None:
        for step in range(1, 13):
            held: list[Lease] = []
            while sum(len(lease.rows) for lease in held) < 4:
                if (lease := bench.lease("train", 2, timeout=SOON)) is not None:
                    held.append(lease)
            bench.commit(*held, version=step)
            bench.store.serve("engine", PolicyVersion(n=step))

    def serving(samples: Sequence[int]) -> pa.RecordBatch:
        return responses([1 + i % 3 for i in samples], bench.store.counts().served["engine"].n)

    workers = [Waiter(feed)]
    workers += [Waiter(lambda: work("rollout", serving)) for _ in range(threads)]
    workers += [Waiter(lambda: work("reward", rewards)) for _ in range(threads)]
    learner = Waiter(learn)
    try:
        learner.join()
    finally:
        done.set()
    for worker in workers:
        worker.join()

    counts = bench.store.counts()
    assert (counts.admitted, counts.trained, counts.open) == (48, 48, 0)
    assert bench.nbytes() == 0
    assert bench.rebuilt().snapshot() == bench.store.table.snapshot()
    bench.store.close()


# -- the next process --------------------------------------------------------------------------------------------------


class Lives:
    """One store after the other over the same ledger and data, as the processes of a run that is resumed have it."""

    def __init__(self, folder: Path) -> None:
        self.ledger, self.data = folder / "ledger.sqlite", folder / "data"
        self.bench = Bench.__new__(Bench)
        self.bench.ledger, self.bench.terms = self.ledger, terms(resumable=True)
        self.bench.store = EmbeddedStore.create(SCHEMA, self.bench.terms, ledger=self.ledger, data=self.data)
        self.bench.store.serve("engine", PolicyVersion(n=0))

    def die(self) -> None:
        """Without closing anything: what is not in the files is gone."""
        self.bench.store.broker._closed = True

    def begin_again(self, step: int | None = None, clock: Clock | None = None) -> Bench:
        self.bench.store = EmbeddedStore.reopen(SCHEMA, ledger=self.ledger, data=self.data, step=step, clock=clock)
        return self.bench


@pytest.fixture
def lives(tmp_path: Path) -> Iterator[Lives]:
    lives = Lives(tmp_path)
    yield lives
    lives.bench.store.close()


def step_of(bench: Bench, incarnation: int, n: int) -> None:
    """Admit, generate with the newest weights, score and commit one step."""
    bench.admit(2)
    lease = bench.take("rollout")
    packed = [[PolicyVersion(incarnation=incarnation, n=n - 1).packed] * i for i in ids(lease)]
    columns = responses(ids(lease))
    place = columns.schema.get_field_index("token_versions")
    columns = columns.set_column(place, "token_versions", pa.array(packed, COLUMNS["token_versions"]))
    bench.store.ack(lease.lease_id, ids(lease), columns)
    bench.score()
    lease = bench.take("train")
    version = PolicyVersion(incarnation=incarnation, n=n)
    bench.store.commit(leases=[lease.lease_id], trained=ids(lease), skipped=[], version=version)
    bench.store.serve("engine", version)


def test_what_was_acknowledged_comes_back_in_the_next_process_as_it_was_put(lives: Lives) -> None:
    lives.bench.admit(2)
    lives.bench.generate()
    lives.bench.score()
    lives.bench.take("train")
    before = lives.bench.rebuilt()
    lives.die()

    bench = lives.begin_again()

    lease = bench.take("train")
    assert ids(lease) == [0, 1, 2, 3]
    assert lease.data.column("response").to_pylist() == [f"Ünï {i}" for i in range(4)]
    assert lease.data.column("prompt").to_pylist() == [json.dumps(f"What is {i} + 1?") for i in (0, 0, 1, 1)]
    assert bench.store.counts().learner == PolicyVersion(incarnation=1, n=0)
    assert bench.store.counts().admitted == before.next_sample


def test_going_back_takes_back_what_later_steps_consumed_and_generates_again_what_they_made(lives: Lives) -> None:
    for n in (1, 2, 3):
        step_of(lives.bench, 0, n)
    lives.die()

    bench = lives.begin_again(step=1)

    counts = bench.store.counts()
    assert (counts.trained, counts.admitted) == (4, 12)
    assert counts.states["rewarded"] == 4  # step 2's, of version 1, which is still there
    assert counts.states["prompted"] == 4  # step 3's, of version 2, which is not
    bench.store.serve("engine", PolicyVersion(incarnation=1, n=1))
    lease = bench.take("train")
    assert ids(lease) == [4, 5, 6, 7]
    assert bench.rebuilt().snapshot() == bench.store.table.snapshot()


def test_data_stay_until_a_checkpoint_has_passed_their_step(lives: Lives) -> None:
    store = lives.bench.store
    for n in (1, 2):
        step_of(lives.bench, 0, n)
    assert lives.bench.store.table.frames()

    store.checkpointed(PolicyVersion(n=2), oldest=PolicyVersion(n=1))
    assert lives.bench.store.table.frames()  # of step 2, to which a checkpoint of step 1 that is kept may lead back
    store.checkpointed(PolicyVersion(n=2), oldest=PolicyVersion(n=2))

    assert not lives.bench.store.table.frames()
    lives.die()
    with pytest.raises(IllegalTransition, match=r"cannot go on from step 1: what step 2 consumed is gone"):
        lives.begin_again(step=1)
    lives.begin_again(step=2)


def test_a_lease_that_ran_out_while_no_process_was_there_was_no_attempt(lives: Lives) -> None:
    lives.bench.admit(2)
    lives.bench.generate()
    lives.bench.score()
    clock = ManualClock()
    for _ in range(5):
        lease = lives.bench.take("train")
        clock.advance(lease.deadline + 1000.0)
        lives.die()
        lives.begin_again(clock=clock)
        lives.bench.store.serve("engine", PolicyVersion(n=0))

    account = lives.bench.store.counts()
    assert (account.quarantined, account.states["rewarded"]) == (0, 4)
    assert set(lives.bench.take("train").attempts.tolist()) == {1}


def test_a_step_that_was_taken_back_was_no_failed_attempt(lives: Lives) -> None:
    for life in range(5):
        if life == 0:
            step_of(lives.bench, 0, 1)
        else:
            lease = lives.bench.take("train")
            assert set(lease.attempts.tolist()) == {1}
            version = PolicyVersion(incarnation=life, n=1)
            lives.bench.store.commit(leases=[lease.lease_id], trained=ids(lease), skipped=[], version=version)
        lives.die()
        lives.begin_again(step=0)


def test_data_that_nobody_needs_go_by_themselves(lives: Lives) -> None:
    store = lives.bench.store
    step_of(lives.bench, 0, 1)
    store.close()
    lives.begin_again()
    lives.bench.store.serve("engine", PolicyVersion(incarnation=1, n=1))
    step_of(lives.bench, 1, 2)
    assert len(list(lives.data.glob("*.segment"))) == 2

    lives.bench.store.checkpointed(PolicyVersion(incarnation=1, n=2), oldest=PolicyVersion(incarnation=1, n=2))

    wait_until(lambda: [path.name for path in lives.data.glob("*.segment")] == ["000002.segment"])


def test_numbers_of_segments_are_not_used_again(lives: Lives) -> None:
    step_of(lives.bench, 0, 1)
    lives.bench.store.checkpointed(PolicyVersion(n=1), oldest=PolicyVersion(n=1))
    for _ in range(3):
        lives.bench.store.close()
        lives.begin_again()
    lives.bench.store.serve("engine", PolicyVersion(incarnation=3, n=1))
    lives.bench.admit(1)

    assert [path.name for path in lives.data.glob("*.segment")] == ["000002.segment"]


def test_damage_costs_only_the_samples_whose_bytes_it_hit(lives: Lives) -> None:
    lives.bench.admit(1)
    lives.bench.admit(1)
    lives.bench.generate()
    lives.die()
    (path,) = lives.data.glob("*.segment")
    content = bytearray(path.read_bytes())
    first = next(header for header in headers_of(content, 1) if header.rows)
    content[first.offset + HEADER_BYTES + 100] ^= 1
    path.write_bytes(content)

    lives.begin_again()
    lives.bench.store.serve("engine", PolicyVersion(n=0))
    lease = lives.bench.take("reward")

    assert ids(lease) == [2, 3]
    assert lives.bench.store.counts().quarantined == 2


def test_a_torn_tail_is_nobodys_and_damage_in_the_middle_is_named(lives: Lives) -> None:
    lives.bench.admit(2)
    lives.die()
    (path,) = lives.data.glob("*.segment")
    content = bytearray(path.read_bytes())
    *_, last = headers_of(content, 1)
    torn = b"AFRM and then the power went"
    content[last.end : last.end + len(torn)] = torn
    path.write_bytes(content)
    lives.begin_again()  # what was never acknowledged is not missed
    lives.die()

    content[last.offset + HEADER_BYTES + 100] ^= 1
    path.write_bytes(content)
    lives.begin_again()
    store = lives.bench.store
    store.serve("engine", PolicyVersion(n=0))
    assert store.lease("rollout", worker="w", max_rows=99, ttl=60.0, timeout=0.0) is None
    account = store.counts()
    assert (account.quarantined, account.open) == (4, 0)
    assert f"000001.segment is damaged at byte {last.offset}" in next(
        record.event.reason for record in read_ledger(lives.ledger) if isinstance(record.event, Quarantined)
    )


def test_the_bound_can_change_while_rows_are_out(bench: Bench) -> None:
    bench.store.amend(max_staleness=3)
    assert bench.store.counts().capacity == 16
    bench.store.amend(max_staleness=0)
    assert bench.store.counts().capacity == 4

    with pytest.raises(IllegalTransition, match="max_staleness cannot be -1"):
        bench.store.amend(max_staleness=-1)
    assert bench.store.counts().max_staleness == 0
    assert bench.rebuilt().snapshot() == bench.store.table.snapshot()
