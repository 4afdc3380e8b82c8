"""One run as the routes see it: everything that can be asked of a run directory, live or ended.

What is known for ever comes from the ledger and the files; what is so just now comes from the process of the run, over
its socket and its store. A run that does not go on answers all but the latter.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import pyarrow as pa
from asyncflow_api.exchange import Room
from fastapi import Depends, Request

from asyncflow.errors import ControlError, DataError, StoreError, UserError
from asyncflow.report.bottleneck import Bottleneck, bottleneck, diagnose
from asyncflow.report.follow import Follower
from asyncflow.report.measured import Measured
from asyncflow.report.queue import Queue, queue_of
from asyncflow.report.samples import Samples
from asyncflow.rundir import CONFIG, DATA, LEDGER, METRICS, TRACE
from asyncflow.runtime.control import ControlClient
from asyncflow.runtime.metrics import read_metrics
from asyncflow.runtime.timeline import as_told, read_trace
from asyncflow.store.client import Lease, Stat
from asyncflow.store.events import PutId
from asyncflow.store.home import address_of, read_token
from asyncflow.store.remote import connect
from asyncflow.store.schema import Schema
from asyncflow.store.store import Store
from asyncflow.store.topics import ADMISSION, FEEDER

PATIENCE: Final = 2.0
"""Seconds for which a store that does not answer is waited for."""
READING: Final = 3.0
"""Seconds of processor time that one request spends on a ledger; a week's is read by several."""
WINDOW: Final = 60.0
"""Seconds over which it is said what holds a live run up."""
FRESH: Final = 0.2
"""Seconds for which a look at a live run is the same for everybody; and for as long as the look took."""
ANSWERS_WITHIN: Final = 3.0
"""Seconds after which a run that says nothing does not go on, as far as those who ask here are concerned."""
REMEMBERED: Final = 64
"""Runs whose ledgers are kept in memory."""
KEPT_UP: Final = REMEMBERED // 2
"""Live runs, at most, whose ledgers are read as they grow."""
KEEP_UP_EVERY: Final = 1.0
"""Seconds between two reads."""
EXTERNAL: Final = "external/"
"""What the store calls a worker outside begins so: it cannot be taken for one of the run's own."""


T = TypeVar("T")


class NotBegun(UserError):
    """A run that has no ledger yet."""


class NotLive(ControlError):
    """A run that does not go on."""


class NoRoom(StoreError):
    """A put that the run cannot take now."""


class NotYours(StoreError):
    """A lease that belongs to one of the run's own workers, or to nobody any more."""


