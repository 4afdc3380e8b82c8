"""Shares of equal weight."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from asyncflow.store.balance import balanced, differencing, greedy
from tests.test_flight import Served, pa_join
from tests.test_store import batch, rewards

QUIET = settings(deadline=None, database=None, max_examples=60, derandomize=True)


def sums(shares: object, weights: object) -> list[int]:
    return [int(np.asarray(weights)[np.asarray(share, np.int64)].sum()) for share in shares]  # type: ignore[attr-defined]


def lengths(seed: int, count: int) -> list[int]:
    """Of responses as they are: lognormal, from 32 to 2048 tokens."""
    drawn = np.random.default_rng(seed).lognormal(mean=5.5, sigma=0.8, size=count)
    return [int(n) for n in drawn.clip(32, 2048)]


@QUIET
@given(seed=st.integers(0, 10**6), count=st.integers(64, 1024), k=st.integers(2, 16), equal_counts=st.booleans())
def test_the_heaviest_share_of_a_realistic_mix_has_hardly_more_than_the_lightest(
    seed: int, count: int, k: int, equal_counts: bool
) -> None:
    weights = lengths(seed, count)
    assume(max(weights) * k <= sum(weights))  # a sequence that is longer than a fair share cannot be balanced

    made = sums(balanced(weights, k, equal_counts=equal_counts), weights)

    assert max(made) <= 1.05 * min(made)


@QUIET
@given(weights=st.lists(st.integers(0, 50), max_size=40), k=st.integers(1, 9), equal_counts=st.booleans())
def test_every_item_is_in_one_share_and_the_shares_are_never_worse_than_the_greedy_ones(
    weights: list[int], k: int, equal_counts: bool
) -> None:
    shares = balanced(weights, k, equal_counts=equal_counts)

    assert sorted(np.concatenate(shares).tolist()) == list(range(len(weights)))
    assert all(share.tolist() == sorted(share.tolist()) for share in shares)
    made, plain = sums(shares, weights), sums(greedy(weights, k, equal_counts=equal_counts), weights)
    assert max(made) - min(made) <= max(plain) - min(plain)
    if equal_counts:
        counts = {len(share) for share in shares}
        assert max(counts) - min(counts) <= 1
    assert [share.tolist() for share in balanced(weights, k, equal_counts=equal_counts)] == [s.tolist() for s in shares]


def test_differencing_is_that_of_karmarkar_and_karp() -> None:
    """Their example: 8, 7, 6, 5, 4 differ by 2 in the end; the greedy rule leaves 4."""
    weights = [8, 7, 6, 5, 4]

    assert sorted(sums(differencing(weights, 2), weights)) == [14, 16]
    assert sorted(sums(greedy(weights, 2), weights)) == [13, 17]
    assert sorted(sums(balanced(weights, 2), weights)) == [15, 15]  # 8 + 7 and 6 + 5 + 4, after an exchange


def test_there_are_as_many_shares_as_ranks_though_there_are_fewer_items() -> None:
    assert [len(share) for share in balanced([5], 3)] in ([1, 0, 0], [0, 1, 0], [0, 0, 1])
    assert [len(share) for share in balanced([], 2, equal_counts=True)] == [0, 0]
    with pytest.raises(ValueError, match="at least 1"):
        balanced([1], 0)


def test_replicas_of_a_learner_get_the_same_shares_of_what_a_token_budget_allows(tmp_path: Path) -> None:
    """One lease with both: 8 ranks, of which one asks from this host and its replica from another one."""
    ranks, groups, size, prompt = 8, 96, 4, 12
    served = Served(tmp_path, train_batch_size=groups * size, num_generations=size)
    mix = lengths(7, groups * size)
    asked = batch(
        {"prompt": ['"?"'] * groups, "prompt_columns": ["{}"] * groups, "prompt_ids": [[1] * prompt] * groups}
    )
    answers = batch(
        {
            "response_ids": [[2] * n for n in mix],
            "rollout_logprobs": [[-0.5] * n for n in mix],
            "token_versions": [[0] * n for n in mix],
            "response": [""] * len(mix),
            "finish_reason": ["stop"] * len(mix),
        }
    )
    assert served.store.admit(asked, pa_join(answers, rewards(range(len(mix)))), timeout=0.0) is not None
    weights = [prompt + n for n in mix]
    budget = sum(weights) // 2

    leases = []
    for local in (True, False):
        lease = served.connect(local=local).lease(
            "train", worker="learner", max_rows=10**6, max_tokens=budget, ranks=ranks, request="step 1", ttl=60.0,
            timeout=0.0,
        )  # fmt: skip
        assert lease is not None
        leases.append(lease)
    rest = served.connect().lease(
        "train", worker="learner", max_rows=10**6, max_tokens=budget, ranks=ranks, request="step 1b", ttl=60.0,
        timeout=0.0,
    )  # fmt: skip

    one, other = leases
    held = [weights[sample] for sample in one.sample_ids.tolist()]
    next_group = sum(weights[len(held) : len(held) + size])
    assert budget - next_group < sum(held) <= budget
    assert sorted(np.concatenate(one.shares).tolist()) == list(range(len(held)))
    made = sums(one.shares, held)
    assert len(made) == ranks
    assert max(made) <= 1.05 * min(made)
    assert (other.lease_id, other.sample_ids.tolist()) == (one.lease_id, one.sample_ids.tolist())
    assert [share.tolist() for share in other.shares] == [share.tolist() for share in one.shares]
    assert other.data.equals(one.data)
    assert rest is not None
    assert not set(rest.sample_ids.tolist()) & set(one.sample_ids.tolist())
    served.close()
