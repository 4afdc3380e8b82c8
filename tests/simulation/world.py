"""Time that stands still until everybody waits, and one list of what happens next. One seed, one at a time.

Processes run ordinary blocking code (`RemoteControl`, `Store`), so each has a thread, of which exactly one runs: it has
the baton until it waits, and who comes next is never left to the system.
"""

from __future__ import annotations

import heapq
import random
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import xxhash

MOST = 200_000
SEVERITY = (0.0, 0.3, 1.0, 4.0, 12.0)


class Killed(BaseException):
    """A process is no more. No `except Exception` keeps it alive."""


class Process:
    """What dies at once: its locks go, its calls are cut, and whatever it was doing ends."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = False


class Task:
    """What one process does. It runs while it has the baton."""

    def __init__(self, process: Process, work: Callable[[], None]) -> None:
        self.process = process
        self.done: Callable[[], bool] = lambda: True
        self.deadline = 0.0
        self.error: BaseException | None = None
        self.over = False
        self._work = work
        self._mine, self._others = threading.Lock(), threading.Lock()
        self._mine.acquire()
        self._others.acquire()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def resume(self) -> None:
        """Let it go on until it waits or ends. Raises what it raised."""
        self._mine.release()
        self._others.acquire()
        if self.over:
            self._thread.join()
        if self.error is not None:
            raise self.error

    def wait(self, done: Callable[[], bool], deadline: float) -> None:
        self.done, self.deadline = done, deadline
        self._others.release()
        self._mine.acquire()

    def _run(self) -> None:
        self._mine.acquire()
        _CURRENT.task = self
        try:
            self._work()
        except Killed:
            pass
        except BaseException as error:
            self.error = error
        self.over = True
        self._others.release()


class _Current(threading.local):
    task: Task | None = None


_CURRENT = _Current()


class World:
    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.chance = random.Random(seed)
        self.now = 0.0
        self.wall_offset = 1.7e9
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._tasks: list[Task] = []
        self._ends = False
        self.happened = 0
        self.faults: Counter[tuple[str, str]] = Counter()
        """What went wrong, and where it hit."""
        self.calm = False
        """From here on nothing goes wrong any more."""
        self._often: dict[str, float] = {}
        """Kind of fault → how often it happens in this life: some kinds never, some all the time."""
        self._history = xxhash.xxh3_64()
        self.log: list[str] = []

    # Clock

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now + self.wall_offset

    # what happens

    def at(self, delay: float, call: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._queue, (self.now + delay, self._number, call))

    def spawn(self, process: Process, work: Callable[[], None]) -> None:
        """A process that does this, from now on."""
        self._tasks.append(Task(process, work))

    def wait(self, done: Callable[[], bool], timeout: float) -> None:
        """Let others go on until something is the case, or time is up."""
        deadline, task = self.now + timeout, _CURRENT.task
        if task is not None:
            if not done():
                task.wait(done, deadline)
            if self._ends or task.process.dead:
                raise Killed
            return
        while not done():
            if not self._go_on(deadline):
                self.now = max(self.now, deadline)
                return

    def _go_on(self, deadline: float) -> bool:
        """Whatever comes next, up to a time; False when nothing does."""
        assert self.happened < MOST, "it never ends"
        for task in self._tasks:
            if task.process.dead or task.done():
                self._resume(task)
                return True
        late = min(self._tasks, key=lambda task: task.deadline, default=None)
        at = self._queue[0][0] if self._queue else deadline + 1
        if late is not None and late.deadline <= min(at, deadline):
            self.now = max(self.now, late.deadline)
            self._resume(late)
            return True
        if at > deadline:
            return False
        at, _, call = heapq.heappop(self._queue)
        self.now = max(self.now, at)
        self.happened += 1
        call()
        return True

    def _resume(self, task: Task) -> None:
        self.happened += 1
        try:
            task.resume()
        finally:
            if task.over:
                self._tasks.remove(task)

    def end(self) -> None:
        """All processes end where they are."""
        self._ends = True
        while self._tasks:
            task = self._tasks[0]
            task.error = None
            with suppress(Exception):
                self._resume(task)

    def sleep(self, seconds: float) -> None:
        self.wait(lambda: False, seconds)

    def fault(self, kind: str, point: str, probability: float) -> bool:
        """Whether this goes wrong here and now."""
        if kind not in self._often:
            self._often[kind] = self.chance.choice(SEVERITY)
        if self.calm or self.chance.random() >= min(0.4, probability * self._often[kind]):
            return False
        self.faults[kind, point] += 1
        self.note(f"{kind} at {point}")
        return True

    def note(self, line: str) -> None:
        self._history.update(f"{self.now:.6f} {line}\n".encode())
        self.log.append(f"{self.now:8.3f} {line}")

    @property
    def digest(self) -> str:
        """Of everything that has happened so far."""
        return self._history.hexdigest()
