"""Where the data of the samples are: segments, which are files of frames (`frames.py`) with one writer each.

    <folder>/000001.segment, 000002.segment, …

A writer is a client process; it appends to a segment of its own, whose number it got from the broker. Readers are all
processes of the host; they map the files. The broker has the account: which segments there are and how many rows need
each, but never data. `docs/store_format.md` describes the files for programs in other languages.

A segment's file is locked by its writer until the writer has rolled on to the next one *and* the broker has answered
for every frame in it. It appears under its name with the lock already on it. So a segment that no row needs and that is
not locked is one that nobody will ever name again, and may go; a writer that was killed loses its locks by that alone.

Writing to pages that are in memory already is several times as fast as to new ones, so a few files are kept when they
go, and become segments with new numbers. Whoever has mapped a file holds another lock on it, as long as anything that
was read from it lives: such a file is not used again.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from asyncflow.errors import Closed, DamagedData, LedgerError
from asyncflow.store.bulk import Layout, Mapped, Span, typed
from asyncflow.store.frames import (
    BATCH,
    HEADER_BYTES,
    OFFSET_BITS,
    SCHEMA,
    Encoder,
    Header,
    aligned,
    header_at,
    headers_beyond_damage,
    message_of,
    read_batch,
    read_schema,
)

SUFFIX: Final = ".segment"
UNFINISHED: Final = ".new"
"""A segment that its writer has not locked yet, or one whose writer was killed before."""
FREE: Final = ".free"
"""A file that was a segment, and may become another one."""
FREE_BYTES: Final = 512 << 20
"""What such files may take together."""
FLOCK: Final = struct.Struct("hhqqi")
"""The system's `struct flock`: type, whence, start, length, process."""
SEGMENT_BYTES: Final = 16 << 20
"""Size of a segment, unless one frame needs more."""
JOINED_BYTES: Final = 1 << 18
"""A message up to this size is put together in memory first; the parts of a larger one go to the file as they are."""
MOST_PARTS: Final = 1024
"""IOV_MAX: the parts that the system takes in one call."""
ENCODERS: Final = 64
MANY_FRAMES: Final = 4
"""So many frames in one call are read at once, and copied; rows of fewer are views of the map."""
LAYOUTS: Final = 256
PARSED_FRAMES: Final = 4096
"""Frames that a reader has parsed and keeps; what they take is in the map, not in these."""
OURS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM, errno.EINTR})
"""Errors at reading that say nothing about the data."""
MAPS: Final = 128
"""Segments that a reader has mapped at the same time; each takes a file descriptor."""

Frames = NDArray[np.int64]
Offsets = NDArray[np.int32]
Columns = Mapping[str, pa.DataType]


def sync_file(path: Path) -> None:
    """Make the content of a file, or the entries of a folder, survive a power cut. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def segment_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06}{SUFFIX}"


def lock_for_writing(file: int) -> None:
    """Be the writer of a file, until all copies of the descriptor are closed. Raises BlockingIOError.

    Of the two kinds of locks that belong to a descriptor and not to a process, this is the one (OFD, fcntl(2)); readers
    hold the other (flock), and the two do not see each other.
    """
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))


def has_writer(path: Path) -> bool:
    """Whether somebody is the writer of a file. Not so when it is not there."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        found = fcntl.fcntl(file, fcntl.F_OFD_GETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    finally:
        os.close(file)
    return bool(FLOCK.unpack(found)[0] != fcntl.F_UNLCK)


def is_name_of(path: Path, file: int) -> bool:
    """Whether a path is still that of an open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


def free_files(folder: Path) -> list[Path]:
    """Files that were segments, the oldest first."""
    return sorted(folder.glob(f"*{FREE}"), key=lambda path: (len(path.stem), path.stem))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def segment_of(frame: int) -> int:
    return frame >> OFFSET_BITS


# -- writing -----------------------------------------------------------------------------------------------------------


class _Segment:
    """A segment that is being written, or waits for the broker's answers."""

    def __init__(self, number: int, file: int, size: int) -> None:
        self.number = number
        self.file = file
        """Its descriptor, which has the lock."""
        self.size = size
        self.end = 0
        """Where the next frame goes."""
        self.schemas: set[int] = set()
        self.open_frames: set[int] = set()
        """Frames for which the broker has not answered."""
        self.sealed = False
        """Nothing more will be appended."""


