"""Snapshots: the table at one lsn in a file beside the ledger, so that recovery need not apply every event.

    <ledger>.snapshot = header of 64 bytes | JSON | arrays, each at a multiple of 64 bytes from the beginning
    header = magic "AFSN" | format u16 | zeros u16 | lsn u64 | bytes of the JSON u64 | bytes in all u64
             | xxh3-64 of all that follows the header | xxh3-64 of the header before this | zeros

Numbers are little-endian. `docs/ledger.md` says what the JSON and the arrays mean. A snapshot is never needed: the
ledger has everything. It is written aside, synced and renamed, after the ledger has been synced up to its lsn, and it
names two lines of its ledger (the first one, and the one of its lsn). So one that is torn, of another run, of other
stages, or of a history that a power cut has taken back does not pass for this run's.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from asyncflow.errors import LedgerError, StoreError
from asyncflow.store.events import Event
from asyncflow.store.frames import aligned
from asyncflow.store.image import Image
from asyncflow.store.journal import Journal, LedgerReader
from asyncflow.store.schema import Schema
from asyncflow.store.segments import sync_file
from asyncflow.store.table import Table

_log = logging.getLogger(__name__)

FORMAT: Final = 1
MAGIC: Final = b"AFSN"
HEADER = struct.Struct("<4sHHQQQQ")
HEADER_BYTES: Final = 64
LEAST, MOST = 4096, 32768
"""Snapshots are so many events apart at least and at most: applying that many takes one or two seconds."""
ROWS_AN_EVENT: Final = 64
"""What one event costs to apply is doubled by so many samples."""

Arrays = Mapping[str, NDArray[Any]]


class Unusable(StoreError):
    """A snapshot that is not to be believed. The message says why."""


class _Array(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]
    offset: int


class _Contents(msgspec.Struct, forbid_unknown_fields=True):
    first: str
    """xxh3-64 of the ledger's first line."""
    last: str
    """… and of the line of the snapshot's lsn."""
    schema: str
    table: Image
    arrays: dict[str, _Array]


@dataclass(frozen=True, slots=True)
class Snapshot:
    lsn: int
    image: Image
    arrays: Arrays


def snapshot_path(ledger: Path) -> Path:
    return ledger.with_suffix(".snapshot")


# -- the file ----------------------------------------------------------------------------------------------------------


def write_snapshot(ledger: Path, lsn: int, table: Table) -> int:
    """Write the table, which all events up to `lsn` have made, and return how many bytes that took.

    The ledger must have been synced up to there. Raises OSError, LedgerError.
    """
    image, arrays = table.dump()
    with LedgerReader(ledger) as reader:
        first, last = _digest(reader, 1), _digest(reader, lsn)
    if first is None or last is None:
        raise LedgerError(f"{ledger} has no event {lsn} of which there could be a snapshot")
    places, end = {}, 0
    for name, array in arrays.items():
        places[name] = _Array(array.dtype.str, list(array.shape), end)
        end = aligned(end + array.nbytes)
    text = msgspec.json.encode(_Contents(first, last, table.schema.to_json(), image, places))
    text += b" " * (aligned(len(text)) - len(text))
    parts: list[bytes | memoryview] = [text]
    for array in arrays.values():
        parts += [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, bytes(-array.nbytes % HEADER_BYTES)]
    check = xxhash.xxh3_64()
    for part in parts:
        check.update(part)
    size = HEADER_BYTES + len(text) + end
    header = HEADER.pack(MAGIC, FORMAT, 0, lsn, len(text), size, check.intdigest())
    header += xxhash.xxh3_64_intdigest(header).to_bytes(8, "little")
    path = snapshot_path(ledger)
    aside = path.with_name(f"{path.name}.part")
    try:
        with aside.open("wb") as file:
            file.write(header.ljust(HEADER_BYTES, b"\0"))
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_file(path.parent)
    return size


def _digest(reader: LedgerReader, lsn: int) -> str | None:
    """Of one line of the ledger, with its time; None: it is not there."""
    line = reader.line(lsn)
    return None if line is None else xxhash.xxh3_64_hexdigest(msgspec.json.encode((lsn, *line)))


