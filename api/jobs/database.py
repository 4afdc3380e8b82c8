"""Everything that the service has to remember: jobs with their events, who may call, and what was already answered.

One SQLite file, one connection, one transaction a call. What a method returned is on disk.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

from asyncflow_api.jobs.lifecycle import ENDED, State, check
from asyncflow_api.jobs.rows import EventRow, FileRow, JobRow, Level, NewJob, Once, Reason

from asyncflow.clock import Clock, SystemClock
from asyncflow.errors import AsyncFlowError, UserError

FORMAT: Final = 1
ANSWERS_KEPT: Final = 7 * 86400.0
"""Seconds for which an `Idempotency-Key` is remembered."""

SCHEMA: Final = """
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    state TEXT NOT NULL,
    reason TEXT,              -- JSON {code, message}
    priority INTEGER NOT NULL,
    labels TEXT NOT NULL,     -- JSON
    config TEXT NOT NULL,     -- JSON
    resolved TEXT,            -- JSON
    resume_from TEXT,
    max_staleness INTEGER,
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL,
    started_at REAL,
    finished_at REAL,
    revision INTEGER NOT NULL DEFAULT 1,
    starts INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX jobs_by_state ON jobs (state, priority DESC, seq);
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    job_id TEXT NOT NULL,
    n INTEGER NOT NULL,
    created_at REAL NOT NULL,
    type TEXT NOT NULL,
    level TEXT NOT NULL,
    message TEXT NOT NULL,
    data TEXT NOT NULL,       -- JSON
    UNIQUE (job_id, n)
);
CREATE TABLE answers (
    key TEXT NOT NULL,
    owner TEXT NOT NULL,
    digest TEXT NOT NULL,
    job_id TEXT NOT NULL,
    created_at REAL NOT NULL,
    PRIMARY KEY (key, owner)
);
CREATE TABLE tokens (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    scope TEXT NOT NULL,
    hash TEXT NOT NULL UNIQUE,
    created_at REAL NOT NULL,
    expires_at REAL
);
CREATE TABLE sessions (
    hash TEXT PRIMARY KEY,
    token_id TEXT NOT NULL REFERENCES tokens (id) ON DELETE CASCADE,
    expires_at REAL NOT NULL
);
"""
ADDED: Final = """
CREATE TABLE IF NOT EXISTS files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    lines INTEGER NOT NULL,
    "distinct" INTEGER NOT NULL,
    columns TEXT NOT NULL,    -- JSON
    created_at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS fine_tuning (
    job_id TEXT PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    request TEXT NOT NULL     -- JSON
);
"""
"""Tables that an older home does not have: it gets them at its next start, and nothing else changes in it."""


class NoSuchJob(AsyncFlowError):
    """There is no job of this id."""


class NoSuchFile(AsyncFlowError):
    """There is no file of this id."""


class Changed(AsyncFlowError):
    """The job is not any more what the caller believes it is."""


class KeyReused(AsyncFlowError):
    """An `Idempotency-Key` came with another body before."""


class Database:
    """Thread-safe."""

    def __init__(self, path: Path, *, clock: Clock | None = None) -> None:
        """Makes the file, for its owner only. Raises UserError for one that a newer release has written."""
        self._clock = clock or SystemClock()
        self._lock = threading.RLock()
        self.changes = 0
        """Grows with every transaction: who saw it unchanged has missed nothing."""
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise UserError(f"{path} cannot be used ({error.strerror}): see to it, or name another --home") from None
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30.0)
        self._connection.row_factory = sqlite3.Row
        try:
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.execute("PRAGMA foreign_keys=ON")
            (found,) = self._connection.execute("PRAGMA user_version").fetchone()
            if not found:
                self._connection.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version={FORMAT}; COMMIT;")
            elif found != FORMAT:
                raise UserError(f"{path} has format {found}, this release reads {FORMAT}: use the matching release")
            self._connection.executescript(ADDED)
            (health,) = self._connection.execute("PRAGMA quick_check(1)").fetchone()
            if health != "ok":
                raise sqlite3.DatabaseError(health)
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise UserError(f"{path} cannot be read ({error}): restore it, or name another --home") from None
        except UserError:
            self._connection.close()
            raise

    def close(self) -> None:
        """May be called twice."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it or nothing."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")
            self.changes += 1

    def read(self, sql: str, *values: object) -> list[sqlite3.Row]:
        with self._lock:
            return self._connection.execute(sql, values).fetchall()

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def add(self, new: NewJob, *, max_staleness: int | None = None, once: Once | None = None) -> tuple[JobRow, bool]:
        """A job that is validating; or, and then True, the one that the same request made before.

        Raises KeyReused, and NoSuchFile for a request that names one.
        """
        job_id, now = f"job_{secrets.token_hex(10)}", self._clock.wall()
        with self.transaction() as db:
            if once is not None:
                found = db.execute(
                    "SELECT digest, job_id FROM answers WHERE key=? AND owner=? AND created_at>?",
                    (once.key, once.owner, now - ANSWERS_KEPT),
                ).fetchone()
                if found is not None:
                    if found["digest"] != once.digest:
                        raise KeyReused("this Idempotency-Key came with another body before: take a new key")
                    return self.get(found["job_id"]), True
                db.execute(
                    "INSERT OR REPLACE INTO answers VALUES (?,?,?,?,?)",
                    (once.key, once.owner, once.digest, job_id, now),
                )
            db.execute(
                "INSERT INTO jobs (id, name, state, priority, labels, config, resume_from, max_staleness, created_at,"
                " updated_at) VALUES (?,?,?,?,?,?,?,?,?,?)",
                (job_id, new.name, State.validating, new.priority, json.dumps(dict(new.labels)),
                 json.dumps(new.config), new.resume_from, max_staleness, now, now),
            )  # fmt: skip
            if new.request is not None:
                for key in ("training_file", "validation_file"):
                    # Once more, together with the job: one that is there now is kept until the job has ended.
                    if (file_id := new.request.get(key)) is not None:
                        self.file(file_id)
                db.execute("INSERT INTO fine_tuning VALUES (?,?)", (job_id, json.dumps(new.request)))
            self._tell(db, job_id, "state", "the job was submitted", {"to": State.validating}, "info")
            return self.get(job_id), False

    def get(self, job_id: str) -> JobRow:
        """Raises NoSuchJob."""
        rows = self.read("SELECT * FROM jobs WHERE id=?", job_id)
        if not rows:
            raise NoSuchJob(f"there is no job {job_id}")
        return _job(rows[0])

    def fate(self, job_id: str) -> Literal["there", "deleted"] | None:
        """What became of a job of this id; None where there never was one."""
        if self.read("SELECT 1 FROM jobs WHERE id=?", job_id):
            return "there"
        return "deleted" if self.read("SELECT 1 FROM events WHERE job_id=? AND type='deleted'", job_id) else None

    def jobs(
        self,
        *,
        states: Sequence[State] = (),
        labels: Sequence[tuple[str, str | None]] = (),
        before: int | None = None,
        limit: int | None = None,
    ) -> list[JobRow]:
        """The newest first. `labels`: each name has this value, or any; `before`: older than this `seq`."""
        where, values = ["1"], list[object]()
        if states:
            where.append(f"state IN ({','.join('?' * len(states))})")
            values += states
        for name, value in labels:
            also = "" if value is None else " AND value=?"
            where.append(f"EXISTS (SELECT 1 FROM json_each(labels) WHERE key=?{also})")
            values += [name] if value is None else [name, value]
        if before is not None:
            where.append("seq<?")
            values.append(before)
        sql = f"SELECT * FROM jobs WHERE {' AND '.join(where)} ORDER BY seq DESC LIMIT ?"
        return [_job(row) for row in self.read(sql, *values, -1 if limit is None else limit)]

    def requests(
        self, *, metadata: Mapping[str, str], before: int | None, limit: int
    ) -> list[tuple[JobRow, Mapping[str, Any]]]:
        """Jobs that came as fine-tuning jobs, with what was asked for, the newest first. Arguments as of `jobs`."""
        where, values = ["1"], list[object]()
        for name, value in metadata.items():
            where.append("EXISTS (SELECT 1 FROM json_each(request, '$.metadata') WHERE key=? AND value=?)")
            values += [name, value]
        if before is not None:
            where.append("seq<?")
            values.append(before)
        sql = (
            f"SELECT jobs.*, request FROM jobs JOIN fine_tuning ON job_id=id WHERE {' AND '.join(where)}"
            " ORDER BY seq DESC LIMIT ?"
        )
        found = []
        for row in self.read(sql, *values, limit):
            columns = dict(row)
            request = json.loads(columns.pop("request"))
            found.append((_job(columns), request))
        return found

    def request(self, job_id: str) -> tuple[JobRow, Mapping[str, Any]]:
        """One of them. Raises NoSuchJob."""
        rows = self.read("SELECT request FROM fine_tuning WHERE job_id=?", job_id)
        if not rows:
            raise NoSuchJob(f"there is no fine-tuning job {job_id}")
        return self.get(job_id), json.loads(rows[0]["request"])

    def next_queued(self) -> JobRow | None:
        """The one that starts next: of the highest priority, and of those the oldest."""
        rows = self.read("SELECT * FROM jobs WHERE state=? ORDER BY priority DESC, seq LIMIT 1", State.queued)
        return _job(rows[0]) if rows else None

    def move(
        self,
        job_id: str,
        to: State,
        *,
        message: str,
        reason: Reason | None = None,
        resolved: Mapping[str, Any] | None = None,
        starts: int | None = None,
        revision: int | None = None,
    ) -> JobRow:
        """Let a job go to another state and say so. Raises IllegalMove, NoSuchJob, and Changed for another revision."""
        with self.transaction() as db:
            job = self._checked(job_id, revision)
            check(job.state, to)
            now = self._clock.wall()
            values: dict[str, object] = {"state": to, "reason": _reason_json(reason)}
            if resolved is not None:
                values["resolved"] = json.dumps(resolved)
            if starts is not None:
                values["starts"] = starts
            if to is State.starting:
                values["started_at"] = now
            if to is State.queued:
                values["started_at"] = None
            if to in ENDED:
                values["finished_at"] = now
            self._update(db, job_id, values)
            level: Level = "error" if to is State.failed else "info"
            data = {"from": job.state, "to": to} | ({"code": reason.code} if reason else {})
            self._tell(db, job_id, "state", message, data, level)
            return self.get(job_id)

    def change(
        self, job_id: str, values: Mapping[str, Any], *, revision: int | None, told: Mapping[str, Any] | None
    ) -> JobRow:
        """Set `name`, `priority`, `labels` or `max_staleness`. Raises NoSuchJob and Changed.

        `told`: those of them of which there is to be an event; None where the run has told everything itself, and only
        those need to know who look at all jobs.
        """
        assert values.keys() <= {"name", "priority", "labels", "max_staleness"}
        with self.transaction() as db:
            self._checked(job_id, revision)
            columns = {key: json.dumps(value) if key == "labels" else value for key, value in values.items()}
            self._update(db, job_id, columns)
            if told is None:
                db.execute(
                    "INSERT INTO events (job_id, n, created_at, type, level, message, data)"
                    " SELECT ?, MIN(0, MIN(n)) - 1, ?, 'changed', 'info', '', '{}' FROM events WHERE job_id=?",
                    (job_id, self._clock.wall(), job_id),
                )  # no event of the job has such a number
            else:
                text = ", ".join(f"{key} is now {value}" for key, value in told.items()) or "nothing changed"
                self._tell(db, job_id, "changed", text, told, "info")
            return self.get(job_id)

    def tell(self, job_id: str, type_: str, message: str, data: Mapping[str, Any], level: Level = "info") -> None:
        """One more event of a job."""
        with self.transaction() as db:
            self._tell(db, job_id, type_, message, data, level)

    def delete(self, job_id: str, *, revision: int | None = None) -> None:
        """Forget a job that has ended, with its events. Raises NoSuchJob, Changed, and UserError for another."""
        with self.transaction() as db:
            if not (job := self._checked(job_id, revision)).ended:
                raise UserError(f"the job is {job.state}: cancel it first, only jobs that have ended can be deleted")
            db.execute("DELETE FROM jobs WHERE id=?", (job_id,))
            self._tell(db, job_id, "deleted", "the job was deleted", {}, "info")
            db.execute("DELETE FROM events WHERE job_id=? AND type<>'deleted'", (job_id,))

    def events(self, job_id: str, *, after: int, limit: int) -> list[EventRow]:
        """What the service said of a job after its event `after`, oldest first."""
        rows = self.read("SELECT * FROM events WHERE job_id=? AND n>? ORDER BY n LIMIT ?", job_id, after, limit)
        return [_event(row) for row in rows]

    def all_events(self, *, after: int, limit: int) -> list[EventRow]:
        """What it said of all jobs after the event with this `seq`."""
        return [_event(row) for row in self.read("SELECT * FROM events WHERE seq>? ORDER BY seq LIMIT ?", after, limit)]

    def last_of(self, job_id: str) -> int:
        """The `n` of the last event of a job; 0 when there is none."""
        return int(self.read("SELECT COALESCE(MAX(n), 0) FROM events WHERE job_id=?", job_id)[0][0])

    def last_event(self) -> int:
        """The `seq` of the last event; 0 when there is none."""
        return int(self.read("SELECT COALESCE(MAX(seq), 0) FROM events")[0][0])

    # -- files ---------------------------------------------------------------------------------------------------------

    def add_file(self, new: FileRow) -> FileRow:
        """`seq` is given here."""
        with self.transaction() as db:
            db.execute(
                'INSERT INTO files (id, name, purpose, bytes, lines, "distinct", columns, created_at)'
                " VALUES (?,?,?,?,?,?,?,?)",
                (new.id, new.name, new.purpose, new.bytes, new.lines, new.distinct, json.dumps(list(new.columns)),
                 new.created_at),
            )  # fmt: skip
            return self.file(new.id)

    def file(self, file_id: str) -> FileRow:
        """Raises NoSuchFile."""
        rows = self.read("SELECT * FROM files WHERE id=?", file_id)
        if not rows:
            raise NoSuchFile(f"there is no file {file_id[:64]}")
        return _file(rows[0])

    def files(self, *, after: int | None = None, newest_first: bool = True, limit: int | None = None) -> list[FileRow]:
        """`after`: from behind the file with this `seq`, in the order that is asked for."""
        sign, order = ("<", "DESC") if newest_first else (">", "ASC")
        where, values = ("1", ()) if after is None else (f"seq{sign}?", (after,))
        sql = f"SELECT * FROM files WHERE {where} ORDER BY seq {order} LIMIT ?"
        return [_file(row) for row in self.read(sql, *values, -1 if limit is None else limit)]

    def delete_file(self, file_id: str) -> None:
        """Raises NoSuchFile, and UserError for one that a job still reads."""
        with self.transaction() as db:
            self.file(file_id)
            marks = ",".join("?" * len(ENDED))
            sql = (
                "SELECT id FROM jobs JOIN fine_tuning ON job_id=id WHERE ? IN"
                " (json_extract(request, '$.training_file'), json_extract(request, '$.validation_file'))"
                f" AND state NOT IN ({marks})"
            )
            if found := db.execute(sql, (file_id, *ENDED)).fetchone():
                raise UserError(f"{found['id']} reads {file_id}: wait until it has ended, or cancel it first")
            db.execute("DELETE FROM files WHERE id=?", (file_id,))

    def _checked(self, job_id: str, revision: int | None) -> JobRow:
        job = self.get(job_id)
        if revision is not None and revision != job.revision:
            raise Changed(f"the job has revision {job.revision} by now, not {revision}: look at it again")
        return job

    def _update(self, db: sqlite3.Connection, job_id: str, values: Mapping[str, object]) -> None:
        columns = ", ".join(f"{name}=?" for name in values)
        db.execute(
            f"UPDATE jobs SET {columns}, updated_at=?, revision=revision+1 WHERE id=?",
            (*values.values(), self._clock.wall(), job_id),
        )

    def _tell(  # noqa: PLR0917
        self, db: sqlite3.Connection, job_id: str, type_: str, message: str, data: Mapping[str, Any], level: Level
    ) -> None:
        db.execute(
            "INSERT INTO events (job_id, n, created_at, type, level, message, data)"
            " SELECT ?, COALESCE(MAX(n), 0) + 1, ?, ?, ?, ?, ? FROM events WHERE job_id=?",
            (job_id, self._clock.wall(), type_, level, message, json.dumps(data), job_id),
        )


def _job(row: sqlite3.Row | Mapping[str, Any]) -> JobRow:
    values = dict(row)
    values["state"] = State(values["state"])
    for name in ("labels", "config", "resolved"):
        values[name] = None if values[name] is None else json.loads(values[name])
    reason = values["reason"]
    values["reason"] = None if reason is None else Reason(**json.loads(reason))
    return JobRow(**values)


def _file(row: sqlite3.Row) -> FileRow:
    values = dict(row)
    values["columns"] = json.loads(values["columns"])
    return FileRow(**values)


def _event(row: sqlite3.Row) -> EventRow:
    values = dict(row)
    values["data"] = json.loads(values["data"])
    return EventRow(**values)


def _reason_json(reason: Reason | None) -> str | None:
    return None if reason is None else json.dumps({"code": reason.code, "message": reason.message})
