"""The ledger as a file: what `power` promises, and how events are written."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncflow.errors import LedgerError
from asyncflow.store.events import PLAIN, Acked, Committed, Leased, Opened, Returned, Served, from_json
from asyncflow.store.journal import CHECKPOINT_BYTES, PAGE, Journal, LedgerReader, read_ledger

TERMS = Opened(train_batch_size=4, num_generations=2, max_staleness=1, last_version=None, min_group=1, max_attempts=3)
SOON = 10.0


class Disk:
    """An fdatasync that waits until it may go on, and fails when it is told to."""

    def __init__(self) -> None:
        self.calls = 0
        self.begun = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.broken = False

    def __call__(self, descriptor: int) -> None:
        self.calls += 1
        self.begun.release()
        assert self.go.acquire(timeout=SOON)
        if self.broken:
            raise OSError(errno.EIO, "the disk is gone")


@pytest.fixture
def disk() -> Disk:
    return Disk()


def journal(folder: Path, fdatasync: Callable[[int], None]) -> Journal:
    return Journal.create(folder / "ledger.sqlite", TERMS, 0.0, fdatasync=fdatasync)


def event(number: int) -> Served:
    return Served(engine=f"engine {number}", version=0)


class Waiter:
    """A thread that waits for an lsn to be synced."""

    def __init__(self, log: Journal, lsn: int) -> None:
        self.error: LedgerError | None = None
        self.answered = threading.Event()
        self._log, self._lsn = log, lsn
        self.thread = threading.Thread(target=self._wait)
        self.thread.start()

    def _wait(self) -> None:
        try:
            self._log.sync_to(self._lsn)
        except LedgerError as error:
            self.error = error
        self.answered.set()

    def end(self) -> None:
        self.thread.join(SOON)
        assert not self.thread.is_alive()


def test_the_answer_does_not_come_before_the_sync(tmp_path: Path, disk: Disk) -> None:
    log = journal(tmp_path, disk)
    lsn = log.append([event(1)], 0.0)
    waiter = Waiter(log, lsn)

    assert disk.begun.acquire(timeout=SOON)
    assert not waiter.answered.wait(0.05)
    assert log.synced < lsn
    disk.go.release()
    waiter.end()

    assert waiter.error is None
    assert log.synced == lsn
    log.close()


def test_what_is_appended_while_a_sync_is_under_way_waits_for_the_next_one_which_serves_all(
    tmp_path: Path, disk: Disk
) -> None:
    log = journal(tmp_path, disk)
    first = Waiter(log, log.append([event(0)], 0.0))
    assert disk.begun.acquire(timeout=SOON)  # it has begun, and may have missed what comes now
    others = [Waiter(log, log.append([event(number)], 0.0)) for number in range(1, 9)]

    disk.go.release()
    first.end()
    assert disk.begun.acquire(timeout=SOON)
    assert not any(waiter.answered.is_set() for waiter in others)
    disk.go.release()
    for waiter in others:
        waiter.end()

    assert disk.calls == 2
    assert all(waiter.error is None for waiter in others)
    log.sync_to(log.lsn)  # it is on disk already: no third one
    assert disk.calls == 2
    log.close()


def test_a_failed_sync_is_the_end_for_everybody_and_is_not_tried_again(tmp_path: Path, disk: Disk) -> None:
    log = journal(tmp_path, disk)
    disk.go.release()
    log.sync_to(safe := log.append([event(0)], 0.0))
    assert disk.begun.acquire(timeout=SOON)
    leader = Waiter(log, log.append([event(1)], 0.0))
    assert disk.begun.acquire(timeout=SOON)
    follower = Waiter(log, log.append([event(2)], 0.0))
    disk.broken = True
    disk.go.release()
    leader.end()
    follower.end()
    disk.broken = False

    for error in (leader.error, follower.error):
        assert error is not None
        assert "cannot be synced" in str(error)
    with pytest.raises(LedgerError, match="cannot be synced"):
        log.append([event(3)], 0.0)
    with pytest.raises(LedgerError, match="cannot be synced"):
        log.sync_to(log.lsn)
    with pytest.raises(LedgerError, match="cannot be synced"):
        log.sync()
    log.sync_to(safe)  # what was on disk before still is
    assert disk.calls == 2
    log.close()


def test_what_is_synced_is_what_sqlite_reads(tmp_path: Path) -> None:
    """The descriptor is that of the log in use, also after it has been folded into the database and begins anew."""
    sizes: list[int] = []

    def look(descriptor: int) -> None:
        log = tmp_path / "ledger.sqlite-wal"
        assert os.fstat(descriptor).st_ino == log.stat().st_ino
        sizes.append(log.stat().st_size)

    log = journal(tmp_path, look)
    for number in range(200):
        log.sync_to(log.append([event(number)], 0.0))
        if number % 20 == 0:
            log.sync()
    log.close()

    assert max(sizes) < 200 * 4096  # it did begin anew
    assert [r.lsn for r in read_ledger(tmp_path / "ledger.sqlite")] == list(range(1, 202))


class Checkpoints:
    """Folds nothing; fails in the way that is set."""

    def __init__(self) -> None:
        self.error: int | None = None
        self.calls = 0

    def __call__(self, db: sqlite3.Connection) -> None:
        self.calls += 1
        if self.error is not None:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = self.error
            raise error


def test_only_the_journal_folds_the_log_and_what_fails_there_is_the_end(tmp_path: Path) -> None:
    """SQLite's own checkpoints would keep a failed sync of the database to themselves, and try again."""
    checkpoints = Checkpoints()
    journal(tmp_path, lambda _: None).close()
    log = Journal(tmp_path / "ledger.sqlite", checkpoint=checkpoints)

    def append_until(calls: int) -> None:
        for number in range(CHECKPOINT_BYTES // PAGE):
            log.append([event(number)], 0.0)
            if checkpoints.calls == calls:
                return

    append_until(1)
    # SQLite folds after 1000 pages, if it is not told.
    assert (tmp_path / "ledger.sqlite-wal").stat().st_size > 5000 * PAGE

    checkpoints.error = sqlite3.SQLITE_FULL  # a full disk breaks no promise: it is tried again
    append_until(2)
    checkpoints.error = sqlite3.SQLITE_IOERR | (4 << 8)  # SQLITE_IOERR_FSYNC
    append_until(3)
    written = log.lsn  # this one was, and says so
    with pytest.raises(LedgerError, match="cannot be synced"):
        log.append([event(0)], 0.0)
    with pytest.raises(LedgerError, match="cannot be synced"):
        log.sync_to(written)
    assert checkpoints.calls == 3
    log.close()
    assert [r.lsn for r in read_ledger(tmp_path / "ledger.sqlite")] == list(range(1, written + 1))


def test_after_close_nothing_is_recorded(tmp_path: Path) -> None:
    log = journal(tmp_path, lambda _: None)
    log.close()
    log.close()

    with pytest.raises(LedgerError, match="closed"):
        log.append([event(0)], 0.0)
    with pytest.raises(LedgerError, match="closed"):
        log.sync_to(1)


def test_a_reopened_ledger_goes_on_where_it_was(tmp_path: Path) -> None:
    log = journal(tmp_path, lambda _: None)
    log.append([event(0), event(1)], 1.0)
    log.close()

    again = Journal(tmp_path / "ledger.sqlite")
    assert again.lsn == 3
    assert again.append([event(2)], 2.0) == 4
    again.close()

    with LedgerReader(tmp_path / "ledger.sqlite") as ledger:
        assert [r.lsn for r in ledger.records(after=1, until=3)] == [2, 3]
        assert ledger.last == 4


# -- how events are written --------------------------------------------------------------------------------------------

IDS = st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(1, 200)), max_size=6).map(
    lambda runs: tuple(first + offset for first, count in runs for offset in range(count))
)
VERSIONS = st.lists(st.tuples(st.none() | st.integers(0, 1 << 50), st.integers(1, 200)), max_size=6).map(
    lambda runs: tuple(value for value, times in runs for _ in range(times))
)


