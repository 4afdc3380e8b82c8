"""The ledger: every decision of the table, in order, in one append-only SQLite table. `docs/ledger.md` describes it.

    events(lsn INTEGER PRIMARY KEY, at REAL, kind TEXT, body TEXT)     body: JSON, see `events`
    meta(key TEXT PRIMARY KEY, value TEXT)                             format: of this layout; schema: of the run

Anything that can read SQLite can read it. It is in WAL mode with `synchronous=NORMAL`, so an append is a write that
nobody syncs: it survives `kill -9` of every process, not a power cut. `sync_to` makes it survive that as well, and many
who wait for it share one fdatasync of the log. SQLite's authors name this way to make committed transactions durable
(https://sqlite.org/forum/forumpost/d1a6bc7c4cd2baca, point 3). Why it is enough:

- A transaction is committed when its frames, of which the last is marked, are in the log
  (https://www.sqlite.org/wal.html#how_wal_works); recovery takes every frame up to the last whole commit
  (https://www.sqlite.org/fileformat2.html#walformat). So once the log is synced, what was committed before is durable.
- The log begins anew only when all of it is in the database, and with NORMAL a checkpoint syncs the log before it
  writes there, the database after that, and the new beginning of the log
  (https://www.sqlite.org/pragma.html#pragma_synchronous). So what is not in the log any more is in a synced database.
- The log is the same file as long as some connection is open, so its descriptor stays right. SQLite puts no locks on
  it, so that closing ours releases none (https://www.sqlite.org/howtocorrupt.html#posix_close_bug has the danger).
- The database is written and synced aside and then renamed. The folder is synced after that, and again when the log has
  been made.

After a sync that failed nobody knows what is on disk, and Linux reports it once: the journal refuses everything from
then on, and tries nothing again (https://wiki.postgresql.org/wiki/Fsync_Errors). SQLite's automatic checkpoints are off
for that: they keep their errors to themselves, and try again (https://www.sqlite.org/c3ref/wal_autocheckpoint.html).
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

from asyncflow.errors import ConfigError, LedgerError
from asyncflow.store.events import Event, Opened, from_json
from asyncflow.store.schema import Schema

Durability = Literal["memory", "process", "power"]
"""What survives: nothing of the samples' data; `kill -9` of every process; a power cut. The ledger is kept in any case,
so that every sample is accounted for."""

FORMAT: Final = 2
CHECKPOINT_BYTES: Final = 32 << 20
"""Of events since the log was last folded into the database, after which the appending thread does so."""
PAGE: Final = 4096
"""What a transaction adds to the log at least."""
_INSERT = "INSERT INTO events(lsn, at, kind, body) VALUES (?, ?, ?, ?)"
_LINE = "SELECT at, kind, body FROM events WHERE lsn = ?"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of the ledger."""

    lsn: int
    """Position, from 1, without gaps."""
    at: float
    """Wall clock, seconds since the epoch."""
    event: Event


