"""Generation: samples go to the engine one by one and come back one by one, while new weights arrive.

`EngineHost` owns the engine and the event loop on which it runs. `RolloutWorker` leases prompts and acks completions.
`WeightFollower` brings every published version into the engine and tells the store what is served.
"""

from __future__ import annotations

import asyncio
import heapq
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from asyncflow.engines.base import GenerationRequest, RolloutEngine, Served, WeightSnapshot
from asyncflow.engines.weights.channel import WeightChannel
from asyncflow.errors import Closed, EngineError, PromptTooLong, WeightsError
from asyncflow.store.client import LeasedRow, StoreClient
from asyncflow.store.schema import COLUMNS, Stage
from asyncflow.store.table import WEIGHTS
from asyncflow.types import Completion, Int32s, PolicyVersion, Recorder, Sampling, Timeline, UpdateMode
from asyncflow.workers.arrow import ragged
from asyncflow.workers.base import PATIENCE, Heartbeat, HeldLease, StageWorker, Worker

T = TypeVar("T")

START_TIMEOUT = 600.0
"""Seconds that an engine may take to load its model and warm up."""
LOAD_TIMEOUT = 600.0
"""Seconds that an update may take, the wait for running sequences (`boundary`) included."""
STOP_TIMEOUT = 900.0
"""Seconds that an engine may take to stop; above its own deadlines, so that it can use them."""
GENERATE_TIMEOUT = 3600.0
"""Seconds after which a completion that has not come is given back."""


PUBLISHER, DRAINED = "actor_update", "rollout"
"""Whom a weight follower waits for: until there is a version, and until the engine may take it."""

LANE = "generation"
"""Lanes of the timeline with one sequence after the other, as many as run at the same time."""


EMPTIED = "emptied"
"""Share of the engine's places that stood empty because it took new weights at a boundary."""


