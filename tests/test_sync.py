"""What survives a power cut is what was said to: in corners that the simulation has found."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pytest

from asyncflow.clock import ManualClock
from asyncflow.errors import LedgerError
from asyncflow.store.account import Account
from asyncflow.store.broker import Broker
from asyncflow.store.events import Opened
from asyncflow.store.frames import HEADER_BYTES, OFFSET_BITS
from asyncflow.store.journal import Journal
from asyncflow.store.memory_frames import MemoryFrames
from asyncflow.store.schema import Schema
from asyncflow.store.segments import SegmentReader, SegmentWriter, segment_path
from asyncflow.store.table import Table
from tests.test_table_model import REWARD, ROLLOUT, TRAIN

SCHEMA = Schema([ROLLOUT, REWARD, TRAIN])
TERMS = Opened(train_batch_size=1, num_generations=1, max_staleness=1, last_version=None, min_group=1, max_attempts=3)


class Disk(MemoryFrames):
    """Two segments of an earlier process, and syncs that can fail."""

    def __init__(self) -> None:
        super().__init__()
        self.synced: list[list[int]] = []
        self.broken = False

    def present(self) -> dict[int, int]:
        return {1: 64, 2: 64}

    def sync(self, numbers: Iterable[int] = ()) -> None:
        self.synced.append(list(numbers))
        if self.broken:
            raise OSError(errno.EIO, "the disk is gone")


def test_what_an_earlier_process_has_written_is_not_taken_for_synced() -> None:
    account = Account(Disk(), {2 << OFFSET_BITS: 3})

    assert account.unsynced() == {2: 3}
    account.synced({2: 3})
    assert account.unsynced() == {}


def test_a_frame_that_comes_while_its_segment_is_synced_waits_for_the_next_sync() -> None:
    account = Account(Disk(), {2 << OFFSET_BITS: 3})
    under_way = account.unsynced()

    account.hold(2 << OFFSET_BITS | 64, 1)
    account.synced(under_way)

    assert account.unsynced() == {2: 4}


def test_a_sync_that_failed_is_not_forgotten_by_the_next_one(tmp_path: Path) -> None:
    disk = Disk()
    journal = Journal.create(tmp_path / "ledger.sqlite", TERMS, 0.0)
    broker = Broker(Table(SCHEMA, TERMS), journal, Account(disk, {2 << OFFSET_BITS: 1}), disk, clock=ManualClock())
    disk.broken = True
    with pytest.raises(LedgerError, match="start the machine again"):
        broker.sync()

    disk.broken = False
    with pytest.raises(LedgerError, match="start the machine again"):
        broker.sync()

    assert disk.synced == [[2]]
    broker.close()


def test_a_damaged_header_costs_no_frame_of_another_schema_behind_it(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, lambda: 1)
    first = writer.append(pa.record_batch({"a": [1, 2]}))
    second = writer.append(pa.record_batch({"b": ["x", "y"]}))
    writer.close()
    path = segment_path(tmp_path, 1)
    content = bytearray(path.read_bytes())
    content[(first & ((1 << OFFSET_BITS) - 1)) + HEADER_BYTES // 2] ^= 1
    path.write_bytes(content)

    assert SegmentReader(tmp_path).batch(second).to_pydict() == {"b": ["x", "y"]}
