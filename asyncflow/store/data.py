"""Where a client's frames are. `MemoryFrames` is the other one that there is on this host."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from asyncflow.store.segments import SegmentReader, SegmentWriter


class Data(Protocol):
    """Writes and reads frames."""

    def append(self, batch: pa.RecordBatch) -> int:
        """Write a frame, and return its id. Raises OSError when there is no room; then nothing was written."""

    def settle(self, frame: int) -> None:
        """The broker has been told of the frame, or never will be."""

    def abandon(self, frame: int) -> None:
        """The broker does not know the frame's segment: nothing more is to be written there."""

    def read(self, columns: Mapping[str, pa.DataType], frames: np.ndarray, offsets: np.ndarray) -> list[pa.Array]:
        """One array for each column, with the value at each place. Raises DamagedData."""

    def forget(self, segment: int) -> None:
        """Nobody asks for this segment any more."""

    def close(self) -> None:
        """May be called twice."""


class FileFrames:
    """Frames in segments of this host: its own to write, all to read."""

    def __init__(
        self,
        folder: Path,
        allocate: Callable[[], int],
        *,
        durable: bool = False,
        fdatasync: Callable[[int], None] = os.fdatasync,
    ) -> None:
        """`durable`: a frame survives a power cut before its id is given. Raises OSError."""
        self._writer = SegmentWriter(folder, allocate, fdatasync=fdatasync)
        self._reader = SegmentReader(folder)
        self._durable = durable
        self.settle, self.abandon = self._writer.settle, self._writer.abandon
        self.read, self.forget = self._reader.read, self._reader.forget

    def append(self, batch: pa.RecordBatch) -> int:
        frame = self._writer.append(batch)
        if self._durable:
            try:
                self._writer.sync()
            except OSError:
                self._writer.settle(frame)
                raise
        return frame

    def close(self) -> None:
        self._writer.close()
        self._reader.close()
