"""Looks on while the others work: names what takes too long, gives it back, and ends a run in which nothing happens.

A heartbeat keeps the leases of a process that lives, also of one that hangs, so leases alone never end a hang. The
decisions (`slow`, `overdue`, `Progress`, `who_waits`) are pure functions of plain values; the worker only looks at the
clock and does what they say.

What has a deadline of its own elsewhere: calls of reward functions (`reward_timeout`), the start and stop of an engine,
a weight update, an evaluation.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from asyncflow.clock import Clock, SystemClock
from asyncflow.errors import RunFailed
from asyncflow.store.client import Counts, StoreClient, Waited
from asyncflow.workers.actor_update import ActorUpdate
from asyncflow.workers.alarms import Alarms
from asyncflow.workers.base import PATIENCE, Worker
from asyncflow.workers.host import Host
from asyncflow.workers.rollout import Rollouts, UnderWay

SLOW_FACTOR = 10.0
"""A completion is slow when it takes this many times as long as the median of the others …"""
SLOW_SECONDS = 60.0
"""… and longer than this."""
COMPARED = 8
"""Completions that must have ended before one can be slow."""
AWAY = 60.0
"""Seconds between two turns after which the run was paused, or the machine asleep: that is no stall."""
STALLS = 4.0
"""Times `stall_timeout` without progress after which the run stops."""


def slow(under_way: Sequence[UnderWay], durations: Sequence[float], now: float) -> list[UnderWay]:
    """Those that take much longer than the completions that have ended took (seconds)."""
    if len(durations) < COMPARED:
        return []
    limit = max(SLOW_SECONDS, SLOW_FACTOR * statistics.median(durations))
    return [one for one in under_way if now - one.began > limit]


def overdue(under_way: Sequence[UnderWay], timeout: float, now: float) -> list[UnderWay]:
    """Those that are to be given back."""
    return [one for one in under_way if now - one.began > timeout]


class Progress:
    """Since when nothing has changed."""

    def __init__(self, now: float) -> None:
        self._since = now
        self._seen: Hashable = None

    def stalled(self, seen: Hashable, now: float) -> float:
        """Seconds for which everything was as in `seen`."""
        if seen != self._seen:
            self._seen, self._since = seen, now
        return now - self._since


def who_waits(counts: Counts, waited: Sequence[Waited], *, learner_busy: bool) -> str:
    """In words: who holds up whom at this moment, with the samples that it is about."""
    if learner_busy:
        return f"everybody waits for the learner, which is computing step {counts.learner.n + 1}"
    if waited:
        parts: dict[tuple[str, str | None], list[Waited]] = {}
        for one in waited:
            parts.setdefault((one.state, one.worker), []).append(one)
        said = [
            f"{_named(rows)} ({state}, {f'held by {worker}' if worker else 'taken by nobody'})"
            for (state, worker), rows in parts.items()
        ]
        return f"the learner waits for {'; '.join(said)}"
    if not counts.open and not counts.capacity:
        served = ", ".join(f"{engine} serves {version}" for engine, version in counts.served.items())
        return (
            f"nothing may be admitted: the learner is at {counts.learner}, and {served or 'no engine serves anything'}"
        )
    if not counts.open:
        return "the store waits for prompts from the feeder"
    return "all samples of the step are ready, and the learner has not taken them"


def _named(rows: Sequence[Waited]) -> str:
    shown = ", ".join(f"{row.sample_id} of group {row.group_id}" for row in rows[:4])
    return f"sample{'s' if len(rows) > 1 else ''} {shown}" + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")


class Watchdog(Worker):
    """Consumes looks at the run, produces alarms. Waits for nobody."""

    name = "watchdog"
    pauses = True

    def __init__(
        self,
        store: StoreClient,
        host: Host,
        rollout: Rollouts,
        learner: ActorUpdate,
        alarms: Alarms,
        *,
        rollout_timeout: float,
        stall_timeout: float,
        resting: Callable[[], bool] = lambda: False,
        clock: Clock | None = None,
    ) -> None:
        """Timeouts in seconds. `resting`: whether somebody wants it so that nothing happens."""
        self._resting = resting
        self._store = store
        self._host = host
        self._rollout = rollout
        self._learner = learner
        self._alarms = alarms
        self._rollout_timeout = rollout_timeout
        self._stall_timeout = stall_timeout
        self._stop_after = max(STALLS * stall_timeout, 2 * rollout_timeout)
        self._clock = clock or SystemClock()
        self._turned = self._clock.monotonic()
        self._progress = Progress(self._turned)
        self._named: set[str] = set()
        """Requests that have been called slow."""
        self._stalled = False
        self._wake = threading.Event()

    def turn(self) -> None:
        now = self._clock.monotonic()
        if now - self._turned > AWAY or self._resting():
            self._progress = Progress(now)
        self._turned = now
        self.look()
        self._wake.wait(PATIENCE)

    def stop(self) -> None:
        """End the wait of the current turn."""
        self._wake.set()

    def look(self) -> None:
        """Look at everything once. Raises RunFailed when nothing has happened for very long."""
        now = self._clock.monotonic()
        under_way = self._rollout.under_way()
        self._named &= {one.request_id for one in under_way}
        late = overdue(under_way, self._rollout_timeout, now)
        for one in late:
            self._give_up(one, now)
        for one in slow(under_way, self._host.durations(), now):
            if one not in late and one.request_id not in self._named:
                self._named.add(one.request_id)
                self._alarms.sound(
                    "rollout_slow",
                    f"{_said(one, now)}, much longer than the others: it is given back after "
                    f"{self._rollout_timeout:g} s (rollout.timeout)",
                    **_details(one, now),
                )
        self._look_for_a_stall(now)

    def _give_up(self, one: UnderWay, now: float) -> None:
        self._alarms.sound(
            "rollout_timeout",
            f"{_said(one, now)}, longer than rollout.timeout ({self._rollout_timeout:g} s): it is given back",
            **_details(one, now),
        )
        self._rollout.give_up(
            one.request_id, f"its completion did not end within {self._rollout_timeout:g} s (rollout.timeout)"
        )

    def _look_for_a_stall(self, now: float) -> None:
        counts = self._store.counts()
        seen = (
            counts.admitted,
            counts.trained,
            counts.quarantined,
            tuple(counts.dropped.items()),
            tuple(counts.states.items()),
            tuple(counts.served.items()),
            counts.learner,
            self._host.finished,
            self._learner.passes,
        )
        seconds = self._progress.stalled(seen, now)
        if seconds < self._stall_timeout:
            self._stalled = False
            return
        stops = seconds >= self._stop_after
        if self._stalled and not stops:
            return
        self._stalled = True
        waited = self._store.waited_for()
        who = who_waits(counts, waited, learner_busy=self._learner.computing)
        text = f"nothing has happened for {seconds:.0f} s: {who}"
        self._alarms.sound(
            "stalled",
            text,
            severity="error" if stops else "warning",
            seconds=seconds,
            samples=[one.sample_id for one in waited],
        )
        if stops:
            raise RunFailed(f"{text}; raise stall_timeout ({self._stall_timeout:g} s) if this is normal")


def _said(one: UnderWay, now: float) -> str:
    return (
        f"sample {one.sample_id} of group {one.group_id} (attempt {one.attempt}) has been in {one.engine} for "
        f"{now - one.began:.0f} s"
    )


def _details(one: UnderWay, now: float) -> dict[str, Any]:
    return {
        "sample": one.sample_id,
        "group": one.group_id,
        "attempt": one.attempt,
        "worker": one.engine,
        "seconds": now - one.began,
    }
