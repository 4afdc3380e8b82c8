"""The one loop on which every worker runs, and the leases that it holds meanwhile.

A worker makes one `turn` after the other: wait a moment for something to do, and do it. A stage's turn is
lease → process → ack; a heartbeat keeps the lease while it is being processed. What goes wrong with a sample is data:
the sample is given back with the reason. What goes wrong with the worker itself ends its thread, and the run.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import pyarrow as pa

from asyncflow.errors import Closed, LeaseLost
from asyncflow.store.client import Lease, StoreClient
from asyncflow.store.schema import Stage
from asyncflow.types import Timeline

logger = logging.getLogger(__name__)

PATIENCE = 0.5
"""Seconds for which a turn waits for something to do, before it looks whether the run is being stopped."""

PAUSE = "pause"
"""What a worker waits for while the run is paused …"""
DRAIN = "drain"
"""… and while somebody has asked it to start nothing."""

LEASE_TTL = 30.0
"""Seconds after which the rows of a worker that gives no sign of life go to another one."""


class Worker(ABC):
    """A loop that can be stopped."""

    name: str
    pauses: ClassVar[bool] = False
    """Whether it makes no turns while the run is paused: who starts something does, who finishes something does not."""
    drained: bool = False
    """Whether it makes no turns until somebody takes this back: what it has, it finishes."""
    beat: float | None = None
    """When it was last seen to live, on the machine's monotonic clock; None before it has begun."""

    @abstractmethod
    def turn(self) -> None:
        """Wait at most about `PATIENCE` seconds for something to do, and do it."""

    def paused(self, cause: str) -> None:  # noqa: B027
        """Called from time to time while it makes no turns, with the reason: `PAUSE` or `DRAIN`."""

    def run(self, stopping: threading.Event, going: threading.Event | None = None) -> None:
        """Make turns until the run stops or the store closes; those who pause make none while `going` is not set.

        What a turn raises is a failure of the run.
        """
        try:
            while not stopping.is_set():
                self.beat = time.monotonic()
                if self.drained:
                    self.paused(DRAIN)
                    stopping.wait(PATIENCE)
                elif going is None or not self.pauses or going.is_set():
                    self.turn()
                else:
                    self.paused(PAUSE)
                    going.wait(PATIENCE)
        except Closed:
            if not stopping.is_set():
                raise


class HeldLease:
    """A lease whose rows are being worked on, by one thread or several.

    Rows that were lost meanwhile are logged and left out, not an error.
    """

    def __init__(self, lease: Lease, store: StoreClient, heartbeat: Heartbeat) -> None:
        self.lease = lease
        self._store = store
        self._heartbeat = heartbeat
        self._pending = {row.sample_id for row in lease.rows}
        self._lock = threading.Lock()
        heartbeat.add(lease.lease_id)

    def ack(self, sample_ids: Sequence[int], columns: pa.RecordBatch) -> None:
        """Append columns to rows and give them back."""
        try:
            self._store.ack(self.lease.lease_id, sample_ids, columns)
        except LeaseLost as error:
            logger.warning("%s: late results are thrown away: %s", self.lease.stage, error)
            if rest := _rest(sample_ids, error):
                self.ack([sample_ids[place] for place in rest], columns.take(rest))
        self.forget(sample_ids)

    def nack(self, sample_ids: Sequence[int], reason: str, *, final: bool = False) -> None:
        """Give rows back undone; `final` quarantines them."""
        try:
            self._store.nack(self.lease.lease_id, sample_ids, reason=reason, final=final)
        except LeaseLost as error:
            logger.warning("%s: rows are gone already: %s", self.lease.stage, error)
            if rest := _rest(sample_ids, error):
                self.nack([sample_ids[place] for place in rest], reason, final=final)
        self.forget(sample_ids)

    def nack_rest(self, reason: str) -> None:
        """Give back whatever is still held."""
        with self._lock:
            rest = sorted(self._pending)
        if rest:
            self.nack(rest, reason)

    def renew(self) -> None:
        """Make sure that what is still held is held for a whole time-to-live. Raises LeaseLost."""
        with self._lock:
            held = bool(self._pending)
        if held:
            self._store.renew(self.lease.lease_id, ttl=self._heartbeat.ttl)

    def forget(self, sample_ids: Sequence[int]) -> None:
        """Rows that left the lease in another way (committed, dropped)."""
        with self._lock:
            self._pending.difference_update(sample_ids)
            held = bool(self._pending)
        if not held:
            self._heartbeat.remove(self.lease.lease_id)


