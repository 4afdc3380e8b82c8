"""Time as an argument: everything that measures or waits takes a `Clock`, so that tests can hold it."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Two clocks: one to measure with, one to date with."""

    def monotonic(self) -> float:
        """Seconds from an arbitrary origin; never goes back. Leases and waits use this one."""

    def wall(self) -> float:
        """Seconds since the epoch. Only for dates that people read."""


class SystemClock:
    """The machine's clocks."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()


class ManualClock:
    """A clock that stands still until it is moved; for tests and simulation."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Move the clock; ValueError for a negative amount."""
        if seconds < 0:
            raise ValueError(f"a clock cannot go back by {-seconds} s")
        self.now += seconds