def _read_header(data: bytes) -> tuple[int, int, int, int]:
    """lsn, bytes of the JSON, bytes in all, checksum. Raises Unusable."""
    values = data[: HEADER.size]
    if len(data) < HEADER_BYTES or values[:4] != MAGIC:
        raise Unusable("it is no snapshot, or torn")
    if xxhash.xxh3_64_intdigest(values) != int.from_bytes(data[HEADER.size : HEADER.size + 8], "little"):
        raise Unusable("its header is damaged")
    _, version, _, lsn, text, size, check = HEADER.unpack(values)
    if version != FORMAT:
        raise Unusable(f"it has format {version}, this program reads {FORMAT}")
    return lsn, text, size, check


def read_snapshot(schema: Schema, ledger: LedgerReader) -> Snapshot:
    """The snapshot beside a ledger. Raises FileNotFoundError, Unusable and OSError."""
    data = snapshot_path(ledger.path).read_bytes()
    lsn, text, size, check = _read_header(data[:HEADER_BYTES])
    if len(data) != size:
        raise Unusable(f"it has {len(data)} of its {size} bytes")
    if xxhash.xxh3_64_intdigest(memoryview(data)[HEADER_BYTES:]) != check:
        raise Unusable("it does not have its checksum")
    begin = HEADER_BYTES + text
    try:
        contents = msgspec.json.decode(memoryview(data)[HEADER_BYTES:begin], type=_Contents)
        arrays = {
            name: np.frombuffer(data, a.dtype, int(np.prod(a.shape)), begin + a.offset).reshape(a.shape)
            for name, a in contents.arrays.items()
        }
    except (TypeError, ValueError) as error:
        raise Unusable(f"it cannot be read: {error}") from None
    if contents.schema != schema.to_json():
        raise Unusable("the run had other stages or columns then")
    if contents.first != _digest(ledger, 1):
        raise Unusable("it is of another run")
    last = _digest(ledger, lsn)
    if last is None:
        raise Unusable(f"it is of event {lsn}, and the ledger ends at {ledger.last}")
    if last != contents.last:
        raise Unusable(f"event {lsn} of the ledger is not the one after which it was made")
    return Snapshot(lsn, contents.table, arrays)


# -- when they are made ------------------------------------------------------------------------------------------------


class Snapshots:
    """Makes a snapshot whenever so much has happened since the last one that recovery would take long.

    Only the copy of the table's arrays is made by those who change it; a thread of its own writes them.
    """

    def __init__(self, ledger: Path, journal: Journal, *, least: int = LEAST, most: int = MOST) -> None:
        self._ledger, self._journal = ledger, journal
        self._least, self._most = least, most
        self._news = threading.Condition()
        self._next: tuple[int, Table] | None = None
        self._busy = self._closed = False
        self._since = max(0, journal.lsn - _last_lsn(ledger))
        """What it would cost to apply the events since the last one, in events of one sample."""
        self.made = 0
        """How many were written."""
        self._thread = threading.Thread(target=self._write, name="snapshots", daemon=True)
        self._thread.start()

    def count(self, table: Table, events: Sequence[Event]) -> None:
        """Tell that these events, all of an operation, have been journaled and applied. Under the broker's lock."""
        self._since += sum(1 + event.size // ROWS_AN_EVENT for event in events if event.journaled)
        if self._since < self._least or self._since < min(self._most, table.rows.end - table.rows.base):
            return
        with self._news:
            if self._busy or self._closed:
                return  # the disk is slow: the next one waits for it
            self._since, self._busy = 0, True
            self._next = self._journal.lsn, table.copy()
            self._news.notify()

    def close(self) -> None:
        """Wait for the one that is being written. May be called twice."""
        with self._news:
            self._closed = True
            self._news.notify()
        self._thread.join()

    def _write(self) -> None:
        while True:
            with self._news:
                while self._next is None and not self._closed:
                    self._news.wait()
                if self._next is None:
                    return
                lsn, table = self._next
                self._next = None
            try:
                self._journal.sync()
                write_snapshot(self._ledger, lsn, table)
                self.made += 1
            except (OSError, sqlite3.Error, LedgerError) as error:
                _log.warning("no snapshot of %s at event %d could be written: %s", self._ledger, lsn, error)
            finally:
                del table
                with self._news:
                    self._busy = False


def _last_lsn(ledger: Path) -> int:
    """Of the snapshot that is there; 0 without one."""
    try:
        with snapshot_path(ledger).open("rb") as file:
            return _read_header(file.read(HEADER_BYTES))[0]
    except (OSError, Unusable):
        return 0
