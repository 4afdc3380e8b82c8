"""A disk: what was written is in memory, what was synced is on disk. A power cut keeps that and a part of the other."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from asyncflow.errors import DamagedData, LedgerError
from asyncflow.store.events import Event, Opened, from_json
from asyncflow.store.frames import BATCH, HEADER_BYTES, OFFSET_BITS, SCHEMA, Encoder, Header, aligned
from asyncflow.store.image import Image
from asyncflow.store.journal import Record
from asyncflow.store.segments import _parse, gather, segment_of
from asyncflow.store.shelf import Shelf
from tests.test_table_model import insist

from .world import Killed, Process, World

SECTOR = 512
SEGMENT_BYTES = 6 << 10


class PowerCut(Killed):
    """Everybody on the host is no more, and what was not synced may be lost."""


# -- the ledger --------------------------------------------------------------------------------------------------------


@dataclass
class LedgerFile:
    """What is in the file of a ledger."""

    path: Path = Path("ledger")
    lines: list[tuple[float, str, str]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    """How many lines there were after each transaction."""
    synced: int = 0
    """So many lines survive a power cut."""
    hole: int | None = None
    """From this line on a failed sync has lost something, which only a power cut shows."""
    snapshot: tuple[int, Image, dict[str, Any]] | None = None

    def cut_power(self, world: World) -> None:
        kept = [0, *(end for end in self.ends if end >= self.synced)]
        kept = [end for end in kept if end >= self.synced and (self.hole is None or end <= self.hole)] or [self.synced]
        end = world.chance.choice(kept)
        if end < len(self.lines):
            world.faults["lost in a power cut", "ledger"] += 1
        self.lines, self.ends = self.lines[:end], [e for e in self.ends if e <= end]
        self.synced, self.hole = end, None
        if self.snapshot is not None and self.snapshot[0] > end:
            self.snapshot = None

    # what `rebuild` reads

    def records(self, after: int = 0) -> Iterator[Record]:
        for lsn, (at, kind, body) in enumerate(self.lines[after:], start=after + 1):
            yield Record(lsn=lsn, at=at, event=from_json(kind, body))

    def terms(self) -> Opened:
        first = next(self.records()).event
        assert isinstance(first, Opened)
        return first


class SimJournal:
    """Stands in for `Journal`, and dies at any of its points."""

    def __init__(
        self, world: World, file: LedgerFile, process: Process, told: Callable[[Sequence[Event]], None]
    ) -> None:
        self.path = file.path
        self._world, self._file, self._process, self._told = world, file, process, told
        self.lsn = len(file.lines)
        # Opening folds the log into the database, which writes everything anew and syncs it.
        file.synced, file.hole = len(file.lines), None
        self._synced = self.lsn
        self.failed: LedgerError | None = None
        self.full_until = -1.0

    @property
    def synced(self) -> int:
        return self._synced

    def append(self, events: Sequence[Event], at: float) -> int:
        self.alive()
        if self.failed is not None:
            raise LedgerError(str(self.failed))
        if self._world.fault("disk full", "ledger", 0.002):
            self.full_until = self._world.now + self._world.chance.uniform(0.5, 3.0)
        if self._world.now < self.full_until and not self._world.calm:
            raise LedgerError("the disk of the ledger is full")
        self.die("before append", 0.0008)
        lines = [(at, event.kind, event.to_json()) for event in events if event.journaled]
        if lines:
            self._write(lines)
        self._told(events)
        self.die("after append", 0.0008)
        return self.lsn

    def _write(self, lines: Sequence[tuple[float, str, str]]) -> None:
        self._file.lines += lines
        self._file.ends.append(len(self._file.lines))
        self.lsn += len(lines)
        for _, kind, body in lines:
            self._world.note(f"{kind} {body}")

    def sync_to(self, lsn: int) -> None:
        self.alive()
        if self._synced >= lsn:
            return
        if self.failed is not None:
            raise LedgerError(str(self.failed))
        self.die("before sync", 0.0008)
        if self._world.fault("sync fails", "ledger", 0.004):
            self.failed = LedgerError("the ledger cannot be synced")
            self._file.hole = self._file.synced
            raise self.failed
        if self._file.hole is None:
            self._file.synced = self.lsn
        self._synced = self.lsn
        self.die("after sync", 0.0008)

    def sync(self) -> None:
        self.sync_to(self.lsn)

    def close(self) -> None:
        self.failed = self.failed or LedgerError("the ledger is closed")

    def die(self, point: str, probability: float) -> None:
        if self._world.fault("kill", point, probability):
            self._process.dead = True
            raise Killed
        if self._world.fault("power cut", point, probability / 2):
            self._process.dead = True
            raise PowerCut

    def alive(self) -> None:
        if self._process.dead:
            raise Killed


# -- the segments ------------------------------------------------------------------------------------------------------


class SegmentFile:
    def __init__(self, number: int, writer: Process, size: int) -> None:
        self.number, self.writer, self.size = number, writer, size
        self.data = bytearray()
        self.durable = bytearray()
        self.lost: list[tuple[int, int]] = []
        """Ranges that a failed sync has taken, and that are in memory still."""
        self.clean = 0
        """Everything before is not written by a sync any more."""
        self.named = False
        """Its name survives a power cut."""
        self.schemas: set[int] = set()
        self.open_frames: set[int] = set()
        self.sealed = False
        self.flipped = False

    @property
    def locked(self) -> bool:
        return not self.writer.dead and not (self.sealed and not self.open_frames)

    def sync(self) -> None:
        image = bytearray(self.data)
        for begin, end in self.lost:
            image[begin:end] = bytes(end - begin)
        self.durable, self.clean = image, len(self.data)

    def lose(self) -> None:
        """A sync has failed."""
        self.lost.append((self.clean, len(self.data)))
        self.clean = len(self.data)

    def cut_power(self, world: World) -> None:
        before = bytes(self.data)
        kept = bytearray(before)
        kept[len(self.durable) :] = bytes(len(before) - len(self.durable))
        kept[: len(self.durable)] = self.durable
        for begin in range(0, len(before), SECTOR):
            untouched = all(end <= begin or start >= begin + SECTOR for start, end in self.lost)
            if begin + SECTOR > len(self.durable) and untouched and world.chance.random() < 0.5:
                kept[begin : begin + SECTOR] = before[begin : begin + SECTOR]
        if kept != before:
            world.faults["lost in a power cut", "segment"] += 1
        self.data, self.durable, self.lost, self.clean = kept, bytearray(kept), [], len(kept)
        self.named = True


class _Mapped:
    """What the real parser reads."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.schemas: dict[int, pa.Schema] = {}


