"""In which order a stage gets what is ready for it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from asyncflow.errors import StoreError
from asyncflow.store.events import Prioritised, Returned
from asyncflow.store.rows import Rows
from asyncflow.store.samplers import Sorted, line_for
from asyncflow.store.schema import Order, Stage
from tests.test_table import STAGES, Bench


def bench_of(order: Order, *, stage: str, **options: Any) -> Bench:
    return Bench(stages=[replace(s, sampler=order) if s.name == stage else s for s in STAGES], **options)


def generate(bench: Bench, versions: dict[int, int]) -> None:
    """Give samples responses of these versions."""
    lease = bench.take("rollout")
    for sample, version in versions.items():
        bench.ack(lease, [sample], version=version)
    if rest := sorted(set(lease.rows) - set(versions)):
        bench.do([Returned(lease_id=lease.lease_id, rows=tuple(rest), reason="not wanted")])


def test_fifo_is_the_order_of_admission() -> None:
    bench = Bench(eta=2)
    bench.fill()
    generate(bench, {5: 0, 3: 0, 1: 0})

    assert bench.take("reward", 2).rows == (1, 3)


def test_freshest_takes_the_newest_tokens_first_and_ties_in_admission_order() -> None:
    bench = bench_of("freshest", stage="reward", eta=4)
    bench.fill()
    bench.table.learner = replace(bench.table.learner, n=3)

    generate(bench, {0: 1, 1: 3, 2: 1, 3: 2, 4: 3})

    assert bench.take("reward", 4).rows == (1, 4, 3, 0)
    assert bench.take("reward").rows == (2,)


def test_priority_takes_the_highest_number_first_given_at_admission_or_later() -> None:
    bench = bench_of("priority", stage="rollout", eta=4, n=2)
    bench.do(bench.table.admit([10, 10, 10], frame=0, priorities=[0, 7, -1]) or [])

    assert bench.take("rollout", 3).rows == (2, 3, 0)
    bench.do(bench.table.prioritise(9, samples=[5, 99], groups=[1]))
    assert bench.take("rollout", 1).rows == (5,)
    assert bench.take("rollout").rows == (1, 4)
    assert {i: bench.table.rows.priority[i] for i in range(6)} == {0: 0, 1: 0, 2: 9, 3: 9, 4: -1, 5: 9}


def test_a_priority_is_a_number_that_has_a_place() -> None:
    bench = Bench()
    with pytest.raises(StoreError, match="whole number"):
        bench.table.admit([10], frame=0, priorities=[1 << 40])
    with pytest.raises(StoreError, match="give each group one"):
        bench.table.admit([10, 10], frame=0, priorities=[1])
    assert bench.table.prioritise(3, samples=[0]) == []
    bench.admit()
    assert bench.table.prioritise(3, groups=[0]) == [Prioritised(rows=(0, 1), priority=3)]


def test_the_training_stage_chooses_among_the_whole_groups_of_its_step() -> None:
    """However urgent a later group is, it waits for its step: the bound is counted in admission order."""
    bench = bench_of("priority", stage="actor_update", eta=1, batch=4, n=2)
    bench.fill()
    bench.generate(range(8))
    bench.do(bench.table.prioritise(5, samples=[3]))
    bench.do(bench.table.prioritise(9, groups=[3]))

    assert bench.take("actor_update", 2).rows == (2, 3)
    assert bench.take("actor_update").rows == (0, 1)
    assert bench.lease("actor_update") is None


def test_the_training_stage_takes_the_freshest_group_of_its_step_by_its_oldest_token() -> None:
    bench = bench_of("freshest", stage="actor_update", eta=4, batch=6, n=2)
    bench.fill()
    bench.table.learner = replace(bench.table.learner, n=4)
    generate(bench, {0: 3, 1: 1, 2: 2, 3: 2, 4: 3, 5: 0})
    bench.ack(bench.take("reward"))

    assert [bench.take("actor_update", 2).rows for _ in range(3)] == [(2, 3), (0, 1), (4, 5)]


def expected(there: set[int], order: Order, rows: Rows, times: int, most: int, before: int | None) -> list[int]:
    key: Callable[[int], int] = {
        "fifo": lambda i: 0,
        "freshest": lambda i: -int(rows.oldest[i]) if rows.oldest[i] >= 0 else -(1 << 33),
        "priority": lambda i: -int(rows.priority[i]),
    }[order]
    rounds = (lambda i: int(rows.times[0, i])) if times > 1 else (lambda i: 0)
    ordered = sorted((i for i in there if before is None or i < before), key=lambda i: (rounds(i), key(i), i))
    return ordered[:most]


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("order", ["fifo", "freshest", "priority"])
def test_a_line_is_sorted_whatever_happened_to_it(order: Order, times: int) -> None:
    for seed in range(20):
        chance, rows = random.Random(seed), Rows(1)
        rows.add(10_000)
        line = line_for(Stage(name="s", role="score", needs=(), sampler=order, max_times_leased=times), 0, rows)
        there: set[int] = set()
        for _ in range(30):
            ids = np.array(chance.sample(range(10_000), 20) + chance.sample(sorted(there), len(there) // 3))
            ids = np.unique(ids)
            rows.oldest[ids] = [chance.randrange(-1, 4) for _ in ids]
            rows.priority[ids] = [chance.randrange(-3, 3) for _ in ids]
            rows.times[0, ids] = [chance.randrange(times) for _ in ids]
            added = np.array([chance.random() < 0.7 for _ in ids])
            line.put(ids, added)
            there = (there | set(ids[added].tolist())) - set(ids[~added].tolist())

            most, before = chance.randrange(40), chance.choice([None, 5000])
            assert line.first(most, before=before).tolist() == expected(there, order, rows, times, most, before)
            assert line.count == len(there)
            assert line.members().tolist() == sorted(there)


def test_a_line_forgets_keys_that_nobody_has() -> None:
    keys = np.arange(5)
    line = Sorted(lambda ids: keys[ids])
    line.put(np.arange(5), there=True)
    keys[:] = 9
    line.put(np.arange(5), there=True)

    assert line._order == [9]
    assert all(a < b for a, b in pairwise(line.first(5).tolist()))
