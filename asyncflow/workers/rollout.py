"""Generation: samples go to the engine one by one and come back one by one, while new weights arrive.

`EngineHost` owns the engine and the event loop on which it runs. `RolloutWorker` leases prompts and acks completions.
`WeightFollower` brings every published version into the engine and tells the store what is served.
"""

from __future__ import annotations

import asyncio
import heapq
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from asyncflow.clock import Clock, SystemClock
from asyncflow.engines.base import GenerationRequest, RolloutEngine, Served, WeightSnapshot
from asyncflow.engines.weights.channel import WeightChannel
from asyncflow.errors import Closed, EngineError, PromptTooLong, WeightsError
from asyncflow.store.client import LeasedRow, StoreClient
from asyncflow.store.schema import COLUMNS, Stage
from asyncflow.store.table import WEIGHTS
from asyncflow.types import Completion, Int32s, PolicyVersion, Recorder, Sampling, Timeline, UpdateMode
from asyncflow.workers.arrow import ragged
from asyncflow.workers.attestation import FreshSamples
from asyncflow.workers.base import PATIENCE, Heartbeat, HeldLease, StageWorker, Worker

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


PUBLISHER, DRAINED = "actor_update", "rollout"
"""Whom a weight follower waits for: until there is a version, and until the engine may take it."""

LANE = "generation"
"""Lanes of the timeline with one sequence after the other, as many as run at the same time."""


EMPTIED = "emptied"
"""Share of the engine's places that stood empty because it took new weights at a boundary."""


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
        self._suspended = False
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
        timeout = LOAD_TIMEOUT + (self._rollout_timeout if mode == "boundary" else 0.0)
        served = self._call(self._controlled(self._load(snapshot, mode)), timeout, f"load version {snapshot.version}")
        if (served.version, served.digest) != (snapshot.version, snapshot.digest):
            raise WeightsError(
                f"{self.name} was given version {snapshot.version} ({snapshot.digest}) "
                f"and says that it serves {served.version} ({served.digest})"
            )
        return served

    def suspend(self) -> None:
        """Take the learner's turn: the engine finishes what runs, starts nothing and sleeps, until the next `load`.

        Waits for the turn of somebody else to end. Raises EngineError after `TURN_TIMEOUT`, or when the run is ending.
        """
        self._call(self._suspend(when_idle=False), TURN_TIMEOUT, "finish what it was generating")

    @contextmanager
    def turn_when_idle(self) -> Iterator[None]:
        """A turn for those who can wait until the engine has nothing to do: it starts nothing until the end of it.

        Raises EngineError after `TURN_TIMEOUT`, or when the run is ending.
        """
        self._call(self._suspend(when_idle=True), TURN_TIMEOUT, "become idle")
        try:
            yield
        finally:
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
                await self._gate.wait_for(lambda: not (self._swapping or self._suspended))
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
                self._swapping = self._suspended = False
                self.swapped = closed, self._timeline.now()
                self._gate.notify_all()

    async def _bring_in(self, snapshot: WeightSnapshot, mode: UpdateMode) -> Served:
        with self._timeline.span(WEIGHTS, "load", version=str(snapshot.version)):
            served = await self.engine.load_weights(snapshot, mode)
            await self._sing()
        return served

    async def _sing(self) -> None:
        """Complete the canary prompt."""
        if self._canary is not None:
            self._loads += 1
            request = GenerationRequest(
                request_id=f"canary-{self._loads}",
                prompt_ids=self._canary,
                sampling=Sampling(max_new_tokens=CANARY_TOKENS, temperature=0.0),
            )
            self.canary = self._canary, await self.engine.generate(request)

    async def _suspend(self, *, when_idle: bool) -> None:
        def may_begin() -> bool:
            return not (self._swapping or self._suspended or (when_idle and self._running))

        async with self._gate:
            await self._gate.wait_for(lambda: self._ending or may_begin())
            if self._ending:
                raise EngineError(f"{self.name} takes no more turns: the run is ending")
            self._suspended = True
            await self._gate.wait_for(lambda: self._running == 0)
        if not when_idle and self.engine.capabilities.sleep:
            await self._controlled(self.engine.sleep())
            self._asleep = True

    async def _resume(self) -> None:
        async with self._gate:
            self._suspended = False
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


@dataclass(frozen=True, kw_only=True)
class UnderWay:
    """One completion that the engine is working on."""

    request_id: str
    sample_id: int
    group_id: int
    attempt: int
    engine: str
    began: float
    """When it went into the engine, on the clock's monotonic time."""


@dataclass
class _Asked:
    """One completion that was asked for."""

    held: HeldLease
    row: LeasedRow
    request: GenerationRequest
    epoch: int
    """Of the weights' loading, see `FreshSamples`."""
    future: Future[Completion] = field(default_factory=Future)
    given_up: str = ""
    """Why it was cancelled."""
    lane: int = -1
    """Where it stands in the timeline; below 0 before it has started."""
    began: float = 0.0
    """On the timeline's clock."""


