"""Where the data of the samples are. A frame is one Arrow record batch, written once by one put and never changed.

Frames lie in segments: files of a fixed size that have one writer each and are mapped by all who read them, without a
copy. `docs/store_format.md` describes them for programs in other languages:

    <folder>/000001.segment, 000002.segment, …

    frame  = header of 64 bytes | Arrow IPC message | zeros up to a multiple of 64
    header = magic "AFRM" | format u16 | kind u16 | length u64 | segment u64 | offset u64 | schema u64 | rows u32
             | zeros u32 | xxh3-64 of the message | xxh3-64 of the header before this

Numbers are little-endian. A message of kind 1 is an Arrow schema, with its xxh3-64 as id; it comes before the first
record batch (kind 2) that has it. A frame's id is the number of its segment · 2⁴⁰ + its offset, and never used again.

The header is written when the message is there, so that whoever is killed in between leaves nothing that looks whole.
A reader checks both checksums once for each frame, and then that the batch is valid Arrow: flipped, torn or forged
bytes are an error with the frame's place, and never data.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from asyncflow.errors import DamagedData, LedgerError

FORMAT: Final = 2
MAGIC: Final = b"AFRM"
SUFFIX: Final = ".segment"
SEGMENT_BYTES: Final = 64 << 20
"""Size of a segment, unless one frame needs more."""
SCHEMA, BATCH = 1, 2
HEADER = struct.Struct("<4sHHQQQQIIQ")
"""All of the header but its own checksum."""
HEADER_BYTES: Final = 64
OFFSET_BITS: Final = 40
Bytes = mmap.mmap | bytes | bytearray
PARSED_FRAMES: Final = 4096
"""Frames that a reader has parsed and keeps; what they take is in the map, not in these."""


def sync_file(path: Path) -> None:
    """Make the content of a file, or the entries of a folder, survive a power cut. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def segment_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06}{SUFFIX}"


@dataclass(frozen=True, slots=True)
class Header:
    """What a frame says about itself."""

    kind: int
    length: int
    """Bytes of the message."""
    segment: int
    offset: int
    """Of the frame in its segment."""
    schema: int
    """Id of the Arrow schema."""
    rows: int
    checksum: int
    """xxh3-64 of the message."""

    @property
    def frame(self) -> int:
        return self.segment << OFFSET_BITS | self.offset

    @property
    def end(self) -> int:
        """Where the next frame begins."""
        return self.offset + aligned(HEADER_BYTES + self.length)

    def pack(self) -> bytes:
        values = HEADER.pack(
            MAGIC, FORMAT, self.kind, self.length, self.segment, self.offset, self.schema, self.rows, 0, self.checksum
        )
        return values + xxhash.xxh3_64_intdigest(values).to_bytes(8, "little")

    @classmethod
    def unpack(cls, data: bytes) -> Header | None:
        """None: this is no header, or not all of it."""
        values = data[: HEADER.size]
        if len(data) < HEADER_BYTES or values[:4] != MAGIC:
            return None
        if xxhash.xxh3_64_intdigest(values) != int.from_bytes(data[HEADER.size : HEADER_BYTES], "little"):
            return None
        _, version, kind, length, segment, offset, schema, rows, _, checksum = HEADER.unpack(values)
        if version != FORMAT:
            raise LedgerError(f"a segment has format {version}, this program reads {FORMAT}: use the matching release")
        return cls(kind, length, segment, offset, schema, rows, checksum)


