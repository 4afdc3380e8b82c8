"""Calls of functions that may never return: each runs in a thread that can be left behind."""

from __future__ import annotations

import asyncio
import inspect
import math
import queue
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from typing import Any

from asyncflow.errors import RewardError, RewardTimeout

MAX_LEFT_BEHIND = 8
"""Calls that may be at work at the same time though nobody waits for them any more."""
STOP_SECONDS = 5.0
"""How long `close` waits for asynchronous functions."""

Wait = Callable[[threading.Event, float], bool]
"""Waits for an event for some seconds; whether it came."""


def wait_for(done: threading.Event, seconds: float) -> bool:
    """The plain wait; infinity waits for ever."""
    return done.wait(None if math.isinf(seconds) else seconds)


class _Call:
    """One call, and what became of it."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self.done = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self._function()
        except BaseException as error:
            self.error = error
        finally:
            self.done.set()


class Calls:
    """Makes one call after the other in a daemon thread of its own, until one takes too long: then in a new thread.

    A thread cannot be ended from outside, so the late call goes on for as long as it likes; its result is thrown away.
    Awaitables run on one event loop for all calls, and one that takes too long is cancelled.
    """

    def __init__(self, *, timeout: float, wait: Wait = wait_for) -> None:
        self._timeout = timeout
        self._wait = wait
        self._loop = _EventLoop()
        self._queue: queue.SimpleQueue[_Call | None] | None = None
        self._late: list[_Call] = []

    def call(self, name: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        """`function(**arguments)`, awaited if it has to be. Raises what it raises.

        Raises RewardTimeout when it does not return in time, and RewardError when too many did not.
        """
        self._late = [late for late in self._late if not late.done.is_set()]
        if len(self._late) >= MAX_LEFT_BEHIND:
            raise RewardError(
                f"{len(self._late)} calls of reward functions have not returned, the last one of {name}: give what it "
                "waits for a deadline of its own, or raise reward_timeout"
            )

        def complete() -> Any:
            result = function(**arguments)
            return self._loop.wait_for(result) if inspect.isawaitable(result) else result

        call = _Call(complete)
        if self._queue is None:
            self._queue = queue.SimpleQueue()
            threading.Thread(target=_work, args=(self._queue,), name="reward functions", daemon=True).start()
        self._queue.put(call)
        if not self._wait(call.done, self._timeout):
            self._late.append(call)
            self._end_thread()
            self._loop.cancel()
            raise RewardTimeout(f"the reward function {name} did not return within {self._timeout:g} s")
        if call.error is not None:
            raise call.error
        return call.result

    def close(self) -> None:
        """End the thread and the event loop, as far as nothing hangs. May be called twice; `call` starts them again."""
        self._end_thread()
        self._loop.close()

    def _end_thread(self) -> None:
        if self._queue is not None:
            self._queue.put(None)
            self._queue = None


def _work(calls: queue.SimpleQueue[_Call | None]) -> None:
    while (call := calls.get()) is not None:
        call.run()


class _EventLoop:
    """An event loop in a thread of its own, which lives as long as the run.

    The same loop for all calls, because clients that a function keeps (HTTP sessions) belong to the loop that they were
    first used on; in a thread, because the caller may be on a loop itself.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._waiting: Future[Any] | None = None

    def wait_for(self, awaitable: Awaitable[Any]) -> Any:
        """Block until the awaitable is done."""

        async def done() -> Any:
            try:
                return await awaitable
            except SystemExit as error:  # would end the loop, and nobody would be told
                raise RuntimeError(f"SystemExit: {error}") from error

        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="rewards", daemon=True)
                self._thread.start()
            self._waiting = asyncio.run_coroutine_threadsafe(done(), self._loop)
        return self._waiting.result()

    def cancel(self) -> None:
        """End what is waited for, unless it blocks the loop."""
        with self._lock:
            waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.cancel()

    def close(self) -> None:
        with self._lock:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is None or thread is None:
            return
        loop.call_soon_threadsafe(loop.stop)
        thread.join(STOP_SECONDS)
        if not thread.is_alive():  # else a function blocks its loop: the thread is a daemon, and ends with the process
            loop.close()