class EngineHost:
    """Runs one rollout engine on an event loop of its own thread, and keeps updates and generation in order."""

    def __init__(self, engine: RolloutEngine, name: str, timeline: Timeline) -> None:
        self.engine = engine
        self.name = name
        self._timeline = timeline
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"{name}-loop", daemon=True)
        self._gate = asyncio.Condition()
        self._swapping = False
        self.swapped = (0.0, 0.0)
        """When the gate was last closed for new weights, and opened again; on the timeline's clock."""
        self._running = 0
        self._generating: set[asyncio.Task[Any]] = set()
        self._control: asyncio.Future[Any] | None = None

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

    def load(self, snapshot: WeightSnapshot, mode: UpdateMode) -> Served:
        """Bring new weights into the engine. With `boundary`, requests wait at the gate until what runs has finished.

        Raises WeightsError when the engine does not serve what it was given.
        """
        served = self._call(
            self._controlled(self._load(snapshot, mode)), LOAD_TIMEOUT, f"load version {snapshot.version}"
        )
        if (served.version, served.digest) != (snapshot.version, snapshot.digest):
            raise WeightsError(
                f"{self.name} was given version {snapshot.version} ({snapshot.digest}) "
                f"and says that it serves {served.version} ({served.digest})"
            )
        return served

    def cancel(self) -> None:
        """Cancel all completions that are under way. From any thread; does not wait."""
        if self._thread.is_alive():
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
                await self._gate.wait_for(lambda: not self._swapping)
                self._running += 1
            try:
                started()
                async with asyncio.timeout(GENERATE_TIMEOUT):
                    return await self.engine.generate(request)
            finally:
                async with self._gate:
                    self._running -= 1
                    self._gate.notify_all()
        finally:
            self._generating.discard(task)

    async def _load(self, snapshot: WeightSnapshot, mode: UpdateMode) -> Served:
        version = str(snapshot.version)
        if mode == "in_flight":
            with self._timeline.span(WEIGHTS, "load", version=version):
                return await self.engine.load_weights(snapshot, mode)
        closed = self._timeline.now()
        try:
            async with self._gate:
                self._swapping = True
                self._timeline.enter(WEIGHTS, "blocked", DRAINED)
                with self._timeline.span(WEIGHTS, "drain", version=version):
                    await self._gate.wait_for(lambda: self._running == 0)
                self._timeline.enter(WEIGHTS, "busy")
            with self._timeline.span(WEIGHTS, "load", version=version):
                return await self.engine.load_weights(snapshot, mode)
        finally:
            async with self._gate:
                self._swapping = False
                self.swapped = closed, self._timeline.now()
                self._gate.notify_all()

    async def _shutdown(self) -> None:
        self._cancel_generating()
        await asyncio.gather(*self._generating, return_exceptions=True)
        if self._control is not None:
            # Whoever waited for it is gone (Ctrl-C); an engine is not stopped in the middle of an update.
            await asyncio.wait([self._control], timeout=LOAD_TIMEOUT)
        await self.engine.stop()

    def _cancel_generating(self) -> None:
        # Only what was started here: the engine may have tasks of its own, and needs them to stop.
        for task in self._generating:
            task.cancel()

    async def _controlled(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Remember a start or an update while it runs."""
        self._control = asyncio.ensure_future(coroutine)
        try:
            return await asyncio.shield(self._control)
        finally:
            if self._control.done():
                self._control = None

    def _call(self, coroutine: Coroutine[Any, Any, T], timeout: float, what: str) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(timeout)
        except FutureTimeout:
            if future.done():
                raise  # the engine's own, not this deadline
            future.cancel()
            raise EngineError(f"{self.name} did not {what} within {timeout:.0f} s") from None


@dataclass
class Sequence:
    """One completion that is under way."""

    held: HeldLease
    row: LeasedRow
    lane: int = -1
    """Where it stands in the timeline; below 0 before it has started."""
    began: float = 0.0


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
    ) -> None:
        super().__init__(stage, store, heartbeat, timeline)
        self._host = host
        self._sampling = sampling
        self._seed = seed
        self._places = self._free = max_concurrency
        self._lanes = list(range(max_concurrency))
        """Free ones, a heap: what little runs stands in the first ones."""
        self._emptied = [timeline.now()] * max_concurrency
        """When the last sequence left each lane."""
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
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
            sequence = Sequence(held, row)
            future = self._host.submit(self._request(row, prompt_ids), partial(self._start, sequence))
            future.add_done_callback(partial(self._finish, sequence))

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

    def _start(self, sequence: Sequence) -> None:
        """Runs in the engine's thread when a sequence begins."""
        with self._changed:
            sequence.lane, sequence.began = heapq.heappop(self._lanes), self.timeline.now()
            self.timeline.enter(self.name, "busy")
            closed, opened = self._host.swapped
            empty = opened - max(closed, self._emptied[sequence.lane])
        if empty > 0:
            self.timeline.add(self.name, EMPTIED, empty / self._places)

    def _request(self, row: LeasedRow, prompt_ids: Int32s) -> GenerationRequest:
        seed = None if self._seed is None else self._seed * 1_000_003 + row.sample_id
        return GenerationRequest(
            request_id=f"{row.sample_id}.{row.attempt}",
            prompt_ids=prompt_ids,
            sampling=replace(self._sampling, seed=seed),
        )

    def _finish(self, sequence: Sequence, done: Future[Completion]) -> None:
        """Runs in the engine's thread when a sequence has ended in whatever way."""
        try:
            self._end(sequence, done)
            self._settle(sequence.held, sequence.row, done)
        except BaseException as error:
            with self._changed:
                self._failure = self._failure or error
        finally:
            with self._changed:
                self._free += 1
                self._changed.notify_all()
                with suppress(Closed):  # nobody asks any more
                    self._rest()

    def _end(self, sequence: Sequence, done: Future[Completion]) -> None:
        """The sequence leaves its lane."""
        if sequence.lane < 0:
            return
        row, lane = sequence.row, f"{LANE}/{sequence.lane:03}"
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
        self.timeline.record(lane, f"sample {row.sample_id}", sequence.began, **about)
        with self._changed:
            heapq.heappush(self._lanes, sequence.lane)
            self._emptied[sequence.lane] = self.timeline.now()

    def _settle(self, held: HeldLease, row: LeasedRow, done: Future[Completion]) -> None:
        ids = (row.sample_id,)
        if done.cancelled():
            held.nack(ids, "generation was cancelled")
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
    ) -> None:
        self._host = host
        self._channel = channel
        self._store = store
        self._recorder = recorder
        self._timeline = timeline
        self._mode = mode
        self._on_served = on_served
        self._served: PolicyVersion | None = None

    def turn(self) -> None:
        self._timeline.enter(self.name, "idle", PUBLISHER)
        self.follow(PATIENCE)

    def follow(self, timeout: float) -> None:
        """Bring the newest version into the engine and say so, unless it is served already."""
        snapshot = self._channel.wait_newer(self._served, timeout)
        if snapshot is None:
            return
        self._timeline.enter(self.name, "busy")
        try:
            self._load(snapshot)
        finally:
            self._timeline.leave(self.name)

    def _load(self, snapshot: WeightSnapshot) -> None:
        began = time.monotonic()
        served = self._host.load(snapshot, self._mode)
        self._served = served.version
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
