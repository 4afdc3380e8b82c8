"""Where the data of the samples are. A frame is one Arrow record batch, written once by one put and never changed.

Frames are always in the memory of this process, from where leases are served. With a folder they are written to files
as well, before the ledger names them, so that they survive `kill -9` of every process:

    <folder>/000001.segment, 000002.segment, …     append-only; a new process begins a new one

    frame = magic "AFFRAME1" | length u64 | xxh3-64 u64 | Arrow IPC stream of one batch | zeros up to a multiple of 64

Numbers are little-endian; the checksum is of the stream. A frame's id is its segment's number · 2⁴⁰ + its offset. A
segment is removed when no row needs any of its frames.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import xxhash

from asyncflow.errors import LedgerError
from asyncflow.store.schema import COLUMNS

MAGIC = b"AFFRAME1"
SUFFIX = ".segment"
SEGMENT_BYTES = 64 << 20
"""A segment that has become this long gets a successor."""
_HEADER = struct.Struct("<8sQQ")
_ALIGNMENT = 64
_OFFSET_BITS = 40


def sync_file(path: Path) -> None:
    """Make the content of a file, or the entries of a folder, survive a power cut. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class MemorySegments:
    """Frames in the memory of this process (durability `memory`: they do not outlive it)."""

    def __init__(self) -> None:
        self._frames: dict[int, pa.RecordBatch] = {}
        self._rows: dict[int, int] = {}
        self._next = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all frames in memory."""
        return sum(batch.nbytes for batch in self._frames.values())

    def write(self, batch: pa.RecordBatch, *, rows: int) -> int:
        """Keep a frame until `rows` rows have released it. Returns its id. Raises LedgerError when the disk is full."""
        frame = self._place(batch)
        self._frames[frame], self._rows[frame] = batch, rows
        return frame

    def release(self, frame: int, rows: int = 1) -> None:
        """Say that so many rows do not need the frame any more."""
        self._rows[frame] -= rows
        if self._rows[frame] == 0:
            del self._frames[frame], self._rows[frame]
            self._removed(frame)

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

    def unsynced(self) -> list[Path]:
        """Files that were written to since the last call: who syncs them makes their frames survive a power cut."""
        return []

    def close(self) -> None:
        """May be called twice."""

    def _place(self, batch: pa.RecordBatch) -> int:  # noqa: ARG002 - of the kind that writes
        frame, self._next = self._next, self._next + 1
        return frame

    def _removed(self, frame: int) -> None:
        """No row needs the frame any more."""


class FileSegments(MemorySegments):
    """Frames in memory and in files (durability `process`)."""

    def __init__(
        self, folder: Path, *, needed: Mapping[int, int] | None = None, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        """Begin a segment in `folder`, after reading the frames that are `needed` (frame → rows) from earlier ones.

        Segments without any of these are removed. Raises LedgerError when a needed frame is missing or damaged, or the
        folder cannot be written.
        """
        super().__init__()
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._live: Counter[int] = Counter()
        """Segment → frames that are needed."""
        self._written: set[int] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            numbers = sorted(int(path.stem) for path in folder.glob(f"*{SUFFIX}"))
            for frame, rows in (needed or {}).items():
                self._frames[frame], self._rows[frame] = self._read(frame), rows
                self._live[frame >> _OFFSET_BITS] += 1
            self._number = numbers[-1] if numbers else 0
            for number in numbers:
                if not self._live[number]:
                    self._path(number).unlink()
            self._file = -1
            self._roll()
        except OSError as error:
            raise LedgerError(f"the data of the samples in {folder} cannot be opened: {error}") from error

    def unsynced(self) -> list[Path]:
        written, self._written = self._written, set()
        return [self._path(number) for number in sorted(written)]

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _place(self, batch: pa.RecordBatch) -> int:
        stream = pa.BufferOutputStream()
        with pa.ipc.new_stream(stream, batch.schema) as writer:
            writer.write_batch(batch)
        body = memoryview(stream.getvalue())
        header = _HEADER.pack(MAGIC, len(body), xxhash.xxh3_64_intdigest(body))
        padding = bytes(-(len(header) + len(body)) % _ALIGNMENT)
        try:
            if self._end >= self._segment_bytes:
                self._roll()
            frame = self._number << _OFFSET_BITS | self._end
            size = len(header) + len(body) + len(padding)
            if os.pwritev(self._file, [header, body, padding], self._end) != size:
                raise OSError("the disk is full")
        except OSError as error:  # whatever was written lies behind the end: the next frame takes its place
            raise LedgerError(
                f"the data of a sample cannot be written to {self._folder} ({error}): see that its disk has room"
            ) from error
        self._end += size
        self._written.add(self._number)
        self._live[self._number] += 1
        return frame

    def _removed(self, frame: int) -> None:
        number = frame >> _OFFSET_BITS
        self._live[number] -= 1
        if not self._live[number] and number != self._number:
            self._path(number).unlink(missing_ok=True)

    def _roll(self) -> None:
        self.close()
        self._number += 1
        self._file = os.open(self._path(self._number), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._end = 0

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06}{SUFFIX}"

    def _read(self, frame: int) -> pa.RecordBatch:
        path, offset = self._path(frame >> _OFFSET_BITS), frame & ((1 << _OFFSET_BITS) - 1)
        try:
            with path.open("rb") as file:
                file.seek(offset)
                magic, length, checksum = _HEADER.unpack(file.read(_HEADER.size))
                body = file.read(length)
            if magic != MAGIC or xxhash.xxh3_64_intdigest(body) != checksum:
                raise ValueError("its bytes are not what was written")
            batch = pa.ipc.open_stream(body).read_next_batch()
            batch.validate(full=True)
        except (OSError, ValueError, struct.error, pa.ArrowException, StopIteration) as error:
            raise LedgerError(
                f"{path} is damaged at byte {offset} ({error}), so the run cannot go on with these samples: "
                "restore the file, or start a new run from the last checkpoint's weights"
            ) from None
        return batch