def _rest(sample_ids: Sequence[int], error: LeaseLost) -> list[int]:
    """Places of the rows that are still held; none when the error names no row, so that every try has fewer rows."""
    rest = [place for place, sample_id in enumerate(sample_ids) if sample_id not in error.rows]
    return rest if len(rest) < len(sample_ids) else []


class Heartbeat(Worker):
    """Keeps the leases of this process's workers alive while they work on them.

    A worker that hangs keeps its rows: this knows only that its process lives. Who takes too long is the watchdog's
    matter (`asyncflow.workers.watchdog`).
    """

    name = "heartbeat"

    def __init__(self, store: StoreClient, *, ttl: float = LEASE_TTL) -> None:
        self.ttl = ttl
        self._store = store
        self._leases: set[int] = set()
        self._lock = threading.Lock()
        self._wake = threading.Event()

    def add(self, lease_id: int) -> None:
        with self._lock:
            self._leases.add(lease_id)

    def remove(self, lease_id: int) -> None:
        with self._lock:
            self._leases.discard(lease_id)

    def stop(self) -> None:
        """End the wait of the current turn."""
        self._wake.set()

    def turn(self) -> None:
        self._wake.wait(self.ttl / 3)
        with self._lock:
            leases = sorted(self._leases)
        for lease_id in leases:
            try:
                self._store.renew(lease_id, ttl=self.ttl)
            except LeaseLost:
                self.remove(lease_id)


class StageWorker(Worker):
    """A worker of one stage of the pipeline."""

    def __init__(self, stage: Stage, store: StoreClient, heartbeat: Heartbeat, timeline: Timeline) -> None:
        self.name = stage.name
        self.stage = stage
        self.store = store
        self.heartbeat = heartbeat
        self.timeline = timeline

    @abstractmethod
    def process(self, held: HeldLease) -> None:
        """Compute and ack. An exception gives back what is still held and goes on to the supervisor."""

    def room(self) -> int:
        """Rows that the worker can take now; 0 after having waited `PATIENCE` seconds in vain."""
        return 64

    def max_tokens(self) -> int | None:
        """Tokens that one lease may have."""
        return None

    def idle(self) -> None:
        """Called when a turn has found nothing to do."""

    def working(self) -> None:
        """Say in the timeline that there is something to do."""
        self.timeline.enter(self.name, "busy")

    def waiting(self) -> None:
        """Say in the timeline that there is nothing to do, and why."""
        self.timeline.enter(self.name, "idle", self.store.awaited(self.name))

    def paused(self, cause: str) -> None:
        self.timeline.enter(self.name, "blocked", cause)

    def turn(self) -> None:
        room = self.room()
        if not room:
            return
        lease = self._lease(room, 0.0)
        if lease is None:
            self.waiting()
            lease = self._lease(room, PATIENCE)
        if lease is None:
            self.idle()
            return
        self.working()
        held = HeldLease(lease, self.store, self.heartbeat)
        try:
            self.process(held)
        except BaseException as error:
            if not isinstance(error, Closed):
                held.nack_rest(f"{self.name} failed: {type(error).__name__}: {error}")
            raise

    def _lease(self, room: int, timeout: float) -> Lease | None:
        return self.store.lease(
            self.name,
            worker=self.name,
            max_rows=room,
            max_tokens=self.max_tokens(),
            ttl=self.heartbeat.ttl,
            timeout=timeout,
        )