class SegmentDisk(Shelf):
    """The folder of the segments, and the account's shelf. It outlives all processes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.files: dict[int, SegmentFile] = {}
        self.written: dict[int, int] = {}
        """Frame → xxh3 of its bytes as they were written last."""
        self.hurt: set[int] = set()
        """Frames of which something was flipped or lost."""
        self.flipped: set[int] = set()
        self.full_until = -1.0
        self.broker: Process | None = None
        self.failed = False
        """A sync has failed: whoever starts the store again starts the machine again before."""

    # Shelf

    def present(self) -> dict[int, int]:
        return {number: len(file.data) for number, file in self.files.items()}

    def end_of(self, frame: int) -> int:
        offset = frame & ((1 << OFFSET_BITS) - 1)
        return offset + self.length(self.files[segment_of(frame)], offset)

    def name(self, number: int) -> str:
        return f"segment {number}"

    def in_use(self, number: int) -> bool:
        file = self.files.get(number)
        return True if file is None else file.locked

    def remove(self, number: int) -> None:
        self.die_in("removal")
        file = self.files.get(number)
        insist(file is None or not file.locked, "a segment stays while its writer has it", number)
        if self.files.pop(number, None) is not None:
            self.world.note(f"segment {number} goes")

    def die_in(self, point: str) -> None:
        if self.broker is None:
            return
        if self.broker.dead:
            raise Killed
        if self.world.fault("kill", point, 0.01):
            self.broker.dead = True
            raise Killed
        if self.world.fault("power cut", point, 0.02):
            self.broker.dead = True
            raise PowerCut

    def sync(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            file = self.files.get(number)
            if file is None:
                continue
            self.die_in("sync of segments")
            if self.world.fault("sync fails", "segments", 0.05):
                file.lose()
                self.failed = True
                raise OSError(errno.EIO, "the disk is gone")
            file.sync()
        self.sync_names()

    def sync_names(self) -> None:
        for file in self.files.values():
            file.named = True

    def close(self) -> None:
        """Nothing is kept for later."""

    # what goes wrong

    def cut_power(self) -> None:
        self.failed = False
        for number, file in list(self.files.items()):
            if not file.named and self.world.chance.random() < 0.5:
                del self.files[number]
                self.world.faults["lost in a power cut", "segment's name"] += 1
                continue
            file.writer.dead = True
            file.cut_power(self.world)
        for frame in self.written:
            if not self.whole(frame):
                self.hurt.add(frame)

    def flip(self) -> None:
        """One bit of some frame turns over, in memory and on the disk."""
        there = [frame for frame in self.written if segment_of(frame) in self.files]
        if not there or self.world.calm:
            return
        frame = self.world.chance.choice(there)
        file, offset = self.files[segment_of(frame)], frame & ((1 << OFFSET_BITS) - 1)
        place = offset + self.world.chance.randrange(self.length(file, offset))
        if place >= len(file.data):
            return
        file.data[place] ^= 1 << self.world.chance.randrange(8)
        if place < len(file.durable):
            file.durable[place] = file.data[place]
        # Its schema may be the one of others in the segment.
        file.flipped = True
        self.hurt |= {f for f in there if segment_of(f) == segment_of(frame) and not self.whole(f)}
        self.flipped |= self.hurt & {f for f in there if segment_of(f) == segment_of(frame)}
        self.world.faults["bit flipped", "segment"] += 1
        self.world.note(f"a bit of frame {frame} flips")

    @staticmethod
    def length(file: SegmentFile, offset: int) -> int:
        header = Header.unpack(bytes(file.data[offset : offset + HEADER_BYTES]))
        return HEADER_BYTES if header is None else HEADER_BYTES + header.length

    def whole(self, frame: int) -> bool:
        """Whether the bytes of a frame, and of its schema, are what was written."""
        try:
            self.parse(frame)
        except (DamagedData, ValueError):
            return False
        return True

    def is_hurt(self, frame: int) -> bool:
        """Whether something has happened to a frame, or its segment is gone: then it may be refused."""
        return frame in self.hurt or segment_of(frame) not in self.files

    def parse(self, frame: int) -> pa.RecordBatch:
        segment, offset = segment_of(frame), frame & ((1 << OFFSET_BITS) - 1)
        file = self.files.get(segment)
        try:
            if file is None:
                raise ValueError("it is not there")
            return _parse(_Mapped(bytes(file.data)), segment, offset)  # type: ignore[arg-type]
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DamagedData(f"segment {segment} is damaged at {offset}: {error}", frame=frame) from None


class SimFrames:
    """Stands in for `FileFrames`: the segments of one client process, to write, and all to read."""

    def __init__(self, disk: SegmentDisk, process: Process, allocate: Callable[[], int], *, durable: bool) -> None:
        self._disk, self._process, self._allocate, self._durable = disk, process, allocate, durable
        self._world = disk.world
        self._current: SegmentFile | None = None
        self._mine: dict[int, SegmentFile] = {}
        self._unsynced: set[int] = set()
        self._failed = False
        self._encoders: dict[pa.Schema, Encoder] = {}

    def abandon(self, frame: int) -> None:
        if self._current is not None and self._current.number == segment_of(frame):
            self._current = None

    def append(self, batch: pa.RecordBatch) -> int:
        if self._failed:
            raise OSError(errno.EIO, "an earlier sync has failed")
        encoder = self._encoders.get(batch.schema) or self._encoders.setdefault(batch.schema, Encoder(batch.schema))
        parts, size = encoder.encode(batch)
        message = b"".join(parts)
        file = self._room(aligned(HEADER_BYTES + size), encoder)
        if encoder.schema_id not in file.schemas:
            self._write(file, SCHEMA, encoder.schema_message, encoder.schema_id, 0)
            file.schemas.add(encoder.schema_id)
        frame = self._write(file, BATCH, message, encoder.schema_id, len(batch))
        file.open_frames.add(frame)
        self._unsynced.add(file.number)
        self._disk.hurt.discard(frame)
        self._disk.flipped.discard(frame)
        self._disk.written[frame] = xxhash.xxh3_64_intdigest(message)
        if file.flipped and not self._disk.whole(frame):  # the bit was one of its schema
            self._disk.hurt.add(frame)
            self._disk.flipped.add(frame)
        self.die("after a frame is written", 0.002)
        if self._durable:
            try:
                self.sync()
            except OSError:
                self.settle(frame)
                raise
        return frame

    def sync(self) -> None:
        for number in sorted(self._unsynced):
            file = self._mine[number]
            self.die("before a frame is synced", 0.002)
            if self._world.fault("sync fails", "frame", 0.003):
                self._failed = True
                file.lose()
                raise OSError(errno.EIO, "the disk is gone")
            file.sync()
            file.named = True
        self._unsynced.clear()

    def settle(self, frame: int) -> None:
        file = self._mine.get(segment_of(frame))
        if file is not None:
            file.open_frames.discard(frame)

    def read(self, columns: Mapping[str, pa.DataType], frames: np.ndarray, offsets: np.ndarray) -> list[pa.Array]:
        return gather(self.batch, columns, frames, offsets)

    def batch(self, frame: int) -> pa.RecordBatch:
        return self._disk.parse(frame)

    def forget(self, segment: int) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        for file in self._mine.values():
            file.sealed = True
            file.open_frames.clear()

    def die(self, point: str, probability: float) -> None:
        if self._world.fault("client killed", point, probability):
            self._process.dead = True
            raise Killed

    def _room(self, needed: int, encoder: Encoder) -> SegmentFile:
        current = self._current
        needed += aligned(HEADER_BYTES + len(encoder.schema_message))
        if current is not None and len(current.data) + needed <= current.size and not current.sealed:
            return current
        while True:
            number = self._allocate()
            if number not in self._disk.files:
                break
        if self._process.dead:
            raise Killed
        if self._world.fault("disk full", "new segment", 0.01):
            self._disk.full_until = self._world.now + self._world.chance.uniform(0.2, 2.0)
        if self._world.now < self._disk.full_until and not self._world.calm:
            raise OSError(errno.ENOSPC, "no space left on the device")
        if current is not None:
            current.sealed = True
        file = self._current = self._mine[number] = SegmentFile(number, self._process, max(SEGMENT_BYTES, needed))
        self._disk.files[number] = file
        return file

    def _write(self, file: SegmentFile, kind: int, message: bytes, schema: int, rows: int) -> int:
        header = Header(kind, len(message), file.number, len(file.data), schema, rows, self.checksum(message))
        whole = header.pack() + message
        whole += bytes(header.end - header.offset - len(whole))
        if self._world.fault("torn write", "frame", 0.002):
            file.data += whole[: self._world.chance.randrange(len(whole))]
            file.sealed, self._current = True, None
            if self._world.chance.random() < 0.5:
                self._process.dead = True
                raise Killed
            raise OSError(errno.ENOSPC, "no space left on the device")
        file.data += whole
        return header.frame

    @staticmethod
    def checksum(message: bytes) -> int:
        return int(xxhash.xxh3_64_intdigest(message))