class SegmentWriter:
    """Appends frames to segments of its own. Thread-safe. A forked child must not use it, and keeps its locks alive."""

    def __init__(
        self,
        folder: Path,
        allocate: Callable[[], int],
        *,
        segment_bytes: int = SEGMENT_BYTES,
        fdatasync: Callable[[int], None] = os.fdatasync,
    ) -> None:
        """`allocate` gives the number of the next segment, and is called when one is needed. `fdatasync` makes the
        content of a descriptor durable or raises OSError: tests give another one. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._allocate = allocate
        self._segment_bytes = segment_bytes
        self._lock = threading.Lock()
        self._segments: dict[int, _Segment] = {}
        self._current: _Segment | None = None
        self._encoders: OrderedDict[pa.Schema, Encoder] = OrderedDict()
        self._fdatasync = fdatasync
        self._sync_lock = threading.Lock()
        self._unsynced: set[int] = set()
        """Segments that were written to since the last sync."""
        self._unsynced_names = True
        """Whether there are segments whose names a power cut can still take."""
        self._failure: OSError | None = None
        self._closed = False

    def append(self, batch: pa.RecordBatch) -> int:
        """Write a frame, and return its id. The caller settles it when the broker has answered for it.

        Raises OSError when it cannot be written; then there is no frame. Raises ValueError for a schema that frames
        do not have.
        """
        with self._lock:
            self._check()
            encoder = self._encoder(batch.schema)
            parts, size = encoder.encode(batch)
            segment = self._room(size, encoder)
            if encoder.schema_id not in segment.schemas:
                message = encoder.schema_message
                self._write(segment, SCHEMA, [message], len(message), schema=encoder.schema_id, rows=0)
                segment.schemas.add(encoder.schema_id)
            frame = self._write(segment, BATCH, parts, size, schema=encoder.schema_id, rows=len(batch))
            segment.open_frames.add(frame)
            self._unsynced.add(segment.number)
            return frame

    def settle(self, frame: int) -> None:
        """The broker has taken the frame, or has refused it: no call that names it is under way."""
        with self._lock:
            if segment := self._segments.get(segment_of(frame)):
                segment.open_frames.discard(frame)
                self._release(segment)

    def abandon(self, frame: int) -> None:
        """Write nothing more into the segment of this frame: the broker that gave its number out was killed, and the
        next one does not know of it."""
        with self._lock:
            if self._current is not None and self._current.number == segment_of(frame):
                self._seal()

    def sync(self) -> None:
        """Make every frame so far survive a power cut. Threads that come together share one.

        Raises OSError. The writer is of no use afterwards: what a failed sync has lost cannot be known.
        """
        with self._sync_lock:  # whoever waits here may find everything done
            with self._lock:
                self._check()
                numbers, self._unsynced = self._unsynced, set()
                names, self._unsynced_names = self._unsynced_names, False
                files = {number: os.dup(self._segments[number].file) for number in numbers & self._segments.keys()}
            try:
                for number in numbers:
                    self._sync(number, files.pop(number, None))
                if names:
                    sync_file(self._folder)
            except OSError as error:
                with self._lock:
                    self._failure = error
                raise
            finally:
                for file in files.values():
                    os.close(file)

    def close(self) -> None:
        """Give back what was not used of the last segment, and all locks. May be called twice."""
        with self._lock:
            self._closed = True
            self._seal()
            for segment in list(self._segments.values()):
                segment.open_frames.clear()
                self._release(segment)

    def _check(self) -> None:
        if self._closed:
            raise Closed("the writer of the samples' data is closed")
        if self._failure is not None:
            raise OSError(self._failure.errno, f"an earlier sync has failed: {self._failure}")

    def _encoder(self, schema: pa.Schema) -> Encoder:
        encoder = self._encoders.get(schema)
        if encoder is None:
            encoder = self._encoders[schema] = Encoder(schema)
            if len(self._encoders) > ENCODERS:
                self._encoders.popitem(last=False)
        return encoder

    def _room(self, size: int, encoder: Encoder) -> _Segment:
        """The segment for a message of so many bytes."""
        needed = aligned(HEADER_BYTES + size)
        current = self._current
        if current is not None:
            schema = 0 if encoder.schema_id in current.schemas else aligned(HEADER_BYTES + len(encoder.schema_message))
            if current.end + schema + needed <= current.size:
                return current
        needed += aligned(HEADER_BYTES + len(encoder.schema_message))
        new = self._create(max(aligned(self._segment_bytes), needed))
        self._seal()
        self._current = self._segments[new.number] = new
        self._unsynced_names = True
        return new

    def _create(self, size: int) -> _Segment:
        while True:
            number = self._allocate()
            path = segment_path(self._folder, number)
            # A number that was given out by a broker that was killed may be given out once more: take the next then.
            try:
                file, name = self._claim(size) or self._open(path.with_suffix(UNFINISHED))
            except FileExistsError:
                continue
            try:
                lock_for_writing(file)
                # All of it now, so that a full disk is told before anything is written.
                room = max(size, os.fstat(file).st_size)
                os.posix_fallocate(file, 0, room)
                # This very file, whatever has its first name by now. With a folder given, Python follows the link.
                os.link(f"/proc/self/fd/{file}", path, src_dir_fd=file)
            except OSError as error:
                if name.suffix == UNFINISHED:
                    name.unlink(missing_ok=True)
                os.close(file)
                if isinstance(error, FileExistsError | FileNotFoundError | BlockingIOError):
                    continue
                raise
            name.unlink(missing_ok=True)
            fcntl.flock(file, fcntl.LOCK_UN)  # from here on others may map it
            return _Segment(number, file, room)

    def _open(self, path: Path) -> tuple[int, Path]:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), path

    def _claim(self, size: int) -> tuple[int, Path] | None:
        """A file of at least this size that was a segment and that nobody has mapped, locked against others."""
        for path in sorted(free_files(self._folder), key=_size):
            try:
                file = os.open(path, os.O_RDWR)
            except FileNotFoundError:
                continue
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                status = os.fstat(file)
                if is_name_of(path, file):
                    if status.st_nlink == 1 and status.st_size >= size:
                        return file, path
                    if status.st_nlink > 1:
                        path.unlink()  # it is a segment again, whose writer was killed before it came to this
            os.close(file)
        return None

    def _write(
        self, segment: _Segment, kind: int, parts: Sequence[bytes | pa.Buffer], length: int, *, schema: int, rows: int
    ) -> int:
        if length <= JOINED_BYTES:
            parts = [b"".join(parts)]
            checksum = xxhash.xxh3_64_intdigest(parts[0])
        else:
            digest = xxhash.xxh3_64()
            for part in parts:
                digest.update(part)
            checksum = digest.intdigest()
        header = Header(kind, length, segment.number, segment.end, schema, rows, checksum)
        padding = bytes(header.end - header.offset - HEADER_BYTES - length)
        try:
            # Not through a map: its pages would be filled with zeros first, one fault at a time.
            _write_all(segment.file, [header.pack(), *parts, padding], header.end - header.offset, segment.end)
        except OSError:
            self._seal()  # what it left behind must not be taken for a frame by who reads on
            raise
        segment.end = header.end
        return header.frame

    def _seal(self) -> None:
        segment, self._current = self._current, None
        if segment is None:
            return
        segment.sealed = True
        with suppress(OSError):  # it only takes more room than it need
            # Its blocks behind the end are given back. It stays as long as it was, since others may have mapped it.
            os.truncate(segment.file, segment.end)
            os.truncate(segment.file, segment.size)
        self._release(segment)

    def _release(self, segment: _Segment) -> None:
        """Give back the lock of a segment when nobody will name anything in it that the broker does not know."""
        if segment.sealed and not segment.open_frames:
            os.close(segment.file)
            del self._segments[segment.number]

    def _sync(self, number: int, file: int | None) -> bool:
        """Sync a segment. `file`: its descriptor, which is closed; None when the writer has closed it already.

        False: the segment is not there any more, since nobody needed it.
        """
        if file is None:
            try:
                file = os.open(segment_path(self._folder, number), os.O_RDONLY)
            except FileNotFoundError:
                return False
        try:
            self._fdatasync(file)
        finally:
            os.close(file)
        return True


def _write_all(file: int, parts: Sequence[bytes | pa.Buffer], size: int, offset: int) -> None:
    """Write parts of this size in all one behind the other. Raises OSError."""
    written = os.pwritev(file, parts[:MOST_PARTS], offset)
    if written == size:
        return
    views = [memoryview(part).cast("B") for part in parts if len(part)]
    while True:
        offset += written
        while views and written >= len(views[0]):
            written -= len(views.pop(0))
        if not views:
            return
        views[0] = views[0][written:]
        written = os.pwritev(file, views[:MOST_PARTS], offset)


# -- reading -----------------------------------------------------------------------------------------------------------


class _Map:
    """A segment that is mapped."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            # As long as the map is there, which has a copy of the descriptor, the file is not used for anything else.
            fcntl.flock(file, fcntl.LOCK_SH)
            if not is_name_of(path, file.fileno()):
                raise FileNotFoundError("No such file: it was removed")
            # A copy on write, so that a tensor over it may be written to; torch warns about others.
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if len(self.data) < HEADER_BYTES:
            raise ValueError("there is no frame")
        self.bytes = Mapped(self.data)
        self.path = path
        self.schemas: dict[int, pa.Schema] = {}


