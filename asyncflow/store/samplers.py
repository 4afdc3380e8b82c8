"""Who comes first: what waits for a stage, in the order of the stage's sampler. The table decides what is ready.

All calls take many ids at once. Ties always go by admission, that is by id.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from asyncflow.store.rows import NONE, Flags, Ids, Marks, Rows
from asyncflow.store.schema import Stage

NUMBER = (1 << 32) - 1
"""The bits of a packed policy version that count publications."""

Keys = Callable[[Ids], NDArray[np.int64]]
"""What samples are sorted by: the lowest comes first."""


class Line(Protocol):
    """Samples that wait for one stage."""

    @property
    def count(self) -> int:
        """How many there are."""

    def put(self, ids: Ids, there: Flags | bool) -> None:
        """Add (`there`) or remove ids; each is named once."""

    def first(self, most: int, *, before: int | None = None) -> Ids:
        """Those that come first, at most so many; of ids from `before` on, none."""

    def members(self) -> Ids:
        """All of them, ascending."""

    def copy(self) -> Self:
        """As it is now, to look at."""


class Fifo(Marks):
    """In admission order."""

    def first(self, most: int, *, before: int | None = None) -> Ids:
        found = super().first(most)
        return found if before is None else found[: int(np.searchsorted(found, before))]

    def members(self) -> Ids:
        return self.first(self.count)


class Sorted:
    """By a key. What a call costs grows with the ids that it names, not with how many keys or samples there are."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._key: dict[int, int] = {}
        """Sample that is there → its key when it was put, which may be another one now."""
        self._lines: dict[int, Fifo] = {}
        self._order: list[int] = []
        """The keys of `_lines`, ascending."""

    @property
    def count(self) -> int:
        return len(self._key)

    def put(self, ids: Ids, there: Flags | bool) -> None:
        gone: dict[int, list[int]] = {}
        for number in ids.tolist():
            if (key := self._key.pop(number, None)) is not None:
                gone.setdefault(key, []).append(number)
        added = ids[np.broadcast_to(there, ids.shape)]
        new: dict[int, list[int]] = {}
        for number, key in zip(added.tolist(), self._keys(added).tolist(), strict=True):
            self._key[number] = key
            new.setdefault(key, []).append(number)
        for key, numbers in gone.items():
            self._lines[key].put(np.array(numbers, np.int64), there=False)
        for key, numbers in new.items():
            if key not in self._lines:
                self._lines[key] = Fifo()
                insort(self._order, key)
            self._lines[key].put(np.array(numbers, np.int64), there=True)
        for key in gone:
            if not self._lines[key].count:
                del self._lines[key]
                self._order.remove(key)

    def first(self, most: int, *, before: int | None = None) -> Ids:
        found: list[Ids] = []
        for key in self._order:
            if most <= 0:
                break
            found.append(self._lines[key].first(most, before=before))
            most -= len(found[-1])
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def members(self) -> Ids:
        return np.sort(self.first(self.count))

    def copy(self) -> Self:
        other = type(self)(self._keys)
        other._lines = {key: line.copy() for key, line in self._lines.items()}
        other._order = list(self._order)
        other._key = dict(self._key)
        return other


def line_for(stage: Stage, place: int, rows: Rows) -> Line:
    """The line of a stage, which is the stage of this place in the arrays of `rows`."""
    if stage.sampler == "fifo" and stage.max_times_leased == 1:
        return Fifo()
    keys = sample_keys(stage, rows)
    if stage.max_times_leased == 1:
        return Sorted(keys)
    # What was consumed less often comes first: it goes round the queue, and the sampler holds within a round.
    return Sorted(lambda ids: (rows.times[place, ids - rows.base].astype(np.int64) << 40) + keys(ids))


def sample_keys(stage: Stage, rows: Rows) -> Keys:
    """What a stage's sampler sorts samples by. Between −2³⁹ and 2³⁹."""
    match stage.sampler:
        case "fifo":
            return lambda ids: np.zeros(len(ids), np.int64)
        case "freshest":
            return lambda ids: -age_numbers(rows.oldest[ids - rows.base])
        case "priority":
            return lambda ids: -rows.priority[ids - rows.base].astype(np.int64)


def age_numbers(versions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers of packed versions; the highest for what has no tokens yet, which cannot be stale."""
    numbers: NDArray[np.int64] = np.where(versions == NONE, NUMBER, versions & NUMBER)
    return numbers


def group_order(stage: Stage, rows: Rows, members: Ids, there: Flags) -> NDArray[np.intp]:
    """The places of groups in the order of a stage's sampler. members, there: (G, n) samples and which of them count,
    at least one of each group. A group is as old as its oldest token, and as urgent as its most urgent sample."""
    worst = 1 << 62
    keys = np.full(members.shape, -worst if stage.sampler == "freshest" else worst)
    keys[there] = sample_keys(stage, rows)(members[there])
    return np.argsort(keys.max(axis=1) if stage.sampler == "freshest" else keys.min(axis=1), kind="stable")
