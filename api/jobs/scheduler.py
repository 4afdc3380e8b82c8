"""Who starts next, and a thread for each job that looks after its process.

     submitted ─► validator (a process with a deadline) ─► queue ─► Attendant: spawn, watch, steer, note the end
                                                                        │ lock, started.json, exit.json, socket
                                                                        ▼
                                                                     the job's process, which outlives the service

    part        waits for                              until
    Scheduler   a queued job and a free slot           a job is validated or ends, a priority changes
    Attendant   the end of its process, or a wish      the lock is free; somebody pauses, resumes, cancels

Nothing here keeps a fact that is not in the database or in the job's folder: a service that starts again reads both and
goes on (`Scheduler.start`).
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Final

from asyncflow_api.jobs import process
from asyncflow_api.jobs.database import Changed, Database, NoSuchJob
from asyncflow_api.jobs.folder import Exit, JobFolder, Order, Started
from asyncflow_api.jobs.lifecycle import LIVE, IllegalMove, State
from asyncflow_api.jobs.predecessor import inherit
from asyncflow_api.jobs.rows import JobRow, Reason
from asyncflow_api.jobs.validator import validate
from asyncflow_api.settings import Settings

from asyncflow.errors import AsyncFlowError, ControlError
from asyncflow.runtime.control import ControlClient

logger = logging.getLogger(__name__)

LOOK_EVERY: Final = 0.2
"""Seconds between two looks at a job's lock and at its wishes."""
ASK_EVERY: Final = 0.5
"""Seconds between two questions how far a run is."""
ANSWERS_WITHIN: Final = 5.0
"""Seconds for which a run is waited for when it is asked something."""
RETRY_EVERY: Final = 2.0
"""Seconds between two attempts at what cannot be done now, such as writing to a full disk."""
LATE_EXIT: Final = 60.0
"""Seconds that a process may go on after it has said how it ended."""
LAST_WORDS: Final = 4096
"""Bytes at the end of a log in which its last line is looked for: the log may be of any size."""
VALIDATORS: Final = 1
"""Plans that are made at once: each takes a core and a gigabyte."""

END_STATES: Final[Mapping[str, State]] = {
    "finished": State.succeeded,
    "stopped": State.cancelled,
    "failed": State.failed,
}


