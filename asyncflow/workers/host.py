"""Runs a rollout engine, for everybody who wants something of it: completions, new weights, a turn on its cores."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, Protocol, TypeVar

from asyncflow.clock import Clock, SystemClock
from asyncflow.engines.base import GenerationRequest, RolloutEngine, Served, WeightSnapshot
from asyncflow.errors import Closed, EngineError, WeightsError
from asyncflow.store.topics import WEIGHTS
from asyncflow.types import Completion, Int32s, Sampling, Timeline, UpdateMode

T = TypeVar("T")

START_TIMEOUT = 600.0
"""Seconds that an engine may take to load its model and warm up."""
LOAD_TIMEOUT = 600.0
"""Seconds that an update may take; at a `boundary` in addition to what a running sequence may take."""
STOP_TIMEOUT = 900.0
"""Seconds that an engine may take to stop; above its own deadlines, so that it can use them."""
TURN_TIMEOUT = 7200.0
"""Seconds that somebody who takes turns with the engine may wait for his, sequences that have to end first included."""
GENERATE_TIMEOUT = 3600.0
"""Seconds after which a completion fails, whoever asked for it. The watchdog gives back samples much sooner."""
CANARY_TOKENS = 4
"""Of the completion that shows after each load whether anything has changed."""
REMEMBERED = 256
"""Completions whose duration is remembered."""
DRAINED = "rollout"
"""Whom an update at a boundary waits for."""


def load_timeout(mode: UpdateMode, rollout_timeout: float) -> float:
    """Seconds that an update may take where a completion may take `rollout_timeout`."""
    return LOAD_TIMEOUT + (rollout_timeout if mode == "boundary" else 0.0)


class Host(Protocol):
    """Who runs a rollout engine, as the others see it; `EngineHost`, or one in another process."""

    @property
    def name(self) -> str: ...

    @property
    def canary(self) -> tuple[Int32s, Completion] | None:
        """The canary prompt and how it was completed after the last load."""

    @property
    def finished(self) -> int:
        """Completions so far, those of evaluations included."""

    @property
    def suspended(self) -> bool:
        """Whether it is the learner's turn, which its next publication ends."""

    def start(self) -> None:
        """See `EngineHost`, as of all below."""

    def submit(self, request: GenerationRequest) -> Future[Completion]: ...

    def durations(self) -> list[float]: ...

    def load(self, snapshot: WeightSnapshot, mode: UpdateMode) -> Served: ...

    def suspend(self) -> None: ...

    def turn_when_idle(self) -> AbstractContextManager[None]: ...

    def cancel(self) -> None: ...

    def stop(self) -> None: ...