class SegmentReader:
    """Reads frames of all segments in a folder, checked once each, as views of the files. Thread-safe.

    Views may be written to. The file stays as it is, but this reader may give the changed bytes to others who ask for
    the same frame.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._maps: OrderedDict[int, _Map] = OrderedDict()
        self._parsed: OrderedDict[int, pa.RecordBatch] = OrderedDict()
        self._layouts: dict[int, Layout | None] = {}
        """Schema → the layout of its record batches; None when they are not read many at once."""

    def batch(self, frame: int) -> pa.RecordBatch:
        """A frame's batch. Valid as long as somebody holds it, also when the segment is removed meanwhile.

        Raises DamagedData when its bytes are not what was written, or not there.
        """
        with self._lock:
            batch = self._parsed.get(frame)
            if batch is not None:
                self._parsed.move_to_end(frame)
                return batch
        batch = self._parse(frame)
        with self._lock:
            self._parsed[frame] = batch
            if len(self._parsed) > PARSED_FRAMES:
                self._parsed.popitem(last=False)
        return batch

    def read(self, columns: Columns, frames: Frames, offsets: Offsets) -> list[pa.Array]:
        """One array for each column, with the values at the places (frame, row of the frame). Raises DamagedData.

        Rows of few frames are views of the map, as those of `batch`; those of many frames are copied together.
        """
        if len(frames) and (frames == frames[0]).all():
            return gather(self.batch, columns, frames, offsets)
        unique, index = np.unique(frames, return_inverse=True)
        if len(unique) < MANY_FRAMES:
            return gather(self.batch, columns, frames, offsets)
        # Samples of a group have the same prompt: each place once.
        places, back = np.unique(index.astype(np.int64) << 32 | offsets.astype(np.uint32), return_inverse=True)
        try:
            arrays = self._read_many(columns, unique, places >> 32, places & 0xFFFFFFFF, back)
            for array in arrays:
                array.validate(full=True)
        except (ValueError, pa.ArrowException):
            return gather(self.batch, columns, frames, offsets)  # which knows the frame that is to blame
        return arrays

    def forget(self, segment: int) -> None:
        """Nobody asks for this segment any more."""
        with self._lock:
            self._drop([segment])

    def close(self) -> None:
        """What was read stays valid. May be called twice."""
        with self._lock:
            self._maps.clear()
            self._parsed.clear()

    def _read_many(self, columns: Columns, unique: Frames, index: Frames, rows: Frames, back: Frames) -> list[pa.Array]:
        """Values at the places (index of the frame, row), which are sorted, in the order of `back`."""
        names = list(columns)
        pieces: list[tuple[Mapped, Layout, Frames, list[Span]]] = []
        left = np.ones(len(index), np.bool_)
        """Places that are to be read in the ordinary way."""
        for mapped, layout, headers, members in self._alike(columns, unique):
            number = np.full(len(unique), -1, np.int64)
            number[members] = np.arange(len(members))
            there = np.flatnonzero(number[index] >= 0)
            spans, right = mapped.spans(layout, names, headers, number[index[there]], rows[there])
            keep = right[number[index[there]]]
            if keep.any():
                pieces.append((mapped, layout, there[keep], [(begin[keep], end[keep]) for begin, end in spans]))
                left[there[keep]] = False
        columns_of = [[piece[1].columns[name] for piece in pieces] for name in names]
        if len(pieces) == 1 and not left.any():
            mapped, _, _, spans = pieces[0]
            return [typed(of[0], mapped.cut(of[0], span, back)) for of, span in zip(columns_of, spans, strict=True)]
        cuts = [
            pa.concat_arrays([piece[0].cut(kind, piece[3][i], None) for kind, piece in zip(of, pieces, strict=True)])
            for i, of in enumerate(columns_of)
            if pieces
        ]
        place = np.empty(len(index), np.int64)
        place[np.concatenate([*(piece[2] for piece in pieces), np.flatnonzero(left)])] = np.arange(len(index))
        order = pa.array(place[back])
        if not left.any():
            return [typed(of[0], cut.take(order)) for of, cut in zip(columns_of, cuts, strict=True)]
        arrays = gather(self.batch, columns, unique[index[left]], rows[left].astype(np.int32))
        if pieces:
            many = [typed(of[0], cut) for of, cut in zip(columns_of, cuts, strict=True)]
            arrays = [pa.concat_arrays(both) for both in zip(many, arrays, strict=True)]
        return [array.take(order) for array in arrays]

    def _alike(
        self, columns: Columns, unique: Frames
    ) -> Iterator[tuple[Mapped, Layout, NDArray[np.void], NDArray[np.intp]]]:
        """Frames of one segment and schema that can be read at once: their headers, and which of `unique` they are."""
        for segment in np.unique(unique >> OFFSET_BITS).tolist():
            begin, end = np.searchsorted(unique, [segment << OFFSET_BITS, (segment + 1) << OFFSET_BITS])
            try:
                mapped = self._map(segment).bytes
            except (OSError, ValueError):
                continue
            headers, right = mapped.headers(segment, unique[begin:end] & ((1 << OFFSET_BITS) - 1))
            for schema in np.unique(headers["schema"][right]).tolist():
                members = np.flatnonzero(right & (headers["schema"] == schema))
                layout = self._layout(mapped, headers[members[0]])
                if layout is not None and all(
                    name in layout.columns and layout.columns[name].type == kind for name, kind in columns.items()
                ):
                    yield mapped, layout, headers[members], members + begin

    def _layout(self, mapped: Mapped, header: np.void) -> Layout | None:
        schema = int(header["schema"])
        if schema not in self._layouts:
            batch = self.batch(int(header["segment"]) << OFFSET_BITS | int(header["offset"]))
            self._layouts[schema] = mapped.layout(header, batch.schema)
            if len(self._layouts) > LAYOUTS:
                self._layouts.pop(next(iter(self._layouts)), None)
        return self._layouts.get(schema)

    def _parse(self, frame: int) -> pa.RecordBatch:
        segment, offset = segment_of(frame), frame & ((1 << OFFSET_BITS) - 1)
        try:
            try:
                return _parse(self._map(segment), segment, offset)
            except (ValueError, pa.ArrowException):
                # A page that somebody wrote to through a view does not show what the writer has put there since.
                with self._lock:
                    self._drop([segment])
                return _parse(self._map(segment), segment, offset)
        except (OSError, ValueError, pa.ArrowException) as error:
            path = segment_path(self._folder, segment)
            if isinstance(error, MemoryError) or getattr(error, "errno", None) in OURS:
                raise LedgerError(
                    f"{path} cannot be read ({error}), which is no fault of its samples: see to the limits of this "
                    "process and to its rights"
                ) from None
            raise DamagedData(f"{path} is damaged at byte {offset}: {error}", frame=frame) from None

    def _map(self, segment: int) -> _Map:
        with self._lock:
            mapped = self._maps.get(segment)
            if mapped is None:
                mapped = _Map(segment_path(self._folder, segment))
                # The disk has no use of a file's removal before its map has gone.
                self._drop([number for number, other in self._maps.items() if not other.path.exists()])
                self._maps[segment] = mapped
                self._drop(list(self._maps)[:-MAPS])
            self._maps.move_to_end(segment)
            return mapped

    def _drop(self, segments: Iterable[int]) -> None:
        gone = set(segments)
        if gone:
            for segment in gone:
                self._maps.pop(segment, None)
            for frame in [frame for frame in self._parsed if segment_of(frame) in gone]:
                del self._parsed[frame]


def _parse(mapped: _Map, segment: int, offset: int) -> pa.RecordBatch:
    """Raises ValueError or ArrowException."""
    header = header_at(mapped.data, segment, offset)
    message = message_of(mapped.data, header)
    if header.kind != BATCH:
        raise ValueError("it is no record batch")
    batch = read_batch(message, _schema(mapped, segment, header.schema))
    if len(batch) != header.rows:
        raise ValueError(f"it has {len(batch)} rows and not {header.rows}")
    return batch


def _schema(mapped: _Map, segment: int, schema_id: int) -> pa.Schema:
    schema = mapped.schemas.get(schema_id)
    if schema is None:
        for header in headers_beyond_damage(mapped.data, segment):
            if header.kind == SCHEMA and header.schema == schema_id:
                message = message_of(mapped.data, header)
                if header.checksum != schema_id:
                    raise ValueError("its schema does not have the id that it is named by")
                schema = mapped.schemas[schema_id] = read_schema(message)
                break
        else:
            raise ValueError("its schema is missing")
    return schema


def gather(
    batch_of: Callable[[int], pa.RecordBatch], columns: Columns, frames: Frames, offsets: Offsets
) -> list[pa.Array]:
    """One array for each column, with the values at the places (frame, row of the frame), frame by frame.

    Rows of one frame that follow each other are not copied. Raises DamagedData.
    """
    if not len(frames):
        return [pa.array([], kind) for kind in columns.values()]
    order = None if (frames[1:] >= frames[:-1]).all() else np.argsort(frames, kind="stable")
    if order is not None:
        frames, offsets = frames[order], offsets[order]
    begins = [0, *(np.flatnonzero(np.diff(frames)) + 1).tolist()]
    pieces: list[list[pa.Array]] = [[] for _ in columns]
    for begin, end in zip(begins, [*begins[1:], len(frames)], strict=True):
        batch, rows = _columns(batch_of, int(frames[begin]), columns), offsets[begin:end]
        if rows.min() < 0 or rows.max() >= len(batch):
            raise DamagedData(f"a frame of {len(batch)} rows has no row {rows.max()}", frame=int(frames[begin]))
        in_a_row = (np.diff(rows) == 1).all()
        batch = batch.slice(int(rows[0]), len(rows)) if in_a_row else batch.take(pa.array(rows))
        for piece, column in zip(pieces, batch.columns, strict=True):
            piece.append(column)
    arrays = [piece[0] if len(piece) == 1 else pa.concat_arrays(piece) for piece in pieces]
    if order is None:
        return arrays
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    return [array.take(pa.array(back)) for array in arrays]


def _columns(batch_of: Callable[[int], pa.RecordBatch], frame: int, columns: Columns) -> pa.RecordBatch:
    """These columns of a frame. Raises DamagedData when it does not have them in these types."""
    batch = batch_of(frame)
    places = [batch.schema.get_field_index(name) for name in columns]  # −1 also for one that is there twice
    for place, (name, kind) in zip(places, columns.items(), strict=True):
        if place < 0 or batch.schema.field(place).type != kind:
            raise DamagedData(f"frame {frame} does not have the column {name} as {kind}", frame=frame)
    return batch.select(places)
