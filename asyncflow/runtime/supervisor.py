"""Runs the workers in threads and notices when one ends: a loop that returns before it was told to is an error."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from asyncflow.errors import RunFailed
from asyncflow.store.client import StoreClient
from asyncflow.workers.base import PATIENCE, Worker

logger = logging.getLogger(__name__)

JOIN_TIMEOUT = 120.0
"""Seconds that a worker has to finish its turn when the run ends."""

MIN_FINISHED = 16
"""Samples that must have ended before the share of failed ones says anything."""


class Supervisor:
    """Threads of one run. The first failure is kept and ends the run."""

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self.going = threading.Event()
        """Not set while the run is paused."""
        self.going.set()
        self._wake = threading.Event()
        self._threads: list[threading.Thread] = []
        self._failure: tuple[str, BaseException] | None = None

    def start(self, worker: Worker) -> None:
        """Run a worker in a thread of its own."""
        thread = threading.Thread(target=self._run, args=(worker,), name=worker.name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self, worker: Worker) -> None:
        try:
            worker.run(self.stopping, self.going)
            if not self.stopping.is_set():
                raise RuntimeError("it ended by itself")
        except BaseException as error:
            if self.stopping.is_set():
                logger.debug("worker %s, while it was stopped", worker.name, exc_info=error)
            elif self._failure is None:
                self._failure = (worker.name, error)
            self._wake.set()

    def finish(self) -> None:
        """Say that there is nothing left to wait for. From any thread."""
        self._wake.set()

    def wait(self) -> None:
        """Wait until somebody calls `finish`. Raises RunFailed as soon as a worker fails."""
        while not self._wake.wait(PATIENCE):
            pass  # a signal whose handler ran while the main thread fell asleep is seen only when it wakes
        self.check()

    @property
    def failed(self) -> str | None:
        """Name of the worker that failed first, before it was told to stop."""
        return None if self._failure is None else self._failure[0]

    def check(self) -> None:
        """Raise RunFailed when a worker has failed before it was told to stop."""
        if self._failure is not None:
            name, error = self._failure
            raise RunFailed(f"{name}: {error}") from error

    def stop(self, wake: Callable[[], None]) -> list[str]:
        """Tell all workers to stop and wait for them; `wake` ends waits that are long. May be called twice.

        Returns the names of those that did not stop in time.
        """
        self.stopping.set()
        wake()
        deadline = time.monotonic() + JOIN_TIMEOUT
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return [thread.name for thread in self._threads if thread.is_alive()]


class FailureLimit(Worker):
    """Ends the run when too large a share of the samples fails: one bad sample is data, a fifth of them is a bug."""

    name = "failure limit"

    def __init__(self, store: StoreClient, limit: float) -> None:
        self._store = store
        self._limit = limit
        self._pause = threading.Event()

    def turn(self) -> None:
        counts = self._store.counts()
        finished = counts.trained + sum(counts.dropped.values()) + counts.quarantined
        if finished >= MIN_FINISHED and counts.quarantined > self._limit * finished:
            raise RunFailed(
                f"{counts.quarantined} of {finished} finished samples failed, more than max_failed_share "
                f"({self._limit:g}): the reasons are in the ledger, `asyncflow audit` lists them"
            )
        self._pause.wait(PATIENCE)
