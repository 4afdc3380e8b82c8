"""Does everything on disk hold together: the ledger, its snapshot, and all data that some sample still needs?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from asyncflow.errors import DamagedData, LedgerError
from asyncflow.rundir import DATA
from asyncflow.store.frames import BATCH, Header, headers_of, message_of, read_batch, read_schema
from asyncflow.store.home import LOCK, ledger_of
from asyncflow.store.journal import LedgerReader
from asyncflow.store.recovery import apply_all
from asyncflow.store.replay import digest, table_at
from asyncflow.store.rows import NONE, Ids
from asyncflow.store.segments import SegmentReader, has_writer, segment_path
from asyncflow.store.snapshot import Unusable, read_snapshot, snapshot_path
from asyncflow.store.table import Table


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was looked at, and all that is wrong."""

    events: int
    snapshot: str
    """`right`, `none`, or why it is of no use; then it is not used, and nothing is lost."""
    segments: int
    frames: int
    """That were read whole."""
    needed: int
    """Frames that some sample needs."""
    samples: int
    """That need some."""
    torn: int
    """Frames that are not whole and that nobody needs: whoever wrote them was killed."""
    faults: tuple[str, ...]
    """One sentence for each thing that is wrong."""
    hit: tuple[int, ...]
    """Samples of which something is damaged or missing, ascending."""

    @property
    def ok(self) -> bool:
        return not self.faults


def verify(home: Path) -> Verified:
    """Read everything in a store's directory, or a run's, also while it is served; not what is in a server's memory.

    Raises LedgerError when there is no ledger, or none that can be read to its end."""
    ledger = ledger_of(home)
    table, lsn = table_at(ledger)
    faults: list[str] = []
    snapshot = _snapshot(ledger, faults)
    folder = home / DATA
    whole, torn = 0, list[int]()
    segments = _present(folder)
    for number in segments:
        for frame, right in _frames(folder, number):
            whole += right
            torn += [] if right else [frame]
    needed = table.frames()
    bad = {}
    if folder.is_dir():
        bad = _bad_frames(table, folder)
    elif needed and not has_writer(home / LOCK):
        faults.append(f"the data of {len(_alive(table))} samples are not in {folder}: they are in memory, and are gone")
    hit = _hit(table, bad)
    if bad:  # some may have ended since, and their data with them
        later, _ = table_at(ledger)
        hit = np.intersect1d(hit, _hit(later, bad))
        faults += [why for frame, why in bad.items() if frame in later.frames()]
    return Verified(
        events=lsn,
        snapshot=snapshot,
        segments=len(segments),
        frames=whole,
        needed=len(needed),
        samples=len(_alive(table)),
        torn=len(set(torn) - bad.keys()),
        faults=tuple(faults),
        hit=tuple(hit.tolist()),
    )


def _present(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in folder.glob("*.segment") if path.stem.isdigit())


def _alive(table: Table) -> Ids:
    return table.rows.alive()


def _snapshot(ledger: Path, faults: list[str]) -> str:
    with LedgerReader(ledger) as reader:
        try:
            found = read_snapshot(reader.schema, reader)
            table = Table.load(reader.schema, found.image, found.arrays)
        except FileNotFoundError:
            return "none"
        except (Unusable, OSError, LedgerError, LookupError, TypeError, ValueError) as error:
            return str(error)
        if digest(table) != digest(table_at(ledger, found.lsn)[0]):
            faults.append(f"{snapshot_path(ledger)} is not what the events up to {found.lsn} make: remove it")
            return "wrong"
        apply_all(table, reader, reader.records(after=found.lsn))
    return "right"


def _frames(folder: Path, number: int) -> Iterator[tuple[int, bool]]:
    """Each frame of a segment, and whether it is whole."""
    try:
        data = segment_path(folder, number).read_bytes()
    except FileNotFoundError:
        return
    schemas: dict[int, pa.Schema] = {}
    for header in headers_of(data, number):
        yield header.frame, _is_whole(data, header, schemas)


def _is_whole(data: bytes, header: Header, schemas: dict[int, pa.Schema]) -> bool:
    try:
        message = message_of(data, header)
        if header.kind == BATCH:
            return len(read_batch(message, schemas[header.schema])) == header.rows
        schemas[header.schema] = read_schema(message)
    except (LookupError, ValueError, pa.ArrowException):
        return False
    return True


def _bad_frames(table: Table, folder: Path) -> dict[int, str]:
    """Frames that some sample needs and that cannot be read, or do not have what it needs of them → why."""
    reader, bad = SegmentReader(folder), dict[int, str]()
    ids = _alive(table)
    for line, columns in _lines(table):
        frames, offsets = table.rows.frame[line, ids - table.rows.base], table.rows.offset[line, ids - table.rows.base]
        types = {name: table.schema.columns[name] for name in columns}
        for frame in np.unique(frames[frames != NONE]).tolist():
            rows = np.unique(offsets[frames == frame])
            try:
                reader.read(types, np.full(len(rows), frame, np.int64), rows)
            except DamagedData as damage:
                bad[frame] = str(damage)
    reader.close()
    return bad


def _lines(table: Table) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line of the frames → the columns that are there."""
    yield 0, table.schema.prompt_columns
    for line, stage in enumerate(table.schema.stages.values(), start=1):
        if stage.writes:
            yield line, stage.writes


def _hit(table: Table, bad: dict[int, str]) -> Ids:
    ids = _alive(table)
    return ids[np.isin(table.rows.frame[:, ids - table.rows.base], list(bad)).any(axis=0)]