def _checkpoint(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA wal_checkpoint(PASSIVE)")


class Journal:
    """Writes a ledger. Only one process writes to a ledger.

    `append` is for one thread at a time: the broker holds its lock. All others may be called in any thread.
    """

    def __init__(
        self,
        path: Path,
        *,
        fdatasync: Callable[[int], None] = os.fdatasync,
        checkpoint: Callable[[sqlite3.Connection], None] = _checkpoint,
    ) -> None:
        """Go on with a ledger. Raises LedgerError when there is none, or it cannot be opened.

        `fdatasync` makes the content of a descriptor durable or raises OSError, `checkpoint` folds the log into the
        database or raises sqlite3.Error: tests give others.
        """
        if not path.is_file():
            raise LedgerError(f"there is no ledger {path}: name a run directory")
        self.path = path
        self._fdatasync = fdatasync
        self._checkpoint = checkpoint
        self._unfolded = 0
        """About how many bytes were appended since the last checkpoint."""
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("PRAGMA wal_autocheckpoint=0")
            (lsn,) = self._db.execute("SELECT coalesce(max(lsn), 0) FROM events").fetchone()
            self.lsn: int = lsn
            """Of the last event that was appended."""
            self._db.execute("UPDATE meta SET value = value WHERE key = 'format'")  # makes the log, if there is none
            self._log = os.open(f"{path}-wal", os.O_RDWR)
            _sync_folder(path.parent)
        except (sqlite3.Error, OSError) as error:
            raise LedgerError(f"{path} cannot be opened ({error}): see that it can be written") from None
        self._failed: LedgerError | None = None
        self._synced = 0
        """Everything up to this lsn survives a power cut."""
        self._turn = threading.Condition()
        self._leading = False
        """Some thread syncs the log for all who wait."""

    @classmethod
    def create(
        cls,
        path: Path,
        first: Event,
        at: float,
        schema: Schema | None = None,
        *,
        fdatasync: Callable[[int], None] = os.fdatasync,
    ) -> Self:
        """Make a ledger that begins with this event. It is there as a whole or not at all, whatever interrupts this.

        `schema`: kept with it, so that a replay needs nothing else. Raises LedgerError when the ledger exists already
        or cannot be made.
        """
        if path.exists():
            raise LedgerError(f"{path} exists already: start a run in a new directory")
        aside = path.with_name(f"{path.name}.part")
        try:
            aside.unlink(missing_ok=True)
            with closing(sqlite3.connect(aside, isolation_level=None)) as db:
                db.execute(
                    "CREATE TABLE events"
                    "(lsn INTEGER PRIMARY KEY, at REAL NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL)"
                )
                db.execute("CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL)")
                db.execute("INSERT INTO meta VALUES ('format', ?)", (str(FORMAT),))
                if schema is not None:
                    db.execute("INSERT INTO meta VALUES ('schema', ?)", (schema.to_json(),))
                db.execute(_INSERT, (1, at, first.kind, first.to_json()))
            aside.rename(path)
        except (sqlite3.Error, OSError) as error:
            raise LedgerError(f"{path} cannot be made ({error}): name a directory that can be written") from None
        return cls(path, fdatasync=fdatasync)

    def append(self, events: Sequence[Event], at: float) -> int:
        """Write the decisions of one operation, all or none, and return the lsn of the last one.

        They survive a power cut when `sync_to` of this lsn has returned. Raises LedgerError when they cannot be
        written.
        """
        if self._failed is not None:
            raise LedgerError(str(self._failed)) from self._failed
        lines = [
            (lsn, at, event.kind, event.to_json())
            for lsn, event in enumerate((event for event in events if event.journaled), start=self.lsn + 1)
        ]
        try:
            if len(lines) == 1:
                self._db.execute(_INSERT, lines[0])
            elif lines:
                self._write_together(lines)
        except sqlite3.Error as error:
            raise LedgerError(
                f"{self.path} cannot be written ({error}), so what was to be recorded did not happen: "
                "see that its disk has room and that nothing else writes to it, then start again"
            ) from error
        self.lsn += len(lines)
        self._unfolded += PAGE + sum(len(body) for *_, body in lines)
        if self._unfolded >= CHECKPOINT_BYTES:
            with suppress(LedgerError):  # these events are written: whoever comes next hears of it
                self._fold()
        return self.lsn

    def _write_together(self, lines: Sequence[tuple[int, float, str, str]]) -> None:
        self._db.execute("BEGIN")
        try:
            self._db.executemany(_INSERT, lines)
            self._db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # SQLite has rolled back already when the disk is full
                self._db.execute("ROLLBACK")
            raise

    def sync_to(self, lsn: int) -> None:
        """Return when everything up to `lsn`, which has been appended, survives a power cut. Raises LedgerError.

        Not under the broker's lock: one of those who wait syncs the log, with what the others append meanwhile, so that
        a sync serves as many as came while the one before it was under way.
        """
        with self._turn:
            while self._failed is None and self._synced < lsn and self._leading:
                self._turn.wait()
            if self._synced >= lsn:
                return
            if self._failed is not None:
                raise LedgerError(str(self._failed)) from self._failed
            self._leading = True
        reached = self.lsn  # before the sync: what is appended while it is under way may have missed it
        failed: LedgerError | None = None
        try:
            self._fdatasync(self._log)
        except OSError as error:
            failed = LedgerError(
                f"{self.path} cannot be synced ({error}), so nobody knows what of it is on disk, and nothing more is "
                "recorded: see that its disk works, then start again"
            )
            failed.__cause__ = error
        finally:
            with self._turn:
                self._leading = False
                if failed is not None:
                    self._failed = failed
                else:
                    self._synced = max(self._synced, reached)
                self._turn.notify_all()
        if failed is not None:
            raise failed

    @property
    def synced(self) -> int:
        """Everything up to this lsn is known to survive a power cut."""
        return self._synced

    def sync(self) -> None:
        """See that everything written so far survives a power cut, and fold the log into the database as far as it
        goes, which waits for nobody. Raises LedgerError.

        A passive checkpoint on a connection of its own (https://www.sqlite.org/c3ref/wal_checkpoint_v2.html).
        """
        self.sync_to(self.lsn)
        self._fold()

    def _fold(self) -> None:
        self._unfolded = 0
        try:
            with closing(sqlite3.connect(self.path)) as db:
                self._checkpoint(db)
        except sqlite3.Error as error:
            failure = LedgerError(f"{self.path} cannot be synced ({error}): see that its disk works")
            failure.__cause__ = error
            if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_IOERR:
                with self._turn:
                    self._failed = failure
            raise failure from error

    def close(self) -> None:
        """Fold the write-ahead log into the file and close it. May be called twice.

        The file then needs no log any more, so that reading it leaves nothing beside it. While somebody reads it, it
        stays as it is, which is as good.
        """
        with self._turn:
            while self._leading:
                self._turn.wait()
            if self._failed is None:
                self._failed = LedgerError(f"{self.path} is closed")
            if self._log >= 0:
                os.close(self._log)
                self._log = -1
        with suppress(sqlite3.Error):
            self._db.execute("PRAGMA busy_timeout=0")
            self._db.execute("PRAGMA journal_mode=DELETE")
        self._db.close()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LedgerReader:
    """Reads a ledger, also while another process writes to it. A context manager."""

    def __init__(self, path: Path) -> None:
        """Raises LedgerError when the file is missing, newer, or is no ledger."""
        if not path.is_file():
            raise LedgerError(f"there is no ledger {path}: name a run directory")
        self.path = path
        self._db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        try:
            version = self._meta("format")
            if version is None or not version.isdecimal():
                raise LedgerError(f"{path} cannot be read as a ledger: it does not say its format")
            if int(version) != FORMAT:
                raise LedgerError(
                    f"{path} has ledger format {version}, this program reads {FORMAT}: use the matching release"
                )
        except LedgerError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    def _meta(self, key: str) -> str | None:
        found = next(self._rows("SELECT value FROM meta WHERE key = ?", key), None)
        return None if found is None else str(found[0])

    @property
    def schema(self) -> Schema:
        """Of the run. Raises LedgerError when the ledger does not have it."""
        text = self._meta("schema")
        if text is None:
            raise LedgerError(f"{self.path} does not say what the stages of its run were")
        try:
            return Schema.from_json(text)
        except ConfigError as error:
            raise LedgerError(f"{self.path}: the stages of its run cannot be read: {error}") from None

    @property
    def last(self) -> int:
        """Highest lsn."""
        (lsn,) = next(self._rows("SELECT coalesce(max(lsn), 0) FROM events"))
        return int(lsn)

    def line(self, lsn: int) -> tuple[float, str, str] | None:
        """`at`, `kind` and `body` of one event as they are written; None: there is no such event."""
        at, kind, body = next(self._rows(_LINE, lsn), (None, None, None))
        return None if at is None else (float(at), str(kind), str(body))

    def records(self, after: int = 0, until: int | None = None) -> Iterator[Record]:
        """Those after one lsn up to another one, in order. Raises LedgerError for gaps and for what cannot be read."""
        last = -1 if until is None else until
        lines = self._rows(
            "SELECT lsn, at, kind, body FROM events WHERE lsn > ? AND (? < 0 OR lsn <= ?) ORDER BY lsn",
            after,
            last,
            last,
        )
        for expected, (lsn, at, kind, body) in enumerate(lines, start=after + 1):
            if lsn != expected:
                raise LedgerError(f"{self.path} has a gap: event {expected} is missing")
            try:
                event = from_json(kind, body)
            except TypeError as error:
                raise LedgerError(f"{self.path} cannot be read as a ledger: {error}") from None
            yield Record(lsn=lsn, at=at, event=event)

    def terms(self) -> Opened:
        """The first event. Raises LedgerError when it is not there."""
        first = next(self.records(until=1), None)
        if first is None:
            raise LedgerError(f"{self.path} is empty: it holds no run")
        if not isinstance(first.event, Opened):
            raise LedgerError(f"{self.path} does not begin with the terms of a run: its beginning is lost")
        return first.event

    def _rows(self, statement: str, *values: object) -> Iterator[tuple[Any, ...]]:
        try:
            for row in self._db.execute(statement, values):  # noqa: UP028 (closing the cursor can come too late)
                yield row
        except sqlite3.DatabaseError as error:
            raise LedgerError(f"{self.path} cannot be read as a ledger: {error}") from None


def read_ledger(path: Path) -> Iterator[Record]:
    """All records in order. Raises LedgerError when the file is missing, newer, has gaps, or is no ledger."""
    with LedgerReader(path) as ledger:
        yield from ledger.records()