class Scheduler:
    """Moves jobs from submission to their end. Started once; `close` leaves the jobs' processes alone."""

    def __init__(self, database: Database, settings: Settings, folder: Callable[[str], JobFolder]) -> None:
        self._database = database
        self._settings = settings
        self._folder = folder
        self.closed = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._validators = ThreadPoolExecutor(VALIDATORS, thread_name_prefix="validate")
        self._attendants: dict[str, Attendant] = {}

    def start(self) -> None:
        """Take up everything that the last service left, then start what is queued."""
        for job in reversed(self._database.jobs(states=[State.validating])):
            self.validate(job)
        for job in self._database.jobs(states=sorted(LIVE)):
            if job.state is State.starting and not self._folder(job.id).touched():
                text = "the service ended before the process began"
                self._database.move(job.id, State.queued, message=text)
            else:
                self._attend(job)
        self._thread.start()
        self.wake()

    def close(self) -> None:
        """Stop looking after jobs; they go on. May be called twice."""
        self.closed.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        for attendant in list(self._attendants.values()):
            attendant.wake.set()
            attendant.thread.join()
        self._validators.shutdown(cancel_futures=True)

    def validate(self, job: JobRow) -> None:
        """Make the plan of a job in the background; it is queued or failed after that."""
        self._validators.submit(self._validate, job)

    def wake(self, job_id: str | None = None) -> None:
        """Something has changed: look at once."""
        self._wake.set()
        if job_id is not None and (attendant := self._attendants.get(job_id)) is not None:
            attendant.wake.set()

    def progress(self, job_id: str) -> Mapping[str, Any] | None:
        """What a live run last said of itself."""
        attendant = self._attendants.get(job_id)
        return None if attendant is None else attendant.progress

    def progresses(self) -> dict[str, Mapping[str, Any]]:
        """The same of every live run that has said so."""
        attendants = self._attendants.items()
        return {id_: one.progress for id_, one in list(attendants) if one.progress is not None and not one.done}

    def steering(self, job_id: str) -> AbstractContextManager[object]:
        """While somebody changes a live run and then its job: what the run says meanwhile is not taken for news."""
        attendant = self._attendants.get(job_id)
        return nullcontext() if attendant is None else attendant.steering

    def _validate(self, job: JobRow) -> None:
        try:
            if self.closed.is_set() or self._database.get(job.id).state is not State.validating:
                return
            before = None if job.resume_from is None else self._folder(job.resume_from).run
            order = Order(config=job.config, resume=before is not None)
            found = validate(order, before, timeout=self._settings.validation_timeout, stopped=self.closed)
            if self.closed.is_set():
                return  # what it says may be because the service stops; the next one asks again
            if found.ok:
                self._database.move(job.id, State.queued, message="the plan was made", resolved=found.resolved)
            else:
                text = "; ".join(error.message for error in found.errors)
                reason = Reason(code="validation_timeout" if found.late else "invalid_config", message=text)
                self._database.move(job.id, State.failed, message=text, reason=reason)
        except (IllegalMove, NoSuchJob):
            pass  # it was cancelled, or deleted, meanwhile
        except Exception:
            logger.exception("the validation of %s failed", job.id)
            with suppress(AsyncFlowError):
                reason = Reason(code="internal_error", message="its plan could not be made: see the service's log")
                self._database.move(job.id, State.failed, message=reason.message, reason=reason)
        self.wake()

    def _run(self) -> None:
        pause: float | None = None
        while not self.closed.is_set():
            self._wake.wait(pause)
            self._wake.clear()
            try:
                self._fill_slots()
                pause = None
            except Exception:
                if pause is None:
                    logger.exception("no job could be started: it is tried again every %g s", RETRY_EVERY)
                pause = RETRY_EVERY

    def _fill_slots(self) -> None:
        self._attendants = {id_: one for id_, one in self._attendants.items() if not one.done}
        while not self.closed.is_set() and len(self._attendants) < self._settings.slots:
            if (job := self._database.next_queued()) is None:
                return
            try:
                # Committed before there is a process: what is not `starting` has none.
                self._attend(self._database.move(job.id, State.starting, message="it has a slot"))
            except (IllegalMove, NoSuchJob):
                continue  # it was cancelled in this moment

    def _attend(self, job: JobRow) -> None:
        attendant = Attendant(job, self._folder(job.id), self)
        self._attendants[job.id] = attendant
        attendant.thread.start()

    @property
    def database(self) -> Database:
        return self._database

    @property
    def settings(self) -> Settings:
        return self._settings

    def folder(self, job_id: str) -> JobFolder:
        return self._folder(job_id)


