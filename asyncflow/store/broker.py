"""The shell around the table: one lock, the ledger, the account of segments, and those who wait. Knows no data.

Every operation is: decide (pure) → journal → apply → give those who wait what has become possible.

Who waits is parked: a record of what he wants, in the order in which he came. Whoever makes something possible hands it
to the first ones that can use it, under the same lock; nobody is woken to find nothing. So a thousand who wait cost no
more than one.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from asyncflow.clock import Clock, SystemClock
from asyncflow.errors import Closed, LedgerError, StoreError, UnknownFrame
from asyncflow.store.account import Account
from asyncflow.store.client import Counts, Grant, Place, Stat, Waited
from asyncflow.store.events import Committed, Event, Leased, PutId, Samples
from asyncflow.store.journal import Durability, Journal
from asyncflow.store.rows import NONE
from asyncflow.store.shelf import Shelf
from asyncflow.store.snapshot import Snapshots
from asyncflow.store.stat import counts_of, leases_of, staleness_of
from asyncflow.store.table import Table
from asyncflow.store.topics import ADMISSION, BYTES, FEEDER
from asyncflow.types import PolicyVersion

logger = logging.getLogger(__name__)

T = TypeVar("T")
Attempt = Callable[[float, bool], T | None]
"""Tries to get something at a time; the flag says that it is the last try."""

OnCommitted = Callable[[Committed, Callable[[Sequence[str]], tuple[Place, ...]]], None]
"""Is told of every step when the ledger has it and before the data may go. What it is given says where columns of the
trained and then the skipped samples are. Everybody waits meanwhile, and it must not raise: the step is committed."""

TIDY_EVERY = 0.1
"""Seconds between two removals of segments: writers are fastest in files that were used before."""
RETRY = 1.0
"""Seconds after which a chore that has failed (a full disk) is tried again."""


def _always() -> bool:
    return True


def _never() -> bool:
    return False


@dataclass(eq=False)
class _Parked(Generic[T]):
    """Somebody who waits for something that is not possible yet."""

    attempt: Attempt[T]
    alive: Callable[[], bool] = _always
    """Whether he still wants it."""
    wants: int = 1
    """How much he needs at least: who needs as much as somebody who could not be served cannot be served either."""
    again: Callable[[], bool] = _never
    """Whether it was given already, under the same name: then it is not what those before him wait for."""
    done: threading.Event = field(default_factory=threading.Event)
    result: T | None = None
    error: BaseException | None = None
    at_once: bool = False
    """It was possible when he asked, so the operation that served him was his own."""


class Broker:
    """Implements `Control` for the process that it is in; thread-safe."""

    def __init__(
        self,
        table: Table,
        journal: Journal,
        account: Account,
        shelf: Shelf,
        *,
        durability: Durability = "process",
        snapshots: Snapshots | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`shelf`: where the segments are."""
        self.table = table
        self.on_committed: OnCommitted | None = None
        self._journal = journal
        self._account = account
        self._shelf = shelf
        self.durability = durability
        self._snapshots = snapshots
        self.clock = clock or SystemClock()
        self._lock = threading.RLock()
        self._parked: dict[str, list[_Parked[Any]]] = {topic: [] for topic in (ADMISSION, *table.schema.stages)}
        self._wanted = 1, 0
        """Groups and bytes of the last put for which there was no room."""
        self._possible: dict[str, None] = {}
        """Topics for which something may have become possible, since those who wait were looked at."""
        self._alarm = threading.Condition(self._lock)
        """Wakes the housekeeper."""
        self._housekeeper: threading.Thread | None = None
        self._asleep_until = -math.inf
        """When the housekeeper wakes by itself; in the past while he is at work."""
        self._tidied = -math.inf
        self._closed = False
        self._sync_failed: LedgerError | None = None

    # -- Control -------------------------------------------------------------------------------------------------------

    def allocate(self) -> int:
        with self._operation():
            return self._account.allocate()

    def room(self, groups: int, *, size: int = 0, put: PutId | None = None, timeout: float) -> bool:
        self._check_fits(size)
        again = self._has_happened(put)

        def attempt(_now: float, _last: bool) -> bool | None:
            return again() or self._has_room(groups, size=size) or None

        return bool(self._wait(ADMISSION, _Parked(attempt, again=again), timeout))

    def admit(
        self,
        prompt_tokens: Sequence[int],
        *,
        frame: int,
        size: int,
        samples: Samples | None = None,
        put: PutId | None = None,
        priorities: Sequence[int] = (),
        timeout: float,
        alive: Callable[[], bool] = _always,
    ) -> int | None:
        self._check_fits(size)

        def attempt(_now: float, _last: bool) -> int | None:
            first = self.table.next_group
            events = self.table.admit(prompt_tokens, frame=frame, samples=samples, put=put, priorities=priorities)
            if events == []:
                return self.table.admitted_by(put) if put is not None else first
            # Not of a put that is repeated: its samples may have ended, and its segment with them.
            for named in (frame, *(() if samples is None else (samples.frame,))):
                self._check_frame(named)
            if not self._has_room(len(prompt_tokens), size=size) or events is None:
                return None
            self._perform(events, size=size)
            return first

        return self._wait(ADMISSION, _Parked(attempt, alive, again=self._has_happened(put)), timeout)

    def _has_happened(self, put: PutId | None) -> Callable[[], bool]:
        return _never if put is None else lambda: self.table.admitted_by(put) is not None

    def lease(
        self,
        stage: str,
        *,
        worker: str,
        max_rows: int,
        max_tokens: int | None = None,
        min_rows: int = 1,
        ranks: int | None = None,
        request: str | None = None,
        ttl: float,
        timeout: float,
        alive: Callable[[], bool] = _always,
    ) -> Grant | None:
        self._check_topic(stage)

        def attempt(now: float, last: bool) -> Grant | None:
            if request is not None and (granted := self.table.granted(stage, request, ranks=ranks)) is not None:
                return self._grant(granted)
            events = self.table.lease(
                stage,
                worker=worker,
                max_rows=max_rows,
                max_tokens=max_tokens,
                deadline=now + ttl,
                min_rows=1 if last else min_rows,
                ranks=ranks,
                request=request,
                now=now,
            )
            self._perform(events)
            leased = events[-1] if events else None
            return self._grant(leased.lease_id) if isinstance(leased, Leased) else None

        def again() -> bool:
            return (stage, request) in self.table.requests

        # A long row may be all that max_tokens leaves room for.
        wants = min(min_rows, max_rows) if max_tokens is None else 1
        return self._wait(stage, _Parked(attempt, alive, wants=wants, again=again), timeout)

    def renew(self, lease_id: int, *, ttl: float) -> None:
        with self._operation() as now:
            self._perform(self.table.renew(lease_id, deadline=now + ttl))

    def ack(
        self,
        lease_id: int,
        sample_ids: Sequence[int],
        *,
        columns: int,
        frame: int,
        size: int,
        tokens: Sequence[int] = (),
        oldest: Sequence[int | None] = (),
        newest: Sequence[int | None] = (),
    ) -> None:
        with self._operation():
            events = self.table.ack(
                lease_id, sample_ids, columns=columns, frame=frame, tokens=tokens, oldest=oldest, newest=newest
            )
            if frame != NONE or columns:
                self._check_frame(frame)
            self._perform(events, size=size)

    def nack(self, lease_id: int, sample_ids: Sequence[int], *, reason: str, final: bool = False) -> None:
        with self._operation():
            self._perform(self.table.nack(lease_id, sample_ids, reason=reason, final=final))

    def gone(self, worker: str) -> None:
        with self._operation():
            self._perform(self.table.gone(worker))

    def commit(
        self,
        *,
        leases: Sequence[int],
        trained: Sequence[int],
        skipped: Sequence[int],
        version: PolicyVersion,
        masked: Mapping[int, PolicyVersion] | None = None,
    ) -> None:
        step = {"leases": leases, "trained": trained, "skipped": skipped}
        with self._operation():
            self._perform(self.table.commit(**step, version=version, masked=masked))

    def drop(self, sample_ids: Sequence[int], *, reason: str) -> None:
        with self._operation():
            self._perform(self.table.drop(sample_ids, reason=reason))

    def restore(self, sample_ids: Sequence[int]) -> None:
        with self._operation():
            self._perform(self.table.restore(sample_ids))

    def prioritise(self, priority: int, *, samples: Sequence[int] = (), groups: Sequence[int] = ()) -> None:
        with self._operation():
            self._perform(self.table.prioritise(priority, samples=samples, groups=groups))

    def serve(self, engine: str, version: PolicyVersion | None) -> None:
        with self._operation():
            self._perform(self.table.serve(engine, version))

    def amend(self, *, max_staleness: int | None = None, last_version: int | None = None) -> None:
        with self._operation():
            self._perform(self.table.amend(max_staleness=max_staleness, last_version=last_version))

    def checkpointed(self, version: PolicyVersion, *, oldest: PolicyVersion) -> None:
        with self._operation():
            self._perform(self.table.checkpointed(version, oldest=oldest))

    def held(self, lease_id: int) -> NDArray[np.int64]:
        with self._operation():
            return self.table.held(lease_id) if lease_id in self.table.leases else np.zeros(0, np.int64)

    def places(self, sample_ids: Sequence[int], columns: Sequence[str]) -> tuple[Place, ...]:
        with self._operation():
            return self.table.places(np.array(sample_ids, np.int64), columns)

    def columns_of(self, sample_ids: Sequence[int]) -> tuple[str, ...]:
        """Columns that all of some open samples have. Raises StoreError for samples that have ended."""
        with self._operation():
            return self.table.columns_of(np.array(sample_ids, np.int64))

    def awaited(self, topic: str) -> str:
        self._check_topic(topic)
        with self._operation():
            return self._awaited(topic)

    def _awaited(self, topic: str) -> str:
        groups, size = self._wanted
        waits = self.table.awaited(topic, groups)
        # Where nothing else keeps admission from going on, a stage that waits for it waits for what it waits for.
        return BYTES if (waits == FEEDER or topic == ADMISSION) and self._too_many_bytes(size) else waits

    def counts(self) -> Counts:
        with self._lock:
            return counts_of(self.table, self._account.bytes)

    def stat(self) -> Stat:
        with self._operation() as now:
            waiting = {topic: len(parked) for topic, parked in self._parked.items() if parked}
            return Stat(
                counts=counts_of(self.table, self._account.bytes),
                staleness=staleness_of(self.table),
                leases=leases_of(self.table, now),
                segments=self._account.segments,
                waiting=waiting,
                awaited={topic: self._awaited(topic) for topic in waiting},
                durability=self.durability,
            )

    def waited_for(self) -> tuple[Waited, ...]:
        with self._lock:
            return tuple(
                Waited(sample_id=row.sample_id, group_id=row.group_id, state=row.state.value, worker=worker)
                for row, worker in self.table.waited_for()
            )

    def waiting(self) -> int:
        """How many calls wait for something."""
        with self._lock:
            return sum(map(len, self._parked.values()))

    def perform(self, events: Sequence[Event]) -> None:
        """Decisions that somebody else has taken, from this table as it is."""
        with self._lock:
            self._perform(events)
            lsn = self._journal.lsn
        if self.durability == "power":
            self._journal.sync_to(lsn)

    def sync(self) -> int:
        """See that all data and decisions so far survive a power cut.

        Returns the ledger's last lsn. Raises LedgerError, after which the disk is not to be trusted. Nobody waits for
        it meanwhile.
        """
        with self._operation():
            if self._sync_failed is not None:
                raise LedgerError(str(self._sync_failed)) from self._sync_failed
            lsn, segments = self._journal.lsn, self._account.unsynced()
        try:
            self._shelf.sync(segments)
        except OSError as error:
            failure = LedgerError(
                f"the data of the samples cannot be synced ({error}), so nobody knows what of them is on disk: "
                "see that their disk works, start the machine again, and then the run"
            )
            with self._lock:
                self._sync_failed = failure  # the system tells it once: the next sync would seem to work
            raise failure from error
        with self._lock:
            self._account.synced(segments)
        self._journal.sync()
        self.reclaim()
        return lsn

    def reclaim(self) -> None:
        """Remove the segments that nobody needs, once the ledger that says so is on disk: one that has lost its end in
        a power cut would need them again. Raises LedgerError."""
        with self._lock:
            unneeded = self._account.unneeded()
        left = list(unneeded)
        try:
            if unneeded:
                self._journal.sync()
            while left:
                self._account.remove(left[:1])
                del left[0]
        finally:
            if left:
                with self._lock:
                    self._account.still_there(left)

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                try:
                    self.reclaim()
                except (LedgerError, OSError):
                    logger.warning("segments that nobody needs stay until the store is opened again", exc_info=True)
                self._close()
                self._shelf.close()

    def _close(self) -> None:
        self._closed = True
        if self._snapshots is not None:
            self._snapshots.close()
        self._journal.close()
        for waiters in self._parked.values():
            for waiter in waiters:
                waiter.error = waiter.error or Closed("the store is closed")
                waiter.done.set()
            waiters.clear()
        self._alarm.notify_all()

    # -- the shell -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _operation(self) -> Iterator[float]:
        """Hold the lock for one operation, and serve those who wait behind it; the value is the time at its begin."""
        with self._lock:
            if self._closed:
                raise Closed("the store is closed")
            now = self.clock.monotonic()
            self._expire(now)
            try:
                yield now
            finally:
                self._serve(now)
                if self.durability == "memory":
                    self._account.remove(self._account.unneeded())
                elif self._account.has_garbage:
                    self._see_to_it()
            lsn = self._journal.lsn
        if self.durability == "power":
            self._journal.sync_to(lsn)

    def _expire(self, now: float) -> None:
        while (deadline := self.table.next_deadline()) is not None and deadline <= now:
            events = self.table.expire(now)
            if not events:
                return
            self._perform(events)

    def _wait(
        self,
        topic: str,
        parked: _Parked[T],
        timeout: float,
    ) -> T | None:
        """What his attempt gives, as soon as it gives something; None when time is up. Those before him go first."""
        try:
            self._park(topic, parked, timeout)
            if timeout > 0:
                parked.done.wait(timeout)
        except BaseException:  # Ctrl-C: what nobody waits for any more is given to nobody
            with self._lock, suppress(ValueError):
                self._parked[topic].remove(parked)
            raise
        return self._collect(topic, parked)

    def _park(self, topic: str, parked: _Parked[Any], timeout: float) -> None:
        """Try, and get into line if it is not possible yet. Waits for nobody."""
        with self._operation() as now:
            if self._may_go_first(topic, parked) and (result := parked.attempt(now, timeout <= 0)) is not None:
                parked.result, parked.at_once = result, True
                parked.done.set()
                return
            self._parked[topic].append(parked)
            if timeout > 0:
                self._see_to_it()

    def _may_go_first(self, topic: str, parked: _Parked[Any]) -> bool:
        """Whether he takes nothing from those in line before him. In a stage's line nobody could use what there is, or
        he would have it."""
        line = self._parked[topic]
        return topic != ADMISSION or not line or line[0] is parked or parked.again()

    def _collect(self, topic: str, parked: _Parked[T]) -> T | None:
        """What somebody has got by now, who waits no longer."""
        if not parked.done.is_set():
            self._leave(topic, parked)
        if parked.error is not None:
            raise parked.error
        if self.durability == "power" and parked.result is not None and not parked.at_once:
            self._journal.sync_to(self._journal.lsn)
        return parked.result

    def _leave(self, topic: str, parked: _Parked[Any]) -> None:
        """His time is up: one last try, when those before him have had theirs."""
        with self._operation() as now:
            if parked.done.is_set():
                return
            self._possible[topic] = None
            self._serve(now)
            if parked.done.is_set():
                return
            first = self._may_go_first(topic, parked)
            self._parked[topic].remove(parked)
            # He may have kept those behind him from something that they can use.
            self._possible[topic] = None
            if first:
                parked.result = parked.attempt(now, True)

    def _serve(self, now: float) -> None:
        """Give those who wait what has become possible, which may make more possible."""
        while self._possible:
            topic = next(iter(self._possible))
            del self._possible[topic]
            stuck = math.inf
            for parked in list(self._parked[topic]):
                if parked.wants >= stuck and not parked.again():
                    continue
                if not parked.alive():
                    self._parked[topic].remove(parked)
                    parked.done.set()
                    continue
                try:
                    parked.result = parked.attempt(now, False)
                except Exception as error:  # it is his, and not that of whose operation this is
                    parked.error = error
                if parked.result is None and parked.error is None:
                    # Puts do not overtake each other, or small ones would keep a large one from its place for ever.
                    stuck = 0 if topic == ADMISSION else min(stuck, parked.wants)
                    continue
                if parked in self._parked[topic]:  # unless the store has closed on this
                    self._parked[topic].remove(parked)
                parked.done.set()

    def _perform(self, events: Sequence[Event], *, size: int = 0) -> None:
        """Journal decisions, then apply them. All of one operation or nothing. `size`: bytes that they bring."""
        if not events:
            return
        self._journal.append(events, self.clock.wall())
        try:
            self._apply(events, size)
        except BaseException:
            # The ledger has it and the table has not. Nothing that this process says can be trusted any more; the next
            # one reads the ledger.
            logger.critical("the table cannot follow its ledger: the store stops", exc_info=True)
            self._close()
            raise
        if self._snapshots is not None:
            self._snapshots.count(self.table, events)
        if self._asleep_until > self._next_chore():
            self._alarm.notify_all()

    def _apply(self, events: Sequence[Event], size: int) -> None:
        for event in events:
            if isinstance(event, Committed) and self.on_committed is not None:
                ids = np.array(event.trained + event.skipped, np.int64)
                self.on_committed(event, lambda columns, ids=ids: self.table.places(ids, columns))  # type: ignore[misc]
            released = self.table.released_by(event)
            needed = self.table.needed_by(event)
            self._possible |= dict.fromkeys(sorted(self.table.apply(event)))
            for frame, rows in needed.items():
                self._account.hold(frame, rows, size // len(needed))
            for frame, rows in released.items():
                self._account.release(frame, rows)
            if released and self.table.terms.max_bytes is not None:
                self._possible[ADMISSION] = None

    def _grant(self, lease_id: int) -> Grant:
        lease, schema = self.table.leases[lease_id], self.table.schema
        return Grant(
            lease_id=lease_id,
            stage=lease.stage,
            sample_ids=lease.rows,
            attempts=self.table.attempts(lease.stage, lease.rows),
            deadline=lease.deadline,
            places=self.table.places(lease.rows, schema.stages[lease.stage].needs),
            oldest_trainable=self.table.oldest_trainable(lease_id) if lease.stage == schema.train.name else 0,
            shares=lease.shares,
        )

    def _check_fits(self, size: int) -> None:
        most = self.table.terms.max_bytes
        if most is not None and size > most:
            raise StoreError(f"a put of {size} bytes is more than max_bytes {most} ever leaves: put fewer at a time")

    def _has_room(self, groups: int, *, size: int) -> bool:
        self.table.check_room(groups)
        room = not self._too_many_bytes(size) and self.table.capacity() >= groups * self.table.group_size
        self._wanted = (1, 0) if room else (groups, size)
        return room

    def _too_many_bytes(self, size: int) -> bool:
        """Whether so many bytes more are too many. Never before there are as many samples as a step takes: with fewer
        there would never be a step, and nothing would go."""
        most = self.table.terms.max_bytes
        return most is not None and self._account.bytes + max(size, 1) > most and self.table.makes_a_step

    def _check_frame(self, frame: int) -> None:
        if not self._account.knows(frame):
            raise UnknownFrame(f"frame {frame} is in no segment that there is: write it again")

    def _check_topic(self, topic: str) -> None:
        if topic not in self._parked:
            raise StoreError(f"there is no stage {topic!r}; the stages are {', '.join(self.table.schema.stages)}")

    # -- housekeeping --------------------------------------------------------------------------------------------------

    def _see_to_it(self) -> None:
        """There is something that has to happen at its time although nobody calls: leases that run out, while somebody
        waits for their rows, and the removal of segments."""
        if self._housekeeper is None:
            self._housekeeper = threading.Thread(target=self._keep_house, name="store-housekeeper", daemon=True)
            self._housekeeper.start()
        elif self._asleep_until > self._next_chore():
            self._alarm.notify_all()

    def _next_chore(self) -> float:
        """When there is something to do."""
        deadline = self.table.next_deadline()
        tidy = self._tidied + TIDY_EVERY if self._account.has_garbage else math.inf
        return tidy if deadline is None else min(deadline, tidy)

    def _keep_house(self) -> None:
        while True:
            with self._lock:
                while not self._closed and (wait := self._next_chore() - self.clock.monotonic()) > 0:
                    self._asleep_until = self._next_chore()
                    self._alarm.wait(None if wait == math.inf else wait)
                self._asleep_until = -math.inf
                if self._closed:
                    return
            try:
                self._do_chores()
            except Closed:
                return
            except Exception:  # the disk's, or too many open files: without its housekeeper the store would fill up
                with self._lock:
                    if self._closed:
                        return
                    logger.exception("the store's housekeeping has to wait")
                    self._alarm.wait_for(lambda: self._closed, RETRY)

    def _do_chores(self) -> None:
        """What is due. Raises Closed, LedgerError."""
        with self._operation() as now:
            tidy = self._account.has_garbage and self._tidied + TIDY_EVERY <= now
            if tidy:
                self._tidied = now
        if tidy:
            self.reclaim()