class EngineHost:
    """Runs one rollout engine on an event loop of its own thread, and keeps updates and generation in order.

    A gate lets requests through to the engine. It is closed during an update (`boundary`), and while somebody who has
    the same cores or GPU takes his turn (`suspend`): what runs is finished, nothing is started.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        name: str,
        timeline: Timeline,
        *,
        rollout_timeout: float = GENERATE_TIMEOUT,
        canary: Int32s | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`rollout_timeout`: seconds after which somebody cancels a sample's completion, for which a boundary waits.
        `canary`: a prompt that is completed after each load, before anything else at a boundary."""
        self.engine = engine
        self.name = name
        self._timeline = timeline
        self.finished = 0
        """Completions so far, those of evaluations included."""
        self.canary: tuple[Int32s, Completion] | None = None
        """The canary prompt and how it was completed after the last load."""
        self._canary = canary
        self._loads = 0
        self._rollout_timeout = rollout_timeout
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._began: dict[str, float] = {}
        self._durations: deque[float] = deque(maxlen=REMEMBERED)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"{name}-loop", daemon=True)
        self._gate = asyncio.Condition()
        self._swapping = False
        self._turn: Literal["learner", "reference"] | None = None
        """Who has the engine's cores or GPU now."""
        self._asleep = False
        self._ending = False
        self.swapped = (0.0, 0.0)
        """When the gate was last closed for new weights, and opened again; on the timeline's clock."""
        self._running = 0
        self._generating: set[asyncio.Task[Any]] = set()
        self._controls: set[asyncio.Future[Any]] = set()

    def start(self) -> None:
        """Start the engine. Raises what the engine raises, or EngineError after `START_TIMEOUT`."""
        self._thread.start()
        self._call(self._controlled(self.engine.start()), START_TIMEOUT, "start")

    @property
    def swapping(self) -> bool:
        """Whether requests wait at the gate for new weights."""
        return self._swapping

    @property
    def suspended(self) -> bool:
        """Whether it is the learner's turn, which its next publication ends."""
        return self._turn == "learner"

    def submit(self, request: GenerationRequest, started: Callable[[], None] = lambda: None) -> Future[Completion]:
        """Ask for one completion; the future fails with what the engine raises. `started` is called, in the engine's
        thread, when the request has passed the gate."""
        return asyncio.run_coroutine_threadsafe(self._generate(request, started), self._loop)

    def began(self) -> dict[str, float]:
        """When each request that the engine has now went into it, on the clock's monotonic time."""
        with self._lock:
            return dict(self._began)

    def durations(self) -> list[float]:
        """Seconds that the last completions took."""
        with self._lock:
            return list(self._durations)

    def load(self, snapshot: WeightSnapshot, mode: UpdateMode) -> Served:
        """Bring new weights into the engine. With `boundary`, requests wait at the gate until what runs has finished.

        Raises WeightsError when the engine does not serve what it was given.
        """
        timeout = load_timeout(mode, self._rollout_timeout)
        served = self._call(self._controlled(self._load(snapshot, mode)), timeout, f"load version {snapshot.version}")
        if (served.version, served.digest) != (snapshot.version, snapshot.digest):
            raise WeightsError(
                f"{self.name} was given version {snapshot.version} ({snapshot.digest}) "
                f"and says that it serves {served.version} ({served.digest})"
            )
        return served

    def suspend(self) -> None:
        """Take the learner's turn: the engine finishes what runs, starts nothing and sleeps, until the next `load`.

        Waits for the turn of somebody else to end. Raises EngineError after `TURN_TIMEOUT`, Closed when the run ends.
        """
        self._call(self._suspend("learner"), TURN_TIMEOUT, "finish what it was generating")

    @contextmanager
    def turn_when_idle(self) -> Iterator[None]:
        """A turn for those who can wait until the engine has nothing to do: it starts nothing until the end of it.

        Raises EngineError after `TURN_TIMEOUT`, Closed when the run is ending.
        """
        self.begin_turn()
        try:
            yield
        finally:
            self.end_turn()

    def begin_turn(self) -> None:
        """See `turn_when_idle`."""
        self._call(self._suspend("reference"), TURN_TIMEOUT, "become idle")

    def end_turn(self) -> None:
        """See `turn_when_idle`."""
        self._call(self._resume(), TURN_TIMEOUT, "resume")

    def cancel(self) -> None:
        """Cancel all completions that are under way, and whoever waits for a turn: the run is ending. From any thread;
        does not wait."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._end_turns(), self._loop)
            self._loop.call_soon_threadsafe(self._cancel_generating)

    def stop(self) -> None:
        """Cancel what runs and stop the engine. May be called twice, and before `start`."""
        if self._loop.is_closed():
            return
        try:
            if self._thread.is_alive():
                self._call(self._shutdown(), STOP_TIMEOUT, "stop")
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            if self._thread.is_alive():
                self._thread.join(STOP_TIMEOUT)
            if not self._thread.is_alive():
                self._loop.close()

    async def _generate(self, request: GenerationRequest, started: Callable[[], None]) -> Completion:
        task = asyncio.current_task()
        assert task is not None
        self._generating.add(task)
        try:
            async with self._gate:
                await self._gate.wait_for(lambda: not (self._swapping or self._turn))
                self._running += 1
            with self._lock:
                began = self._began[request.request_id] = self._clock.monotonic()
            try:
                started()
                async with asyncio.timeout(GENERATE_TIMEOUT):
                    completion = await self.engine.generate(request)
                with self._lock:
                    self._durations.append(self._clock.monotonic() - began)
                    self.finished += 1
                return completion
            finally:
                with self._lock:
                    del self._began[request.request_id]
                async with self._gate:
                    self._running -= 1
                    self._gate.notify_all()
        finally:
            self._generating.discard(task)

    async def _load(self, snapshot: WeightSnapshot, mode: UpdateMode) -> Served:
        if mode == "in_flight":
            return await self._bring_in(snapshot, mode)
        closed = self._timeline.now()
        try:
            async with self._gate:
                self._swapping = True
                self._timeline.enter(WEIGHTS, "blocked", DRAINED)
                with self._timeline.span(WEIGHTS, "drain", version=str(snapshot.version)):
                    await self._gate.wait_for(lambda: self._running == 0)
                self._timeline.enter(WEIGHTS, "busy")
            if self._asleep:
                await self.engine.wake()
                self._asleep = False
            return await self._bring_in(snapshot, mode)
        finally:
            async with self._gate:
                self._swapping = False
                if self.suspended:
                    self._turn = None
                self.swapped = closed, self._timeline.now()
                self._gate.notify_all()

    async def _bring_in(self, snapshot: WeightSnapshot, mode: UpdateMode) -> Served:
        with self._timeline.span(WEIGHTS, "load", version=str(snapshot.version)):
            served = await self.engine.load_weights(snapshot, mode)
            await self._complete_canary()
        return served

    async def _complete_canary(self) -> None:
        """Complete the canary prompt."""
        if self._canary is not None:
            self._loads += 1
            request = GenerationRequest(
                request_id=f"canary-{self._loads}",
                prompt_ids=self._canary,
                sampling=Sampling(max_new_tokens=CANARY_TOKENS, temperature=0.0),
            )
            self.canary = self._canary, await self.engine.generate(request)

    async def _suspend(self, who: Literal["learner", "reference"]) -> None:
        def may_begin() -> bool:
            return not (self._swapping or self._turn or (who == "reference" and self._running))

        async with self._gate:
            await self._gate.wait_for(lambda: self._ending or may_begin())
            if self._ending:
                raise Closed(f"{self.name} takes no more turns: the run is ending")
            self._turn = who
            await self._gate.wait_for(lambda: self._running == 0)
        if who == "learner" and self.engine.capabilities.sleep:
            await self._controlled(self.engine.sleep())
            self._asleep = True

    async def _resume(self) -> None:
        async with self._gate:
            self._turn = None
            self._gate.notify_all()

    async def _shutdown(self) -> None:
        self._cancel_generating()
        await asyncio.gather(*self._generating, return_exceptions=True)
        if self._controls:
            # Whoever waited for it is gone (Ctrl-C); an engine is not stopped in the middle of an update.
            await asyncio.wait(self._controls, timeout=LOAD_TIMEOUT)
        await self.engine.stop()

    async def _end_turns(self) -> None:
        async with self._gate:
            self._ending = True
            self._gate.notify_all()

    def _cancel_generating(self) -> None:
        # Only what was started here: the engine may have tasks of its own, and needs them to stop.
        for task in self._generating:
            task.cancel()

    async def _controlled(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Remember a start, an update or falling asleep while it runs; one may begin when another is about to end."""
        control = asyncio.ensure_future(coroutine)
        self._controls.add(control)
        control.add_done_callback(self._controls.discard)
        return await asyncio.shield(control)

    def _call(self, coroutine: Coroutine[Any, Any, T], timeout: float, what: str) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(timeout)
        except FutureTimeout:
            if future.done():
                raise  # the engine's own, not this deadline
            future.cancel()
            raise EngineError(f"{self.name} did not {what} within {timeout:.0f} s") from None
