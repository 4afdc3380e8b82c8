"""The ledger: every decision of the table, in order, in one append-only SQLite table.

    events(lsn INTEGER PRIMARY KEY, at REAL, kind TEXT, body TEXT)     body: JSON, see `events`
    meta(key TEXT PRIMARY KEY, value TEXT)                             format: version of this layout

Anything that can read SQLite can read it. WAL with `synchronous=NORMAL`: a decision that was acknowledged survives
`kill -9` of every process, not a power cut (https://www.sqlite.org/pragma.html#pragma_synchronous).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from asyncflow.errors import LedgerError
from asyncflow.store.events import Event, from_json

FORMAT = 1
_INSERT = "INSERT INTO events(at, kind, body) VALUES (?, ?, ?)"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of the ledger."""

    lsn: int
    """Position, from 1, without gaps."""
    at: float
    """Wall clock, seconds since the epoch."""
    event: Event


class Journal:
    """Writes a ledger. Not thread-safe: the broker holds its lock. Only one process writes to a ledger."""

    def __init__(self, path: Path) -> None:
        """Go on with a ledger. Raises LedgerError when there is none, or it cannot be opened."""
        if not path.is_file():
            raise LedgerError(f"there is no ledger {path}: name a run directory")
        self._path = path
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
        except sqlite3.Error as error:
            raise LedgerError(f"{path} cannot be opened ({error}): see that it can be written") from None

    @classmethod
    def create(cls, path: Path, first: Event, at: float) -> Self:
        """Make a ledger that begins with this event. It is there as a whole or not at all, whatever interrupts this.

        Raises LedgerError when it exists already or cannot be made.
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
                db.execute(_INSERT, (at, first.kind, first.to_json()))
            aside.rename(path)
        except (sqlite3.Error, OSError) as error:
            raise LedgerError(f"{path} cannot be made ({error}): name a directory that can be written") from None
        return cls(path)

    def append(self, events: Sequence[Event], at: float) -> None:
        """Write the decisions of one operation, all or none. Raises LedgerError when they cannot be written."""
        lines = [(at, event.kind, event.to_json()) for event in events if event.journaled]
        try:
            if len(lines) == 1:
                self._db.execute(_INSERT, lines[0])
            elif lines:
                self._write_together(lines)
        except sqlite3.Error as error:
            raise LedgerError(
                f"{self._path} cannot be written ({error}), so what was to be recorded did not happen: "
                "see that its disk has room and that nothing else writes to it, then start again"
            ) from error

    def _write_together(self, lines: Sequence[tuple[float, str, str]]) -> None:
        self._db.execute("BEGIN")
        try:
            self._db.executemany(_INSERT, lines)
            self._db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # SQLite has rolled back already when the disk is full
                self._db.execute("ROLLBACK")
            raise

    @property
    def lsn(self) -> int:
        """Of the last event."""
        (lsn,) = self._db.execute("SELECT coalesce(max(lsn), 0) FROM events").fetchone()
        return int(lsn)

    def sync(self) -> None:
        """See that everything written so far survives a power cut. Raises LedgerError.

        In any thread, also while others write: a passive checkpoint on a connection of its own syncs the log and waits
        for nobody (https://www.sqlite.org/c3ref/wal_checkpoint_v2.html).
        """
        try:
            with closing(sqlite3.connect(self._path)) as db:
                db.execute("PRAGMA wal_checkpoint(PASSIVE)")
        except sqlite3.Error as error:
            raise LedgerError(f"{self._path} cannot be synced ({error}): see that its disk works") from error

    def close(self) -> None:
        """Fold the write-ahead log into the file and close it. May be called twice.

        The file then needs no log any more, so that reading it leaves nothing beside it. While somebody reads it, it
        stays as it is, which is as good.
        """
        with suppress(sqlite3.Error):
            self._db.execute("PRAGMA busy_timeout=0")
            self._db.execute("PRAGMA journal_mode=DELETE")
        self._db.close()


def read_ledger(path: Path) -> Iterator[Record]:
    """All records in order. Raises LedgerError when the file is missing, newer, has gaps, or is no ledger."""
    if not path.is_file():
        raise LedgerError(f"there is no ledger {path}: name a run directory")
    db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
    try:
        (version,) = db.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()
        if int(version) != FORMAT:
            raise LedgerError(
                f"{path} has ledger format {version}, this program reads {FORMAT}: use the matching release"
            )
        lines = db.execute("SELECT lsn, at, kind, body FROM events ORDER BY lsn")
        for expected, (lsn, at, kind, body) in enumerate(lines, start=1):
            if lsn != expected:
                raise LedgerError(f"{path} has a gap: event {expected} is missing")
            yield Record(lsn=lsn, at=at, event=from_json(kind, body))
    except (sqlite3.DatabaseError, TypeError, ValueError) as error:
        raise LedgerError(f"{path} cannot be read as a ledger: {error}") from None
    finally:
        db.close()