class Attendant:
    """Looks after one job from the moment it has a slot until its process has ended."""

    def __init__(self, job: JobRow, folder: JobFolder, scheduler: Scheduler) -> None:
        self._job = job
        self._folder = folder
        self._scheduler = scheduler
        self._database = scheduler.database
        self._control = ControlClient(folder.run, deadline=ANSWERS_WITHIN)
        self._asked = 0.0
        """When the run was last asked how far it is; monotonic."""
        self._cancel: Cancellation | None = None
        self._exit_seen: float | None = None
        self._pid: int | None = None
        self._starts: list[Started] = []
        """What its folder said last of its processes."""
        self.progress: Mapping[str, Any] | None = None
        self.steering = threading.Lock()
        self.done = False
        """The job holds no slot any more."""
        self.wake = threading.Event()
        self.thread = threading.Thread(target=self._run, name=job.id, daemon=True)

    def _run(self) -> None:
        pause = LOOK_EVERY
        while not self._scheduler.closed.is_set():
            try:
                if self._look():
                    break
                pause = LOOK_EVERY
            except NoSuchJob:
                break
            except Exception:
                # It keeps its slot: whoever cannot be looked after may well go on, and is not started a second time.
                if pause == LOOK_EVERY:
                    logger.exception("%s cannot be looked after: tried again every %g s", self._job.id, RETRY_EVERY)
                pause = RETRY_EVERY
            self.wake.wait(pause)
            self.wake.clear()
        self.done = True
        self._scheduler.wake()

    def _look(self) -> bool:
        """One look at the job; True when it has ended."""
        self._job = self._database.get(self._job.id)
        if self._pid is not None:
            process.bury(self._pid)
        lock = self._folder.lock()
        if lock is not None:
            try:
                return self._without_process(lock)
            finally:
                os.close(lock)
        self._with_process()
        return False

    # -- nobody has the lock -------------------------------------------------------------------------------------------

    def _without_process(self, lock: int) -> bool:
        """True when the job is over; otherwise its process was started."""
        starts = self._folder.starts()
        how = self._folder.exit()
        if self._job.ended:
            return True
        if how is None and not starts:
            if self._job.state is State.cancelling:
                self._end(State.cancelled, Reason(code="cancelled", message="it was cancelled before it had begun"))
                return True
            return self._begin(lock)
        if how is None:
            how = Exit(outcome="failed", code="killed", message="its process was killed: resume_from goes on with it")
        to = END_STATES[how.outcome]
        if self._job.state is State.cancelling and how.outcome == "failed" and how.code == "killed":
            to, how = State.cancelled, Exit(outcome="stopped", code="killed", message="it was cancelled and killed")
        elif to is State.cancelled and self._job.state is State.cancelling:
            how = Exit(outcome="stopped", code="cancelled", message=how.message)
        self._end(to, None if to is State.succeeded else Reason(code=how.code, message=how.message), how.message)
        return True

    def _begin(self, lock: int) -> bool:
        """Start the process; True when that is impossible, and the job has failed of it."""
        job = self._job
        if job.state is not State.starting or self._starts:
            # It has begun: what is not known is only how it ended. It is not started a second time.
            self._kill_all()
            text = f"its folder {self._folder.path} was removed: submit the job again"
            self._end(State.failed, Reason(code="killed", message=text))
            return True
        if self._pid is not None:  # it died before its first line
            log = _last_line(self._folder)
            text = f"its process ended before it began{': ' + log if log else ''}"
            self._end(State.failed, Reason(code="not_started", message=text))
            return True
        try:
            config = dict(job.config)
            if job.max_staleness is not None:
                config["max_staleness"] = job.max_staleness
            if job.resume_from is not None:
                inherit(self._scheduler.folder(job.resume_from), self._folder)
            self._folder.make(Order(config=config, resume=job.resume_from is not None))
            self._pid = process.spawn(self._folder, lock)
        except (OSError, shutil.Error, AsyncFlowError) as error:
            self._end(State.failed, Reason(code="not_started", message=f"its process could not be started: {error}"))
            return True
        return False

    def _end(self, to: State, reason: Reason | None, message: str | None = None) -> None:
        text = message or (reason.message if reason is not None else "it has ended")
        self._database.move(self._job.id, to, message=text, reason=reason, starts=len(self._folder.starts()))

    # -- a process has it ----------------------------------------------------------------------------------------------

    def _with_process(self) -> None:
        if self._folder.exit() is not None:
            self._see_that_it_ends()
            return
        try:
            match self._job.state:
                case State.cancelling:
                    self._cancel = self._cancel or Cancellation(self._folder, self._control, self._scheduler.settings)
                    self._cancel.go_on()
                case State.starting:
                    self._ask()
                case State.pausing:
                    self._control.pause()
                    self._ask(at_once=True)
                case State.resuming:
                    self._control.resume()
                    self._move(State.running, "the run goes on")
                case _:
                    self._ask()
        except ControlError as error:
            logger.debug("%s does not answer: %s", self._job.id, error)  # it loads its models, or is about to end
        except (IllegalMove, NoSuchJob) as error:
            logger.debug("%s was moved by somebody else meanwhile: %s", self._job.id, error)
        self._kill_orphans()

    def _ask(self, *, at_once: bool = False) -> None:
        """Ask the run where it is, now and then. Raises ControlError."""
        now = time.monotonic()
        if not at_once and now - self._asked < ASK_EVERY:
            return
        self._asked = now
        with self.steering:
            status = self._control.status()
            self._take_bound(status.get("max_staleness"))
        self.progress = _progress(status)
        state, phase = self._job.state, status["phase"]
        if state is State.starting and phase != "starting":
            self._move(State.running, "the run began")
        elif state in (State.pausing, State.running) and phase == "paused" and _rests(status):
            self._move(State.paused, f"the run rests after step {status.get('step', 0)}")
        elif state is State.paused and phase in ("training", "evaluating"):
            self._move(State.running, "somebody let the run go on")

    def _take_bound(self, bound: int | None) -> None:
        """Somebody has changed it in the run itself, which has told so."""
        job = self._database.get(self._job.id)
        known = job.max_staleness if job.max_staleness is not None else (job.resolved or {}).get("max_staleness")
        if bound is not None and known is not None and known != bound:
            with suppress(Changed):  # then it is seen again
                self._database.change(job.id, {"max_staleness": bound}, revision=job.revision, told=None)

    def _move(self, to: State, message: str) -> None:
        self._job = self._database.move(self._job.id, to, message=message, starts=len(self._folder.starts()))

    def _see_that_it_ends(self) -> None:
        """It has said how it ended; something of it that does not go is killed."""
        self._exit_seen = self._exit_seen or time.monotonic()
        if time.monotonic() - self._exit_seen > LATE_EXIT:
            self._kill_all()

    def _kill_orphans(self) -> None:
        """The lock is held, and the process that had it first is gone: somebody whom it started is left."""
        starts = self._starts = self._folder.starts() or self._starts
        if starts and starts[-1].process() is None and self._folder.exit() is None and self._folder.held():
            logger.warning("%s: its process was killed and left others behind, which are ended", self._job.id)
            self._kill_all()

    def _kill_all(self) -> None:
        for started in self._folder.starts() or self._starts:
            process.kill(started)


