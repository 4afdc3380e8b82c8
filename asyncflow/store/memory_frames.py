"""Frames in memory, for a store that keeps no data on disk: the same calls as those of segments."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pyarrow as pa

from asyncflow.errors import DamagedData
from asyncflow.store.frames import OFFSET_BITS
from asyncflow.store.segments import Columns, Frames, Offsets, gather, segment_of
from asyncflow.store.shelf import Shelf


class MemoryFrames(Shelf):
    """Writer, reader and shelf in the memory of this process (durability `memory`: nothing outlives it).

    Each frame is a segment of its own. Thread-safe.
    """

    def __init__(self, allocate: Callable[[], int] | None = None) -> None:
        self.allocate = allocate
        """To be set before the first append: the account is made after its shelf."""
        self.frames: dict[int, pa.RecordBatch] = {}
        self._open: set[int] = set()

    def append(self, batch: pa.RecordBatch) -> int:
        assert self.allocate is not None
        number = self.allocate()
        frame = number << OFFSET_BITS
        self._open.add(number)
        self.frames[frame] = batch
        return frame

    def settle(self, frame: int) -> None:
        self._open.discard(segment_of(frame))

    def abandon(self, frame: int) -> None:
        """Every frame has a segment of its own."""

    def batch(self, frame: int) -> pa.RecordBatch:
        """Raises DamagedData when it is not there."""
        try:
            return self.frames[frame]
        except KeyError:
            raise DamagedData(f"frame {frame} is not there any more", frame=frame) from None

    def read(self, columns: Columns, frames: Frames, offsets: Offsets) -> list[pa.Array]:
        """As `SegmentReader.read`."""
        return gather(self.batch, columns, frames, offsets)

    def forget(self, segment: int) -> None:
        """There is nothing but the data, which `remove` takes."""

    def close(self) -> None:
        """Whoever has read something keeps it."""

    def present(self) -> dict[int, int]:
        return {}

    def end_of(self, frame: int) -> int:  # noqa: ARG002
        return 0

    def name(self, number: int) -> str:
        return f"segment {number}"

    def in_use(self, number: int) -> bool:
        # Between a number and its frame there is a moment without either.
        return number in self._open or number << OFFSET_BITS not in self.frames

    def remove(self, number: int) -> None:
        self.frames.pop(number << OFFSET_BITS, None)

    def sync(self, numbers: Iterable[int] = ()) -> None:
        """There is no disk."""