class RolloutWorker(StageWorker):
    """Consumes prompts, produces completions. Waits for a free place in the engine; a finished sequence makes it."""

    pauses = True

    def __init__(
        self,
        stage: Stage,
        store: StoreClient,
        heartbeat: Heartbeat,
        timeline: Timeline,
        *,
        host: EngineHost,
        sampling: Sampling,
        max_concurrency: int,
        seed: int | None,
        fresh: FreshSamples,
    ) -> None:
        super().__init__(stage, store, heartbeat, timeline)
        self._host = host
        self._sampling = sampling
        self._seed = seed
        self._fresh = fresh
        self._places = self._free = max_concurrency
        self._lanes = list(range(max_concurrency))
        """Free ones, a heap: what little runs stands in the first ones."""
        self._emptied = [timeline.now()] * max_concurrency
        """When the last sequence left each lane."""
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._asked: dict[str, _Asked] = {}
        self.generated_tokens = 0
        """Response tokens so far."""

    def room(self) -> int:
        with self._changed:
            self._changed.wait_for(lambda: self._free > 0 or self._failure is not None, PATIENCE)
            if self._failure is not None:
                raise EngineError(f"{self._host.name} cannot go on: {self._failure}") from self._failure
            return self._free

    def process(self, held: HeldLease) -> None:
        prompts = ragged(held.lease.data.column("prompt_ids"))
        with self._changed:
            self._free -= len(held.lease.rows)
            if self._host.swapping:
                self._rest()
        for row, prompt_ids in zip(held.lease.rows, prompts, strict=True):
            request = self._request(row, prompt_ids)
            asked = _Asked(held=held, row=row, request=request, epoch=self._fresh.epoch)
            with self._changed:
                self._asked[request.request_id] = asked
                asked.future = self._host.submit(request, partial(self._start, asked))
            asked.future.add_done_callback(lambda _, asked=asked: self._finish(asked))  # type: ignore[misc]

    def under_way(self) -> list[UnderWay]:
        """The samples that the engine has now; those that wait to be let in are not among them."""
        began = self._host.began()
        with self._changed:
            return [
                UnderWay(
                    request_id=request_id,
                    sample_id=asked.row.sample_id,
                    group_id=asked.row.group_id,
                    attempt=asked.row.attempt,
                    engine=self._host.name,
                    began=began[request_id],
                )
                for request_id, asked in self._asked.items()
                if request_id in began
            ]

    def give_up(self, request_id: str, reason: str) -> None:
        """Cancel a completion and give its sample back with this reason; nothing happens when it has ended."""
        with self._changed:
            asked = self._asked.get(request_id)
            if asked is not None:
                asked.given_up = reason
        if asked is not None:
            asked.future.cancel()

    def working(self) -> None:
        """It is busy while a sequence runs: `_start` says so."""

    def waiting(self) -> None:
        with self._changed:
            self._rest()

    def paused(self) -> None:
        with self._changed:
            if len(self._lanes) == self._places:
                super().paused()

    def _rest(self) -> None:
        """Say in the timeline why nothing runs, when that is so. Under the lock."""
        if len(self._lanes) == self._places:
            if self._free < self._places:
                self.timeline.enter(self.name, "blocked", WEIGHTS)
            else:
                self.timeline.enter(self.name, "idle", self.store.awaited(self.name))

    def _start(self, asked: _Asked) -> None:
        """Runs in the engine's thread when a sequence begins."""
        with self._changed:
            asked.lane, asked.began = heapq.heappop(self._lanes), self.timeline.now()
            self.timeline.enter(self.name, "busy")
            closed, opened = self._host.swapped
            empty = opened - max(closed, self._emptied[asked.lane])
        if empty > 0:
            self.timeline.add(self.name, EMPTIED, empty / self._places)

    def _request(self, row: LeasedRow, prompt_ids: Int32s) -> GenerationRequest:
        seed = None if self._seed is None else self._seed * 1_000_003 + row.sample_id
        return GenerationRequest(
            request_id=f"{row.sample_id}.{row.attempt}",
            prompt_ids=prompt_ids,
            sampling=replace(self._sampling, seed=seed),
        )

    def _finish(self, asked: _Asked) -> None:
        """Runs in the engine's thread when a sequence has ended in whatever way, or in that of who gave it up."""
        try:
            self._end(asked)
            self._settle(asked)
        except BaseException as error:
            with self._changed:
                self._failure = self._failure or error
        finally:
            with self._changed:
                del self._asked[asked.request.request_id]
                self._free += 1
                self._changed.notify_all()
                with suppress(Closed):  # nobody asks any more
                    self._rest()

    def _end(self, asked: _Asked) -> None:
        """The sequence leaves its lane."""
        if asked.lane < 0:
            return
        row, done, lane = asked.row, asked.future, f"{LANE}/{asked.lane:03}"
        about: dict[str, Any] = {"sample_id": row.sample_id, "group_id": row.group_id}
        if done.cancelled() or done.exception() is not None:
            about["finish_reason"] = "failed"
        else:
            completion = done.result()
            about |= {
                "tokens": len(completion.token_ids),
                "versions": [str(PolicyVersion.unpack(v)) for v in np.unique(completion.token_versions)],
                "finish_reason": completion.finish_reason,
            }
        self.timeline.record(lane, f"sample {row.sample_id}", asked.began, **about)
        with self._changed:
            heapq.heappush(self._lanes, asked.lane)
            self._emptied[asked.lane] = self.timeline.now()

    def _settle(self, asked: _Asked) -> None:
        held, row, done = asked.held, asked.row, asked.future
        ids = (row.sample_id,)
        if done.cancelled():
            held.nack(ids, asked.given_up or "generation was cancelled")
            return
        error = done.exception()
        if isinstance(error, PromptTooLong):
            held.nack(ids, str(error), final=True)
        elif error is not None:
            held.nack(ids, f"{type(error).__name__}: {error}")
            if isinstance(error, EngineError):
                raise error
        elif fault := fault_of(done.result()):
            held.nack(ids, f"the engine returned a completion that cannot be used: {fault}")
        else:
            completion = done.result()
            self.generated_tokens += len(completion.token_ids)
            self._fresh.offer(row.sample_id, row.group_id, asked.request.prompt_ids, completion, epoch=asked.epoch)
            held.ack(ids, completion_columns(completion))