class RunView:
    """Thread-safe."""

    def __init__(self, run_dir: Path) -> None:
        """Reads nothing yet."""
        self.run_dir = run_dir
        self.control = ControlClient(run_dir, deadline=ANSWERS_WITHIN)
        self.measured = Measured(run_dir)
        self.samples = Samples(run_dir, self._follower_of(run_dir), store=self._store_if_there)
        self._lock = threading.Lock()
        self._connected: tuple[str, Store] | None = None
        self._asked = threading.Lock()
        self._asking: dict[str, threading.Lock] = {}
        self._changes = 0
        """How often somebody has changed something: what was asked before tells of what was."""
        self._looks: dict[str, tuple[float, Any]] = {}
        """What was asked for → until when it holds (monotonic), and the answer."""
        self._diagnosed: tuple[int, Bottleneck | None] | None = None

    def _follower_of(self, run_dir: Path) -> Follower:
        self.follower = Follower(run_dir, patience=READING)
        return self.follower

    def close(self) -> None:
        """Let go of the store. May be called twice."""
        with self._lock:
            connected, self._connected = self._connected, None
        if connected is not None:
            connected[1].close()

    # -- as it is now --------------------------------------------------------------------------------------------------

    def status(self) -> Mapping[str, Any] | None:
        """What the run says of itself; None when it does not go on."""

        def ask() -> Mapping[str, Any] | None:
            with suppress(ControlError):
                return self.control.status()
            return None

        return self._look("status", ask)

    def _look(self, what: str, ask: Callable[[], T]) -> T:
        """An answer that is `FRESH`, whoever has asked for it: however many look on, the run is asked as often, and one
        that hangs holds one of them, not all."""
        with self._asked:
            asking = self._asking.setdefault(what, threading.Lock())
        with asking:
            changes = self._changes
            until, answer = self._looks.get(what, (-math.inf, None))
            began = time.monotonic()
            if began >= until:
                answer = ask()
                now = time.monotonic()
                with self._asked:
                    if changes == self._changes:
                        self._looks[what] = now + max(FRESH, now - began), answer
            found: T = answer
            return found

    def look_again(self) -> None:
        """Somebody has changed something: whoever looks now sees it."""
        with self._asked:
            self._changes += 1
            self._looks.clear()

    @property
    def live(self) -> bool:
        return self.status() is not None

    def check_live(self) -> None:
        """Raises NotLive."""
        if not self.live:
            raise NotLive("this run does not go on: it has not begun yet, or has ended")

    def check_begun(self) -> None:
        """Raises NotBegun."""
        if not (self.run_dir / LEDGER).is_file():
            raise NotBegun("this run has not begun yet: try again when its job is running")

    def queue(self) -> Queue:
        """Raises NotBegun, BeingRead, LedgerError."""
        return self._look("queue", self._queue)

    def _queue(self) -> Queue:
        self.check_begun()
        live = self.live
        stat = self._stat() if live else None
        with self.follower.lock:
            self.follower.catch_up()
            return queue_of(self.follower, now=time.time() if live else None, stat=stat, size=self._size())

    def bottleneck(self, queue: Queue) -> Bottleneck | None:
        """What holds the run up, or did; None when there were too few steps to say."""
        if not self.live:
            return self._diagnosis(queue.max_staleness)
        with self.follower.lock:
            if len(self.follower.steps) < 2:
                return None
            # In the first step everything fills up.
            filled = time.time() - self.follower.steps[0].at
        with suppress(ControlError):
            shares = self._look("shares", lambda: self.control.shares(min(WINDOW, filled)))
            return bottleneck(shares, max_staleness=queue.max_staleness, update=self._update)
        return None

    def _diagnosis(self, max_staleness: int) -> Bottleneck | None:
        """Of a run that has ended. It does not change any more, and reading all steps of a week takes seconds."""
        path = self.run_dir / METRICS
        now = path.stat().st_size if path.is_file() else 0
        if self._diagnosed is None or self._diagnosed[0] != now:
            found = diagnose(read_metrics(path, "step"), max_staleness=max_staleness, update=self._update)
            self._diagnosed = now, found
        return self._diagnosed[1]

    def workers(self) -> Sequence[Mapping[str, Any]]:
        """None of a run that does not go on."""
        with suppress(ControlError):
            return self._look("workers", self.control.workers) if self.live else ()
        return ()

    def engines(self) -> Sequence[Mapping[str, Any]]:
        """None of a run that does not go on."""
        with suppress(ControlError):
            return self.control.engines() if self.live else ()
        return ()

    def timeline(self, seconds: float) -> Sequence[Mapping[str, Any]]:
        """What every worker did in the last so many seconds of the run."""
        if self.live:
            with suppress(ControlError):
                return self.control.timeline(seconds)
        told = as_told(read_trace(self.run_dir / TRACE))
        end = max((span["end"] for span in told), default=0.0)
        return [span for span in told if span["end"] > end - seconds]

    # -- producers and consumers outside -------------------------------------------------------------------------------

    @property
    def schema(self) -> Schema:
        """Raises NotBegun, LedgerError."""
        self.check_begun()
        with self.follower.lock:
            self.follower.catch_up()
            return self.follower.table.schema

    @property
    def group_size(self) -> int:
        self.check_begun()
        with self.follower.lock:
            self.follower.catch_up()
            return self.follower.table.group_size

    @property
    def room(self) -> Room:
        """What its workers can read."""
        found = (self.status() or {}).get("room", {})
        return Room(**{field.name: found.get(field.name) for field in fields(Room)})

    def tokenise(self, prompts: list[Any]) -> Sequence[Sequence[int]]:
        """As the run does. Raises NotLive, DataError."""
        self.check_live()
        try:
            return self.control.tokenise(prompts)
        except ControlError as error:
            raise DataError(str(error)) from error

    def put(
        self, prompts: pa.RecordBatch, samples: pa.RecordBatch | None, *, put: PutId | None, timeout: float
    ) -> tuple[int, ...]:
        """Ids of the new groups. Raises NotLive, NoRoom, StoreError."""
        store = self._store()
        groups = store.admit(prompts, samples, put=put, timeout=timeout)
        self.look_again()
        if groups is None:
            waits = store.awaited(ADMISSION)
            why = "there is some by now" if waits == FEEDER else f"it waits for: {waits}"
            raise NoRoom(f"there was no room for so many ({why}): try again")
        return groups

    def lease(
        self, stage: str, *, worker: str, max_rows: int, min_rows: int, ttl: float, timeout: float
    ) -> Lease | None:
        """Raises NotLive, StoreError."""
        store = self._store()
        if stage not in store.schema.stages:
            raise StoreError(f"there is no stage {stage!r}; the stages are {', '.join(store.schema.stages)}")
        if stage == store.schema.train.name:
            raise StoreError(f"{stage} is the learner's: only it can say what is in the weights. Take another stage")
        found = store.lease(
            stage, worker=EXTERNAL + worker, max_rows=max_rows, min_rows=min_rows, ttl=ttl, timeout=timeout
        )
        self.look_again()
        return found

    def stage_of(self, lease_id: int) -> str:
        """Of a lease that a worker outside has. Raises NotYours."""
        self.check_begun()
        with self.follower.lock:
            self.follower.catch_up()
            lease = self.follower.table.leases.get(lease_id)
            if lease is None or not lease.worker.startswith(EXTERNAL):
                raise NotYours(f"lease {lease_id} has ended, or was not given out over HTTP: take a new one")
            return lease.stage

    def renew(self, lease_id: int, *, ttl: float) -> None:
        """Raises NotLive, NotYours, LeaseLost."""
        self.stage_of(lease_id)
        self._store().renew(lease_id, ttl=ttl)
        self.look_again()

    def ack(self, lease_id: int, ids: Sequence[int], columns: pa.RecordBatch | None) -> None:
        """Raises NotLive, NotYours, LeaseLost, StoreError."""
        self.stage_of(lease_id)
        self._store().ack(lease_id, ids, columns)
        self.look_again()

    def nack(self, lease_id: int, ids: Sequence[int], *, reason: str, final: bool) -> None:
        """Raises NotLive, NotYours, LeaseLost."""
        self.stage_of(lease_id)
        self._store().nack(lease_id, ids, reason=reason, final=final)
        self.look_again()

    # ------------------------------------------------------------------------------------------------------------------

    def _store(self) -> Store:
        """A client of the run's store. Raises NotLive, StoreError."""
        try:
            address = address_of(self.run_dir)
            token = read_token(Path(address.token_file))
        except (UserError, StoreError) as error:
            raise NotLive(f"the store of this run cannot be reached: {error}") from error
        name = f"{address.location} {token}"
        with self._lock:
            if self._connected is not None:
                if self._connected[0] == name:
                    return self._connected[1]
                self._connected[1].close()
                self._connected = None
            store = connect(address.location, token=token, patience=PATIENCE, local=False)
            self._connected = name, store
            return store

    def _store_if_there(self) -> Store | None:
        with suppress(NotLive, StoreError):
            return self._store()
        return None

    def _stat(self) -> Stat | None:
        with suppress(NotLive, StoreError):
            return self._store().stat()
        return None

    def _size(self) -> int:
        return sum(path.stat().st_blocks * 512 for path in (self.run_dir / DATA).glob("*.segment"))

    @property
    def _update(self) -> str:
        try:
            config = json.loads((self.run_dir / CONFIG).read_text(encoding="utf-8"))
            return str(config["weights"]["update"])
        except (OSError, ValueError, LookupError, TypeError):
            return ""


