"""Shares of equal weight: sequences over the ranks of a data-parallel learner, balanced by tokens.

The largest differencing method of Karmarkar and Karp ("The differencing method of set partitioning", UC Berkeley,
UCB/CSD 82/113, 1982), in its form for k parts: begin with a partition for each item, and put the two partitions whose
sums differ most together, heaviest part to lightest, until one is left. Exact differencing can lose to the plain greedy
rule on few items, so both are made and the better one is taken; then items are exchanged between the heaviest and the
lightest part as long as that helps.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Parts = list[list[int]]

CLOSE_ENOUGH = 1000
"""Shares that differ by less than one part in so many are not improved any more."""
MOST_CELLS = 1 << 20
"""Items times shares: above it the greedy shares have to do, because differencing keeps so many lists at first."""


def balanced(
    weights: Sequence[int] | NDArray[np.int32], k: int, *, equal_counts: bool = False
) -> list[NDArray[np.int64]]:
    """k shares of the places of `weights` (at least 0), each ascending, whose sums differ as little as can be.

    `equal_counts`: the shares have as many items each, or one more. The same arguments give the same shares everywhere.
    Raises ValueError for fewer than one share.
    """
    if k < 1:
        raise ValueError(f"there is no way to make {k} shares: ask for at least 1")
    values = [int(weight) for weight in weights]
    if k >= len(values):  # nothing is better than one item a share, the heaviest first
        alone = [np.array([i], np.int64) for i in sorted(range(len(values)), key=lambda i: (-values[i], i))]
        return alone + [np.zeros(0, np.int64)] * (k - len(values))
    made = [greedy(values, k, equal_counts=equal_counts)]
    if len(values) * k <= MOST_CELLS:
        made.insert(0, differencing(values, k, equal_counts=equal_counts))
    for parts in made:
        _exchange(parts, values, equal_counts=equal_counts)
    best = min(made, key=lambda parts: _spread(parts, values))
    return [np.array(sorted(part), np.int64) for part in best]


def differencing(weights: Sequence[int], k: int, *, equal_counts: bool = False) -> Parts:
    """Karmarkar and Karp. With `equal_counts` it begins with partitions of k items, one in each part."""
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    size = k if equal_counts else 1
    heap: list[tuple[int, int, list[int], Parts]] = []
    for number, begin in enumerate(range(0, len(order), size)):
        items = order[begin : begin + size]
        sums = [weights[i] for i in items] + [0] * (k - len(items))
        parts = [[i] for i in items] + [[] for _ in range(k - len(items))]
        heap.append((sums[-1] - sums[0], number, sums, parts))
    heapq.heapify(heap)
    number = len(order)
    while len(heap) > 1:
        _, _, sums, parts = heapq.heappop(heap)
        _, _, others, more = heapq.heappop(heap)
        for j in range(k):  # heaviest to lightest
            sums[j] += others[k - 1 - j]
            parts[j] += more[k - 1 - j]
        ranks = sorted(range(k), key=lambda j: -sums[j])
        sums, parts, number = [sums[j] for j in ranks], [parts[j] for j in ranks], number + 1
        heapq.heappush(heap, (sums[-1] - sums[0], number, sums, parts))
    return heap[0][3] if heap else [[] for _ in range(k)]


def greedy(weights: Sequence[int], k: int, *, equal_counts: bool = False) -> Parts:
    """The heaviest item that is left to the lightest part that has room."""
    parts: Parts = [[] for _ in range(k)]
    lightest = [(0, j) for j in range(k)]
    size, longer = divmod(len(weights), k)  # so many parts may have one item more
    for i in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        total, j = heapq.heappop(lightest)
        parts[j].append(i)
        if equal_counts and len(parts[j]) > size:
            longer -= 1
            if not longer:  # from here on no part may be longer than `size`
                lightest = [(total, j) for total, j in lightest if len(parts[j]) < size]
                heapq.heapify(lightest)
        elif not equal_counts or len(parts[j]) < size + (longer > 0):
            heapq.heappush(lightest, (total + weights[i], j))
    return parts


def _spread(parts: Parts, weights: Sequence[int]) -> tuple[int, int]:
    sums = [sum(weights[i] for i in part) for part in parts]
    return max(sums) - min(sums), max(sums)


def _exchange(parts: Parts, weights: Sequence[int], *, equal_counts: bool) -> None:
    """Exchange an item of the heaviest part with a lighter one, or none, of another, while the two come closer."""
    sums = [sum(weights[i] for i in part) for part in parts]
    while (max(sums) - min(sums)) * CLOSE_ENOUGH > max(sums):
        heavy = max(range(len(parts)), key=lambda j: sums[j])
        for light in sorted(range(len(parts)), key=lambda j: sums[j]):
            gap = sums[heavy] - sums[light]
            given = np.array([weights[i] for i in parts[heavy]])
            taken = np.array([weights[i] for i in parts[light]] + ([] if equal_counts else [0]), np.int64)
            moved = given[:, None] - taken[None, :]
            after = np.abs(gap - 2 * moved)
            if after.size and after.min() < gap:
                break
        else:
            return
        a, b = divmod(int(after.argmin()), len(taken))
        item = parts[heavy].pop(a)
        if b < len(parts[light]):
            parts[heavy].append(parts[light].pop(b))
        parts[light].append(item)
        sums[heavy] -= int(moved[a, b])
        sums[light] += int(moved[a, b])
