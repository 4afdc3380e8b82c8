"""What the table knows about each sample, as arrays: whatever is done to a thousand samples is done at once.

Entry i belongs to sample `base + i`. Arrays grow by doubling, and forget their beginning when all of it has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from asyncflow.store.lifecycle import OPEN_STATES, STATES, State

Ids = NDArray[np.int64]
"""Sample or group ids."""
Flags = NDArray[np.bool_]

NONE: Final = -1
"""In place of a policy version or a frame that there is not."""
QUARANTINED: Final = STATES.index(State.QUARANTINED)
CHUNK: Final = 4096
"""Entries that are counted together in `Marks`, and by which arrays forget."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One sample, copied out for those who look at one."""

    sample_id: int
    group_id: int
    state: State
    columns: int
    """Bit set of the columns that are there."""
    prompt_tokens: int
    tokens: int
    """Prompt and response."""
    oldest: int | None
    """Oldest and newest packed policy version among the response tokens."""
    newest: int | None
    leases: dict[str, int]
    """Stage → lease that holds the row."""
    attempts: dict[str, int]
    """Stage → leases so far."""
    reasons: list[str]
    """Why it came back."""


class Marks:
    """A set of ids, of which the lowest are asked for. All calls take many at once. What they cost does not depend on
    how many there are, but for one count for every `CHUNK` ids between the lowest and the highest."""

    def __init__(self) -> None:
        self._base = 0
        self._bits = np.zeros(CHUNK, np.bool_)
        self._counts = np.zeros(1, np.int64)
        self.count = 0
        """How many there are."""

    def put(self, ids: Ids, there: Flags | bool) -> None:
        """Add (`there`) or remove ids; each is named once."""
        if len(ids) == 1:
            self._put_one(int(ids[0]), there if isinstance(there, bool) else bool(there[0]))
            return
        if there is False and not self.count:
            return
        inside = self._inside(ids)
        if not inside.all():
            there = np.broadcast_to(there, ids.shape)
            if len(new := ids[there]):
                self._reach(int(new.min()), int(new.max()))
                inside = self._inside(ids)
            ids, there = ids[inside], there[inside]  # what has no place is not there, and need not be removed
        places = ids - self._base
        change = np.subtract(there, self._bits[places], dtype=np.int64)
        self._bits[places] = there
        np.add.at(self._counts, places // CHUNK, change)
        self.count += int(change.sum())

    def _put_one(self, number: int, there: bool) -> None:
        """The same without arrays, which for one id are most of what it costs."""
        if not self._base <= number < self._base + len(self._bits):
            if not there:
                return
            self._reach(number, number)
        place = number - self._base
        if bool(self._bits[place]) != there:
            self._bits[place] = there
            self._counts[place // CHUNK] += 1 if there else -1
            self.count += 1 if there else -1

    def has(self, ids: Ids) -> Flags:
        """Which of these are there."""
        inside = self._inside(ids)
        if inside.all():
            return self._bits[ids - self._base]
        inside[inside] = self._bits[ids[inside] - self._base]
        return inside

    def first(self, most: int) -> Ids:
        """The lowest ones, ascending, at most so many."""
        found: list[Ids] = []
        have = 0
        for chunk in np.flatnonzero(self._counts) if most > 0 else ():
            begin = int(chunk) * CHUNK
            members = np.flatnonzero(self._bits[begin : begin + CHUNK])
            found.append(members + (begin + self._base))
            have += len(members)
            if have >= most:
                break
        return np.concatenate(found)[:most] if found else np.zeros(0, np.int64)

    def copy(self) -> Self:
        other = type(self)()
        other._base, other._bits, other._counts = self._base, self._bits.copy(), self._counts.copy()
        other.count = self.count
        return other

    def all(self) -> Ids:
        """All of them, ascending."""
        return np.flatnonzero(self._bits) + self._base

    def clear(self) -> None:
        self._bits[:] = False
        self._counts[:] = 0
        self.count = 0

    def _inside(self, ids: Ids) -> Flags:
        return (ids >= self._base) & (ids < self._base + len(self._bits))

    def _reach(self, lowest: int, highest: int) -> None:
        """Have a place for these and for what is there, and for nothing before."""
        used = np.flatnonzero(self._counts)
        begin, end = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
        before = self._base // CHUNK  # chunks from 0 on
        first, last = lowest // CHUNK, highest // CHUNK + 1
        if len(used):
            first, last = min(first, before + begin), max(last, before + end)
        chunks = 1 << (last - first - 1).bit_length() + 1
        bits, counts = np.zeros(chunks * CHUNK, np.bool_), np.zeros(chunks, np.int64)
        at = before + begin - first
        bits[at * CHUNK : (at + end - begin) * CHUNK] = self._bits[begin * CHUNK : end * CHUNK]
        counts[at : at + end - begin] = self._counts[begin:end]
        self._base, self._bits, self._counts = first * CHUNK, bits, counts


class Rows:
    """One array for each thing that is known of a sample, of all samples between `base` and `end`.

    Two-dimensional ones have a line for each stage; `frame` and `offset` one for the prompt, and then one for each
    stage that writes. An index is a sample id − `base`.
    """

    state: NDArray[np.uint8]
    """Place in `STATES`."""
    kept: Flags
    """Ended, and yet it may be taken back, or put back from quarantine."""
    columns: NDArray[np.int64]
    """Bit set of the columns that are there."""
    prompt_tokens: NDArray[np.int32]
    tokens: NDArray[np.int32]
    """Prompt and response."""
    oldest: NDArray[np.int64]
    """Oldest and newest packed policy version among the response tokens, or NONE."""
    newest: NDArray[np.int64]
    priority: NDArray[np.int32]
    """The highest comes first where a stage's sampler says so."""
    lease: NDArray[np.int64]
    """Stage → lease that holds the row, or 0."""
    attempts: NDArray[np.int32]
    """Stage → leases so far; those before its last ack do not count where it may have a row again."""
    times: NDArray[np.int16]
    """Stage → acks so far."""
    frame: NDArray[np.int64]
    """Where the data are: the frame that has the columns of this line, or NONE, and the row in it."""
    offset: NDArray[np.int32]

    def __init__(self, stages: int) -> None:
        self._fields: dict[str, tuple[type, int, tuple[int, ...]]] = {
            "state": (np.uint8, 0, ()),
            "kept": (np.bool_, 0, ()),
            "columns": (np.int64, 0, ()),
            "prompt_tokens": (np.int32, 0, ()),
            "tokens": (np.int32, 0, ()),
            "oldest": (np.int64, NONE, ()),
            "newest": (np.int64, NONE, ()),
            "priority": (np.int32, 0, ()),
            "lease": (np.int64, 0, (stages,)),
            "attempts": (np.int32, 0, (stages,)),
            "times": (np.int16, 0, (stages,)),
            "frame": (np.int64, NONE, (stages + 1,)),
            "offset": (np.int32, 0, (stages + 1,)),
        }
        self.base = self.end = 0
        self.reasons: dict[int, list[str]] = {}
        """Sample → why it came back, where it did."""
        for name, (dtype, fill, lines) in self._fields.items():
            setattr(self, name, np.full((*lines, CHUNK), fill, dtype))

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the arrays."""
        return tuple(self._fields)

    def copy(self) -> Rows:
        """As it is now, without room for more."""
        other = copy(self)
        for name in self._fields:
            setattr(other, name, getattr(self, name)[..., : self.end - self.base].copy())
        other.reasons = {sample_id: list(reasons) for sample_id, reasons in self.reasons.items()}
        return other

    def fill(self, end: int, ids: Ids, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Begin with these samples, ascending, of which `arrays` has everything; all others before `end` have ended.

        Raises ValueError for arrays of another type or shape.
        """
        self.base = (int(ids[0]) if len(ids) else end) // CHUNK * CHUNK
        self.end = self.base
        self._make_room(end - self.base)
        self.end = end
        self.state[: end - self.base] = STATES.index(State.DROPPED)
        for name, (dtype, _, lines) in self._fields.items():
            array = arrays[name]
            if array.dtype != dtype or array.shape != (*lines, len(ids)):
                raise ValueError(f"{name} is {array.dtype}{array.shape}, not {np.dtype(dtype)}{(*lines, len(ids))}")
            getattr(self, name)[..., ids - self.base] = array

    def add(self, count: int) -> Ids:
        """Make entries for so many new samples, and return their ids."""
        if self.end + count - self.base > len(self.state):
            self._make_room(count)
        first, self.end = self.end, self.end + count
        return np.arange(first, self.end)

    def alive(self) -> Ids:
        """Samples that are open, or may be taken or put back."""
        state = self.state[: self.end - self.base]
        return np.flatnonzero((state < len(OPEN_STATES)) | self.kept[: len(state)]) + self.base

    def open(self) -> Ids:
        """Samples that have not ended."""
        return np.flatnonzero(self.state[: self.end - self.base] < len(OPEN_STATES)) + self.base

    def has_data(self, ids: Ids) -> Flags:
        """Which of these samples, which have entries, have not ended or are kept."""
        index = ids - self.base
        flags: Flags = (self.state[index] < len(OPEN_STATES)) | self.kept[index]
        return flags

    def narrow(self, flags: Flags, ids: Ids, holds: Callable[[Ids], Flags]) -> Flags:
        """Those of the flags, one for each of these ids in any shape, for which this holds too. It is given the index
        of their samples, which have entries."""
        narrowed = flags.copy()
        narrowed[flags] = holds(ids[flags] - self.base)
        return narrowed

    def has_entry(self, ids: Ids) -> Flags:
        """Which of these numbers are samples of which something is known."""
        return (ids >= self.base) & (ids < self.end)

    def is_open(self, ids: Ids) -> Flags:
        """Which of these are samples that have not ended; any number may be asked for."""
        return self.narrow(self.has_entry(ids), ids, lambda index: self.state[index] < len(OPEN_STATES))

    def is_quarantined(self, ids: Ids) -> Flags:
        """Which of these may be put back from quarantine; any number may be asked for."""
        return self.narrow(
            self.has_entry(ids), ids, lambda index: self.kept[index] & (self.state[index] == QUARANTINED)
        )

    def _make_room(self, count: int) -> None:
        alive = self.alive()
        base = (int(alive[0]) if len(alive) else self.end) // CHUNK * CHUNK
        length = CHUNK
        while length < (self.end - base + count) * 3 // 2:
            length *= 2
        for name, (dtype, fill, lines) in self._fields.items():
            array: NDArray[Any] = np.full((*lines, length), fill, dtype)
            array[..., : self.end - base] = getattr(self, name)[..., base - self.base : self.end - self.base]
            setattr(self, name, array)
        self.base = base