@given(rows=IDS, tokens=IDS, oldest=VERSIONS, newest=VERSIONS)
def test_an_event_reads_as_it_was_written(
    rows: tuple[int, ...],
    tokens: tuple[int, ...],
    oldest: tuple[int | None, ...],
    newest: tuple[int | None, ...],
) -> None:
    for event in (
        Acked(lease_id=1, rows=rows, columns=3, frame=9, tokens=tokens, oldest=oldest, newest=newest),
        Committed(trained=rows, skipped=tokens, version=4),
        Returned(lease_id=1, rows=rows, reason="[[1,2],[3,4]]"),
    ):
        assert from_json(event.kind, event.to_json()) == event


def test_many_ids_take_little_room_and_few_are_written_plainly() -> None:
    many = Leased(lease_id=1, stage="s", worker="w", rows=(5, *range(100, 1100)), deadline=1.0)
    few = Leased(lease_id=1, stage="s", worker="w", rows=tuple(range(PLAIN)), deadline=1.0)

    assert json.loads(many.to_json())["rows"] == [5, [100, 1099]]
    assert json.loads(few.to_json())["rows"] == list(range(PLAIN))


@pytest.mark.parametrize(
    "rows", ["[[1]]", "[[1,2,3]]", "[[5,3]]", "[[0,99999999999]]", '[["a",3]]', "[[1,null]]", "[[]]"]
)
def test_runs_that_make_no_sense_are_refused(rows: str) -> None:
    with pytest.raises(LedgerError, match="cannot be read"):
        from_json("returned", f'{{"lease_id":1,"rows":{rows},"reason":"x"}}')
