"""`Jobs`: everything that can be asked of jobs, for the routes. It knows nothing of HTTP.

Every method returns at once, except `change` of a live job, which waits for the run, and `validate`, which waits for a
plan; both have deadlines.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from asyncflow_api.jobs.database import Changed, Database
from asyncflow_api.jobs.events import Cursor, Event, merge
from asyncflow_api.jobs.folder import JobFolder, Order
from asyncflow_api.jobs.lifecycle import ENDED, State
from asyncflow_api.jobs.policy import refusals
from asyncflow_api.jobs.redaction import Redactor
from asyncflow_api.jobs.rows import JobRow, NewJob, Once, Reason
from asyncflow_api.jobs.scheduler import Scheduler
from asyncflow_api.jobs.tail import Tail
from asyncflow_api.jobs.validator import FieldError, Validation, validate
from asyncflow_api.settings import Settings

from asyncflow.clock import Clock, SystemClock
from asyncflow.config import overlaid, parse_config
from asyncflow.errors import AsyncFlowError, ConfigError, ControlError, UserError
from asyncflow.rundir import LEDGER, METRICS, REPORT
from asyncflow.runtime.control import ControlClient

BOUND_TIMEOUT: Final = 5.0
"""Seconds in which a run has to take another bound."""
REPORT_TIMEOUT: Final = 120.0
"""Seconds in which the report of a run that was killed has to be written."""
PLANS_AT_ONCE: Final = 2
MOST_ENTRIES: Final = 1000
"""Of a configuration."""
logger = logging.getLogger(__name__)

REMEMBERED: Final = 256
"""Jobs of which it is remembered where the lines of their metrics are."""

WISHES: Final[Mapping[str, tuple[State, str, frozenset[State]]]] = {
    "pause": (State.pausing, "somebody asked for a pause", frozenset({State.pausing, State.paused})),
    "resume": (State.resuming, "somebody asked it to go on", frozenset({State.resuming, State.running})),
    "cancel": (State.cancelling, "somebody cancelled it", frozenset({State.cancelling, State.cancelled})),
}
"""Wish → where it leads, how that is said, and the states in which it is fulfilled already."""


class Invalid(UserError):
    """A request that says something that cannot be; `errors` has each of them."""

    def __init__(self, errors: Sequence[FieldError]) -> None:
        super().__init__("; ".join(error.message for error in errors))
        self.errors = tuple(errors)


class Busy(AsyncFlowError):
    """Too much of this is going on: try again in `seconds`."""

    def __init__(self, message: str, *, seconds: int) -> None:
        super().__init__(message)
        self.seconds = seconds


class Jobs:
    """All jobs of one service. Thread-safe; one process at a time has a home."""

    def __init__(self, settings: Settings, *, clock: Clock | None = None) -> None:
        """Makes the home, for its owner only. Raises UserError when it cannot be, or another service has it."""
        self.settings = settings
        self.clock = clock or SystemClock()
        try:
            settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
            settings.jobs_dir.mkdir(mode=0o700, exist_ok=True)
            self._lock = os.open(settings.home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UserError(f"{settings.home} cannot be used ({error.strerror}): name another --home") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.database = Database(settings.database, clock=clock)
        except BlockingIOError:
            os.close(self._lock)
            raise UserError(f"another service uses {settings.home}: stop it, or name another --home") from None
        except UserError:
            os.close(self._lock)
            raise
        self._scheduler = Scheduler(self.database, settings, self.folder)
        self._tails: OrderedDict[str, Tail] = OrderedDict()
        self._tails_lock = threading.Lock()
        self._bounds = threading.Lock()
        self._reports = threading.Lock()
        self._plans = threading.BoundedSemaphore(PLANS_AT_ONCE)
        self._closed = False

    def start(self) -> None:
        """Find the jobs that go on, and start what is queued."""
        for folder in self.settings.jobs_dir.iterdir():
            match self.database.fate(folder.name):
                case "deleted":
                    shutil.rmtree(folder, ignore_errors=True)
                case None:  # somebody has put an older database in place of the one that knew it
                    logger.warning("%s is of no job that %s knows: left alone", folder, self.settings.database)
        self._scheduler.start()

    def close(self) -> None:
        """Leave the jobs to themselves. May be called twice."""
        if not self._closed:
            self._closed = True
            self._scheduler.close()
            self.database.close()
            os.close(self._lock)

    # -- one job -------------------------------------------------------------------------------------------------------

    def folder(self, job_id: str) -> JobFolder:
        return JobFolder(self.settings.jobs_dir / job_id)

    def run_dir(self, job_id: str) -> Path:
        """Where the run of a job writes; not there before it has begun. Raises NoSuchJob."""
        run: Path = self.folder(self.database.get(job_id).id).run
        return run

    def get(self, job_id: str) -> JobRow:
        """Raises NoSuchJob."""
        return self.database.get(job_id)

    def progress(self, job_id: str) -> Mapping[str, Any] | None:
        """Of a live job: `step`, `steps`, `seconds`, `eta_seconds`, as the run said a moment ago."""
        progress: Mapping[str, Any] | None = self._scheduler.progress(job_id)
        return progress

    def progresses(self) -> dict[str, Mapping[str, Any]]:
        """That of every live job of which it is known."""
        found: dict[str, Mapping[str, Any]] = self._scheduler.progresses()
        return found

    def redactor(self, job: JobRow) -> Redactor:
        """Hides the secrets of the job's configuration."""
        return Redactor(job.config, job.resolved)

    def redactor_of(self, config: Mapping[str, Any]) -> Redactor:
        """The same for a configuration that belongs to no job."""
        return Redactor(config)

    # -- submission ----------------------------------------------------------------------------------------------------

    def submit(self, new: NewJob, *, once: Once | None = None) -> tuple[JobRow, bool]:
        """Take a job in; True when the same request did so before. Raises Invalid, KeyReused, NoSuchJob."""
        self._check(new)
        bound = new.config.get("max_staleness")
        job, again = self.database.add(new, max_staleness=bound if isinstance(bound, int) else None, once=once)
        if not again:
            self._scheduler.validate(job)
        return job, again

    def validate(self, config: Mapping[str, Any]) -> Validation:
        """Everything that is wrong with a configuration, or its plan. Raises Busy."""
        try:
            self._check(NewJob(name="", config=config, labels={}))
        except Invalid as error:
            return Validation(errors=error.errors)
        if not self._plans.acquire(timeout=5.0):
            raise Busy("other plans are being made: try again in some seconds", seconds=10)
        try:
            return validate(Order(config=config), None, timeout=self.settings.validation_timeout)
        finally:
            self._plans.release()

    def _check(self, new: NewJob) -> None:
        values = new.config
        if _entries(values) > MOST_ENTRIES:
            text = f"config has more than {MOST_ENTRIES} entries: there are not so many settings"
            raise Invalid([FieldError(field="config", message=text)])
        if new.resume_from is not None:
            before = self.database.get(new.resume_from)
            if not before.ended or not (self.folder(before.id).run / LEDGER).is_file():
                text = f"{before.id} has no run to go on with: name a job that has ended and had begun"
                raise Invalid([FieldError(field="resume_from", message=text)])
            values = overlaid(before.resolved or before.config, values)
        try:
            config = parse_config(values)
        except ConfigError as error:
            raise Invalid([FieldError(field=key or "config", message=text) for key, text in error.fields]) from None
        if found := refusals(config, self.settings):
            raise Invalid(found)

    # -- steering ------------------------------------------------------------------------------------------------------

    def wish(self, job_id: str, what: str) -> JobRow:
        """`pause`, `resume` or `cancel`, which are done in the background. Raises IllegalMove, NoSuchJob."""
        aim, message, fulfilled = WISHES[what]
        while (job := self.database.get(job_id)).state not in fulfilled:
            to, reason = aim, None
            if what == "cancel" and job.state in (State.validating, State.queued):
                to, reason = State.cancelled, Reason(code="cancelled", message="it was cancelled before it had begun")
            try:
                job = self.database.move(job_id, to, message=message, reason=reason, revision=job.revision)
            except Changed:
                continue  # it has got its slot in this moment
            self._scheduler.wake(job_id)
            break
        return job

    def change(self, job_id: str, values: Mapping[str, Any], *, revision: int | None) -> JobRow:
        """Change `name`, `priority`, `labels`, `max_staleness`; the last one in a live run at once.

        Raises NoSuchJob, Changed, and ControlError for what the run refuses, or one that has ended.
        """
        if values.get("max_staleness") is None:
            job = self.database.change(job_id, values, revision=revision, told=values)
        else:
            # Two at once would leave the run with one bound, and the job with the other.
            if not self._bounds.acquire(timeout=BOUND_TIMEOUT):
                raise Busy("another bound is being changed, of a run that does not answer: try again", seconds=5)
            try:
                job = self._change_bound(job_id, values, revision)
            finally:
                self._bounds.release()
        self._scheduler.wake()
        return job

    def _change_bound(self, job_id: str, values: Mapping[str, Any], revision: int | None) -> JobRow:
        while True:
            job = self.database.get(job_id)
            if job.state in ENDED or job.state is State.cancelling:
                raise ControlError(f"the job is {job.state}: max_staleness can be changed until it ends")
            try:
                if job.state in (State.validating, State.queued):
                    return self.database.change(job_id, values, revision=revision or job.revision, told=values)
                with self._scheduler.steering(job_id):
                    return self._change_live(job_id, values, revision)
            except Changed:
                if revision is not None:
                    raise  # else it may have got its slot in this moment, with the bound that it had

    def _change_live(self, job_id: str, values: Mapping[str, Any], revision: int | None) -> JobRow:
        """First in the run, which tells of the bound itself."""
        if revision in (None, self.database.get(job_id).revision):
            run = ControlClient(self.folder(job_id).run, deadline=BOUND_TIMEOUT)
            run.set_max_staleness(values["max_staleness"])
        others = {key: value for key, value in values.items() if key != "max_staleness"}
        return self.database.change(job_id, values, revision=revision, told=others or None)

    def delete(self, job_id: str, *, revision: int | None) -> None:
        """Forget a job that has ended, and remove its folder. Raises NoSuchJob, Changed, UserError."""
        self.database.delete(job_id, revision=revision)
        shutil.rmtree(self.folder(job_id).path, ignore_errors=True)  # what is left goes at the next start
        with self._tails_lock:
            self._tails.pop(job_id, None)

    # -- reading -------------------------------------------------------------------------------------------------------

    def events_after(
        self, job_id: str, cursor: Cursor, limit: int, *, until: Cursor | None = None
    ) -> tuple[list[Event], Cursor]:
        """What happened to a job after a cursor and not after `until`, and the cursor after that. Raises NoSuchJob."""
        job = self.database.get(job_id)
        most = (limit, limit) if until is None else (until.own - cursor.own, until.lines - cursor.lines)
        own = self.database.events(job_id, after=cursor.own, limit=max(0, min(limit, most[0])))
        lines = self._tail(job_id).lines(cursor.lines, max(0, min(limit, most[1])))
        events, at = merge(job_id, cursor, own, lines, limit)
        hide = self.redactor(job)
        return [replace(one, message=hide.text(one.message), data=hide.value(one.data)) for one in events], at

    def events_end(self, job_id: str) -> Cursor:
        """The cursor after all that has happened to a job by now."""
        return Cursor(self.database.last_of(job_id), self._tail(job_id).count())

    def newest(self, job_id: str, lines: int) -> Cursor:
        """Before so many of the last lines of a run, with everything that the service says. Raises NoSuchJob."""
        self.database.get(job_id)
        return Cursor(0, max(0, self._tail(job_id).count() - lines))

    def news(self, job_id: str) -> tuple[int, int]:
        """Something that differs whenever there may be new events of a job; cheap."""
        return self.database.changes, self._tail(job_id).size()

    def report(self, job_id: str) -> Path | None:
        """The report of a job that has ended; None where it left nothing to report. Raises NoSuchJob."""
        job = self.database.get(job_id)
        path = self.folder(job_id).run / REPORT
        if not path.is_file() and job.ended and (path.parent / LEDGER).is_file():
            # It was killed: its report is made now, by somebody else, as that takes memory.
            if not self._reports.acquire(blocking=False):
                raise Busy("the report of a run that was killed is being made: try again in some seconds", seconds=5)
            try:
                command = [sys.executable, "-m", "asyncflow.cli", "report", str(path.parent)]
                subprocess.run(command, capture_output=True, timeout=REPORT_TIMEOUT, check=False)
            except subprocess.TimeoutExpired:
                raise Busy(f"the report was not made within {REPORT_TIMEOUT:g} s: try later", seconds=600) from None
            finally:
                self._reports.release()
        return path if path.is_file() else None

    def _tail(self, job_id: str) -> Tail:
        with self._tails_lock:
            tail = self._tails.pop(job_id, None) or Tail(self.folder(job_id).run / METRICS)
            self._tails[job_id] = tail
            while len(self._tails) > REMEMBERED:
                self._tails.popitem(last=False)
            return tail


def _entries(value: object) -> int:
    """Values within a value, at any depth."""
    match value:
        case Mapping():
            return len(value) + sum(map(_entries, value.values()))
        case list() | tuple():
            return len(value) + sum(map(_entries, value))
    return 0