class Runs:
    """The views of the runs that go on or that somebody has looked at lately. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._views: OrderedDict[Path, RunView] = OrderedDict()
        self._closed = threading.Event()
        self._keeper: threading.Thread | None = None

    def keep_up(self, live: Callable[[], Iterable[Path]]) -> None:
        """Read the ledgers of live runs as they grow, until `close`: whoever looks at one finds it read."""
        self._keeper = threading.Thread(target=self._keep_up, args=(live,), name="keep-up", daemon=True)
        self._keeper.start()

    def _keep_up(self, live: Callable[[], Iterable[Path]]) -> None:
        while not self._closed.wait(KEEP_UP_EVERY):
            for run_dir in islice(live(), KEPT_UP):
                # Whatever is wrong with a ledger is told to those who ask for it; the others are kept up all the same.
                with suppress(Exception):
                    self.view(run_dir).follower.catch_up()

    def view(self, run_dir: Path) -> RunView:
        gone: list[RunView] = []
        with self._lock:
            view = self._views.pop(run_dir, None) or RunView(run_dir)
            self._views[run_dir] = view
            while len(self._views) > REMEMBERED:
                gone.append(self._views.popitem(last=False)[1])
        for one in gone:
            one.close()
        return view

    def close(self) -> None:
        """May be called twice."""
        self._closed.set()
        if self._keeper is not None:
            self._keeper.join()
        with self._lock:
            views, self._views = list(self._views.values()), OrderedDict()
        for view in views:
            view.close()


def the_runs(request: Request) -> Runs:
    """Of the application: `app.state.runs`."""
    runs: Runs = request.app.state.runs
    return runs


TheRuns = Annotated[Runs, Depends(the_runs)]


def the_view(job_id: str, request: Request, runs: TheRuns) -> RunView:
    """The run of the job in the path. Raises NoSuchJob."""
    return runs.view(request.app.state.jobs.run_dir(job_id))


TheView = Annotated[RunView, Depends(the_view)]
