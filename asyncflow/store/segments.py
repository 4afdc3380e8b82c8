"""Where the data of the samples are. A frame is one Arrow record batch, written once by one put and never changed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import pyarrow as pa

from asyncflow.store.schema import COLUMNS


class MemorySegments:
    """Frames in the memory of this process (durability `memory`: they do not outlive it)."""

    def __init__(self) -> None:
        self._frames: dict[int, pa.RecordBatch] = {}
        self._rows: dict[int, int] = {}
        self._next = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all frames."""
        return sum(batch.nbytes for batch in self._frames.values())

    def write(self, batch: pa.RecordBatch, *, rows: int) -> int:
        """Keep a frame until `rows` rows have released it. Returns its id."""
        frame, self._next = self._next, self._next + 1
        self._frames[frame], self._rows[frame] = batch, rows
        return frame

    def release(self, frame: int, rows: int = 1) -> None:
        """Say that so many rows do not need the frame any more."""
        self._rows[frame] -= rows
        if self._rows[frame] == 0:
            del self._frames[frame], self._rows[frame]

    def gather(self, column: str, places: Sequence[tuple[int, int]]) -> pa.Array:
        """One array with the value at each (frame, offset)."""
        pieces = []
        for frame, run in groupby(places, key=lambda place: place[0]):
            values = self._frames[frame].column(column)
            offsets = [offset for _, offset in run]
            if offsets == list(range(offsets[0], offsets[0] + len(offsets))):
                pieces.append(values.slice(offsets[0], len(offsets)))
            else:
                pieces.append(values.take(pa.array(offsets)))
        return pa.concat_arrays(pieces) if pieces else pa.array([], COLUMNS[column])
