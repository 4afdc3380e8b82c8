"""Shares of equal weight."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncflow.store.balance import balanced, differencing, greedy

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
    made = sums(balanced(weights, k, equal_counts=equal_counts), weights)

    # One sequence that is longer than a fair share cannot be balanced by anybody.
    if max(weights) * k <= sum(weights):
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