def fault_of(completion: Completion) -> str | None:
    """What makes a completion unfit for training, or None."""
    lengths = {len(completion.token_ids), len(completion.logprobs), len(completion.token_versions)}
    if len(lengths) != 1:
        return f"tokens, log-probs and versions have different lengths {sorted(lengths)}"
    if not len(completion.token_ids):
        return "it has no tokens"
    if not np.isfinite(completion.logprobs).all():
        return "a log-prob is not finite"
    if (np.diff(completion.token_versions) < 0).any():
        return "token versions go back"
    return None


def completion_columns(completion: Completion) -> pa.RecordBatch:
    """One completion as the rollout stage's columns, one row."""
    values = {
        "response_ids": completion.token_ids,
        "rollout_logprobs": completion.logprobs,
        "token_versions": completion.token_versions,
        "response": completion.text,
        "finish_reason": completion.finish_reason,
    }
    arrays = [pa.array([value], COLUMNS[name]) for name, value in values.items()]
    return pa.RecordBatch.from_arrays(arrays, names=list(values))


class WeightFollower(Worker):
    """Consumes published versions, produces served ones. Waits for the channel; the learner's publications fill it."""

    name = WEIGHTS

    def __init__(
        self,
        host: EngineHost,
        channel: WeightChannel,
        store: StoreClient,
        recorder: Recorder,
        timeline: Timeline,
        *,
        mode: UpdateMode,
        on_served: Callable[[PolicyVersion], None],
        fresh: FreshSamples,
    ) -> None:
        self._host = host
        self._channel = channel
        self._store = store
        self._recorder = recorder
        self._timeline = timeline
        self._mode = mode
        self._on_served = on_served
        self._fresh = fresh
        self._served: PolicyVersion | None = None

    def turn(self) -> None:
        self._timeline.enter(self.name, "idle", PUBLISHER)
        self.follow(PATIENCE)

    def follow(self, timeout: float) -> None:
        """Bring the newest version into the engine and say so, unless it is served already.

        Attestation may ask for it to be loaded again, though the engine says that it serves it.
        """
        again = self._fresh.closed
        snapshot = self._channel.latest() if again else self._channel.wait_newer(self._served, timeout)
        if snapshot is None:
            return
        self._timeline.enter(self.name, "busy")
        try:
            self._load(snapshot, again=again)
        finally:
            self._timeline.leave(self.name)

    def _load(self, snapshot: WeightSnapshot, *, again: bool) -> None:
        began = time.monotonic()
        served = self._host.load(snapshot, self._mode)
        self._served = served.version
        if again:
            self._fresh.reopen()
        if self._host.canary is not None:
            self._fresh.sang(served.version, *self._host.canary)
        self._store.serve(self._host.name, served.version)
        self._recorder.log(
            "served",
            {
                "engine": self._host.name,
                "version": str(served.version),
                "digest": served.digest,
                "update_s": time.monotonic() - began,
            },
        )
        self._on_served(served.version)