def aligned(size: int) -> int:
    return -(-size // HEADER_BYTES) * HEADER_BYTES


class _Sink:
    """Where Arrow writes to: a map, from a place on that can be set."""

    closed = False

    def __init__(self, target: mmap.mmap) -> None:
        self.place = 0
        self._view = memoryview(target)

    def write(self, data: bytes | pa.Buffer) -> int:
        part = memoryview(data).cast("B")
        self._view[self.place : self.place + len(part)] = part
        self.place += len(part)
        return len(part)

    def flush(self) -> None:
        """There is nothing between it and the map."""


class SegmentWriter:
    """Appends frames to segments of its own. Thread-safe."""

    def __init__(self, folder: Path, number: int, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Begins with segment `number`, and goes on with the numbers after it. Makes the folder. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._lock = threading.Lock()
        self.number = number - 1
        """Of the segment that is being written."""
        self._map: mmap.mmap | None = None
        self._end = 0
        self._schemas: dict[pa.Schema, tuple[int, pa.ipc.RecordBatchStreamWriter]] = {}
        """Those that are in this segment → id, and who writes batches of it."""
        self._sink: _Sink | None = None
        self.written: set[int] = set()
        """Segments that were written to since somebody emptied this."""

    def append(self, batch: pa.RecordBatch) -> int:
        """Write a frame, and return its id. Raises OSError when there is no room; then nothing was written."""
        size = HEADER_BYTES + pa.ipc.get_record_batch_size(batch)
        with self._lock:
            known = self._schemas.get(batch.schema)
            if self._map is None or self._end + size + HEADER_BYTES > len(self._map) or known is None:
                known = self._begin(batch.schema, size)
            schema, writer = known
            frame = self._write(writer, batch, schema)
            self.written.add(self.number)
            return frame

    def close(self) -> None:
        """Give back what was not used of the last segment. May be called twice."""
        with self._lock:
            self._seal()

    def _begin(self, schema: pa.Schema, size: int) -> tuple[int, pa.ipc.RecordBatchStreamWriter]:
        """Have room for a frame of so many bytes behind its schema."""
        message = schema.serialize()
        needed = size + 4 * HEADER_BYTES + 2 * message.size
        if self._map is None or self._end + needed > len(self._map):
            self._roll(max(self._segment_bytes, aligned(needed)))
        assert self._map is not None
        assert self._sink is not None
        # Arrow writes the schema of a stream with its first batch. This one is empty, and is written over by the next.
        self._sink.place = self._end
        writer = pa.ipc.new_stream(self._sink, schema)
        writer.write_batch(pa.RecordBatch.from_pylist([], schema))
        schema_id = xxhash.xxh3_64_intdigest(memoryview(message))
        self._map[self._end + HEADER_BYTES : self._end + HEADER_BYTES + message.size] = message.to_pybytes()
        self._finish(SCHEMA, message.size, schema_id, rows=0)
        self._schemas[schema] = schema_id, writer
        return schema_id, writer

    def _write(self, writer: pa.ipc.RecordBatchStreamWriter, batch: pa.RecordBatch, schema: int) -> int:
        assert self._sink is not None
        begin = self._end + HEADER_BYTES
        self._sink.place = begin
        writer.write_batch(batch)
        return self._finish(BATCH, self._sink.place - begin, schema, rows=len(batch))

    def _finish(self, kind: int, length: int, schema: int, *, rows: int) -> int:
        """The message is there: write the header in front of it, and go on behind it."""
        assert self._map is not None
        begin = self._end + HEADER_BYTES
        with memoryview(self._map) as view, view[begin : begin + length] as message:
            checksum = xxhash.xxh3_64_intdigest(message)
        header = Header(kind, length, self.number, self._end, schema, rows, checksum)
        # What was here before must not look like a header; there is always room for one more.
        self._map[header.end : header.end + 4] = bytes(4)
        self._map[self._end : begin] = header.pack()
        self._end = header.end
        return header.frame

    def _roll(self, size: int) -> None:
        path = segment_path(self._folder, self.number + 1)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            # All of it now: a full disk is told here, and not by a signal when the map is written to.
            os.posix_fallocate(file, 0, size)
            new = mmap.mmap(file, size)
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(file)
        self._seal()
        self.number += 1
        self._map, self._end = new, 0
        self._sink = _Sink(new)

    def _seal(self) -> None:
        if self._map is None:
            return
        self._schemas.clear()
        path, size = segment_path(self._folder, self.number), len(self._map)
        self._map = self._sink = None  # the map goes when nobody has a view of it any more
        with suppress(OSError):  # it only takes more room than it need
            # Its blocks behind the end are given back. It stays as long as it was, since others may have mapped it.
            os.truncate(path, self._end)
            os.truncate(path, size)


class SegmentReader:
    """Reads frames of all segments in a folder, checked once each, as views of the files. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._maps: dict[int, mmap.mmap] = {}
        self._schemas: dict[tuple[int, int], pa.Schema] = {}
        """(Segment, id) → schema."""
        self._parsed: OrderedDict[int, pa.RecordBatch] = OrderedDict()

    def batch(self, frame: int) -> pa.RecordBatch:
        """A frame's batch. Valid as long as somebody holds it, also when the segment is removed meanwhile.

        Raises DamagedData when its bytes are not what was written, or not there.
        """
        with self._lock:
            batch = self._parsed.get(frame)
            if batch is None:
                batch = self._parsed[frame] = self._parse(frame)
                if len(self._parsed) > PARSED_FRAMES:
                    self._parsed.popitem(last=False)
            return batch

    def forget(self, segment: int) -> None:
        """Nobody asks for this segment any more."""
        with self._lock:
            self._maps.pop(segment, None)
            for frame in [frame for frame in self._parsed if frame >> OFFSET_BITS == segment]:
                del self._parsed[frame]
            for key in [key for key in self._schemas if key[0] == segment]:
                del self._schemas[key]

    def close(self) -> None:
        with self._lock:
            self._maps.clear()
            self._parsed.clear()
            self._schemas.clear()

    def _parse(self, frame: int) -> pa.RecordBatch:
        segment, offset = frame >> OFFSET_BITS, frame & ((1 << OFFSET_BITS) - 1)
        try:
            data = self._map(segment)
            header = header_at(data, segment, offset)
            message = message_of(data, header)
            if header.kind != BATCH:
                raise ValueError("it is no record batch")
            schema = self._schemas.get((segment, header.schema)) or self._find_schema(segment, data, header.schema)
            batch = read_batch(message, schema)
            if len(batch) != header.rows:
                raise ValueError(f"it has {len(batch)} rows and not {header.rows}")
        except (OSError, ValueError, pa.ArrowException) as error:
            path = segment_path(self._folder, segment)
            raise DamagedData(f"{path} is damaged at byte {offset}: {error}", frame=frame) from None
        return batch

    def _map(self, segment: int) -> mmap.mmap:
        data = self._maps.get(segment)
        if data is None:
            with segment_path(self._folder, segment).open("rb") as file:
                # A copy on write, so that a tensor over it may be written to; torch warns about others.
                data = self._maps[segment] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return data

    def _find_schema(self, segment: int, data: Bytes, schema_id: int) -> pa.Schema:
        for header in headers_of(data, segment):
            if header.kind == SCHEMA and header.schema == schema_id:
                schema = self._schemas[segment, schema_id] = pa.ipc.read_schema(message_of(data, header))
                return schema
        raise ValueError("its schema is missing")


def header_at(data: Bytes, segment: int, offset: int) -> Header:
    """The header at a place. Raises ValueError when there is none."""
    header = Header.unpack(bytes(data[offset : offset + HEADER_BYTES]))
    if header is None or (header.segment, header.offset) != (segment, offset):
        raise ValueError("there is no frame")
    if offset + HEADER_BYTES + header.length > len(data):
        raise ValueError("the end of the frame is missing")
    return header


def message_of(data: Bytes, header: Header) -> pa.Buffer:
    """The message behind a header. Raises ValueError when its bytes are not those that were written."""
    message = pa.py_buffer(data).slice(header.offset + HEADER_BYTES, header.length)
    if xxhash.xxh3_64_intdigest(memoryview(message)) != header.checksum:
        raise ValueError("its bytes are not what was written")
    return message


def headers_of(data: Bytes, segment: int) -> Iterator[Header]:
    """All headers from the beginning of a segment, up to the first place where there is none. What is behind one of
    them may still be damaged."""
    offset = 0
    while offset + HEADER_BYTES <= len(data):
        try:
            header = header_at(data, segment, offset)
        except ValueError:
            return
        yield header
        offset = header.end


def read_batch(message: pa.Buffer, schema: pa.Schema) -> pa.RecordBatch:
    """An Arrow IPC message as a batch that is safe to use. Raises ValueError or ArrowException.

    Bytes from elsewhere can crash whoever reads them: Arrow's own check of all values is the only one that has stopped
    this. A compressed body is refused before, since it may be any number of times as large.
    """
    parsed = pa.ipc.read_message(message)
    if parsed.body is not None and _is_compressed(parsed):
        raise ValueError("its body is compressed")
    batch = pa.ipc.read_record_batch(parsed, schema)
    batch.validate(full=True)
    return batch


def _is_compressed(message: pa.ipc.Message) -> bool:
    """Whether a record batch message names a codec, which is the fourth field of its flatbuffer's header table
    (https://github.com/apache/arrow/blob/main/format/Message.fbs)."""
    data = memoryview(message.metadata)
    try:
        root = struct.unpack_from("<I", data)[0]
        header = _field(data, root, 2)
        if header is None:
            raise ValueError("it has no header")
        return _field(data, header + struct.unpack_from("<I", data, header)[0], 3) is not None
    except struct.error:
        raise ValueError("its metadata are no flatbuffer") from None


def _field(data: memoryview, table: int, number: int) -> int | None:
    """Where a field of a flatbuffer's table is; None when the table does not have it."""
    entries = table - struct.unpack_from("<i", data, table)[0]
    if entries < 0 or 4 + 2 * number >= struct.unpack_from("<H", data, entries)[0]:
        return None
    place = struct.unpack_from("<H", data, entries + 4 + 2 * number)[0]
    return table + place if place else None


class Segments(ABC):
    """Where the frames are, and which of them are needed."""

    @abstractmethod
    def write(self, batch: pa.RecordBatch, *, rows: int) -> int:
        """Keep a frame until `rows` rows have released it. Returns its id. Raises LedgerError when the disk is full."""

    @abstractmethod
    def release(self, frame: int, rows: int = 1) -> None:
        """Say that so many rows do not need the frame any more."""

    @abstractmethod
    def batch(self, frame: int) -> pa.RecordBatch:
        """Raises DamagedData."""

    def gather(self, column: str, frames: NDArray[np.int64], offsets: NDArray[np.int32]) -> pa.Array:
        """One array with the value at each place (frame, row of the frame), at least one. Raises DamagedData."""
        pieces = []
        ends = [*(np.flatnonzero(np.diff(frames)) + 1).tolist(), len(frames)]
        for begin, end in zip([0, *ends], ends, strict=False):
            values, rows = self.batch(int(frames[begin])).column(column), offsets[begin:end]
            if (np.diff(rows) == 1).all():
                pieces.append(values.slice(int(rows[0]), len(rows)))
            else:
                pieces.append(values.take(pa.array(rows)))
        return pa.concat_arrays(pieces)

    def unsynced(self) -> list[Path]:
        """What was written to since the last call: who syncs these makes their frames survive a power cut."""
        return []

    def unneeded(self) -> list[Path]:
        """Files, since the last call, without any frame that is needed: to be removed when the ledger is on disk."""
        return []

    def close(self) -> None:  # noqa: B027
        """May be called twice."""


class MemorySegments(Segments):
    """Frames in the memory of this process (durability `memory`: they do not outlive it)."""

    def __init__(self) -> None:
        self.frames: dict[int, pa.RecordBatch] = {}
        self._rows: Counter[int] = Counter()
        self._next = 0

    def write(self, batch: pa.RecordBatch, *, rows: int) -> int:
        frame, self._next = self._next, self._next + 1
        self.frames[frame], self._rows[frame] = batch, rows
        return frame

    def release(self, frame: int, rows: int = 1) -> None:
        self._rows[frame] -= rows
        if not self._rows[frame]:
            del self.frames[frame], self._rows[frame]

    def batch(self, frame: int) -> pa.RecordBatch:
        return self.frames[frame]


class FileSegments(Segments):
    """Frames in files (durability `process`), read from maps of them."""

    def __init__(
        self,
        folder: Path,
        *,
        needed: Mapping[int, int] | None = None,
        after: int = 0,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        """Begin a segment in `folder`, where earlier ones hold the frames that are `needed` (frame → rows).

        `after`: the last frame that there ever was. Raises LedgerError when a segment with some of the needed frames is
        missing, or the folder cannot be written.
        """
        self._folder = folder
        self._unneeded: set[int] = set()
        self._live: Counter[int] = Counter()
        """Segment → rows that need some frame of it."""
        for frame, rows in (needed or {}).items():
            self._live[frame >> OFFSET_BITS] += rows
        try:
            there = sorted(int(path.stem) for path in folder.glob(f"*{SUFFIX}"))
            if missing := sorted(self._live.keys() - set(there)):
                raise LedgerError(
                    f"{segment_path(folder, missing[0])} is missing, so the run cannot go on with its samples: "
                    "restore the file, or start a new run from the last checkpoint's weights"
                )
            self._unneeded.update(number for number in there if not self._live[number])
            last = max([*there, after >> OFFSET_BITS])
            self._writer = SegmentWriter(folder, last + 1, segment_bytes=segment_bytes)
        except OSError as error:
            raise LedgerError(f"the data of the samples in {folder} cannot be opened: {error}") from error
        self._reader = SegmentReader(folder)

    def write(self, batch: pa.RecordBatch, *, rows: int) -> int:
        before = self._writer.number
        try:
            frame = self._writer.append(batch)
        except OSError as error:
            raise LedgerError(
                f"the data of a sample cannot be written to {self._folder} ({error}): see that its disk has room"
            ) from error
        self._live[frame >> OFFSET_BITS] += rows
        if before != self._writer.number:
            self._note_if_unneeded(before)
        return frame

    def release(self, frame: int, rows: int = 1) -> None:
        number = frame >> OFFSET_BITS
        self._live[number] -= rows
        self._note_if_unneeded(number)

    def batch(self, frame: int) -> pa.RecordBatch:
        return self._reader.batch(frame)

    def unsynced(self) -> list[Path]:
        written, self._writer.written = self._writer.written, set()
        return [*(segment_path(self._folder, number) for number in sorted(written)), self._folder]

    def unneeded(self) -> list[Path]:
        unneeded, self._unneeded = self._unneeded, set()
        return [segment_path(self._folder, number) for number in sorted(unneeded)]

    def close(self) -> None:
        self._writer.close()
        self._reader.close()

    def _note_if_unneeded(self, number: int) -> None:
        if self._live.get(number) == 0 and number != self._writer.number:
            del self._live[number]
            self._reader.forget(number)
            self._unneeded.add(number)