class Cancellation:
    """First the run is asked to stop, then its process, then it is killed."""

    def __init__(self, folder: JobFolder, control: ControlClient, settings: Settings) -> None:
        self._folder = folder
        self._control = control
        self._settings = settings
        self._since = time.monotonic()
        self._asked = False
        self._terminated: float | None = None

    def go_on(self) -> None:
        """Take the step that is due. Raises ControlError while the run does not answer."""
        starts = self._folder.starts()
        if not starts:
            return  # it has the lock, and is just beginning
        now = time.monotonic()
        if self._terminated is not None:
            if now - self._terminated > self._settings.term_grace:
                process.kill(starts[-1])
        elif now - self._since > self._settings.stop_grace:
            self._terminate(now)
        elif not self._asked:
            try:
                self._control.stop()
                self._asked = True
            except ControlError:
                if not (self._folder.run / "control.sock").exists():
                    self._terminate(now)  # it has nothing yet of which to make a checkpoint

    def _terminate(self, now: float) -> None:
        self._terminated = now
        process.terminate(self._folder.starts()[-1])


def _rests(status: Mapping[str, Any]) -> bool:
    """Nothing is being generated, scored or trained any more."""
    return not status.get("open", {}).get("generating") and not status.get("busy")


def _progress(status: Mapping[str, Any]) -> dict[str, Any]:
    step, steps, seconds = status.get("step", 0), status["steps"], status["seconds"]
    eta = seconds / step * (steps - step) if step and status["phase"] == "training" else None
    return {"step": step, "steps": steps, "seconds": seconds, "eta_seconds": eta}


def _last_line(folder: JobFolder) -> str:
    with suppress(OSError), folder.log.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - LAST_WORDS))
        lines = file.read(LAST_WORDS).decode("utf-8", "replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
    return ""
