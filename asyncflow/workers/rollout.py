"""Generation: samples go to the engine one by one and come back one by one, while new weights arrive."""

from __future__ import annotations

import heapq
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from asyncflow.engines.base import GenerationRequest
from asyncflow.errors import EngineError, PromptTooLong, StoreError
from asyncflow.store.client import LeasedRow, StoreClient
from asyncflow.store.schema import COLUMNS, Stage
from asyncflow.store.topics import WEIGHTS
from asyncflow.types import Completion, Int32s, PolicyVersion, Sampling, Timeline
from asyncflow.workers.arrow import ragged
from asyncflow.workers.attestation import Offers
from asyncflow.workers.base import PATIENCE, Heartbeat, HeldLease, StageWorker
from asyncflow.workers.host import EngineHost

LANE = "generation"
"""Lanes of the timeline with one sequence after the other, as many as run at the same time."""
EMPTIED = "emptied"
"""Share of the engine's places that stood empty because it took new weights at a boundary."""


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


class Rollouts(Protocol):
    """The rollouts of a run, as the others see them; `RolloutWorker`, or one in another process."""

    @property
    def generated_tokens(self) -> int:
        """Response tokens so far."""

    def under_way(self) -> list[UnderWay]:
        """The samples that the engine has now; those that wait to be let in are not among them."""

    def give_up(self, request_id: str, reason: str) -> None:
        """Cancel a completion and give its sample back with this reason; nothing happens when it has ended."""


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
        fresh: Offers,
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
        self._ended: deque[_Asked] = deque()
        """Completed, and not in the store yet …"""
        self._unsettled = 0
        """… and how many these are, with those that are just brought there."""
        self._settler = ThreadPoolExecutor(max_workers=1, thread_name_prefix="settler")
        """Brings completions into the store, so that the engine does not wait for it."""
        self.generated_tokens = 0
        """Response tokens so far."""

    def run(self, stopping: threading.Event, going: threading.Event | None = None) -> None:
        """See `Worker`. What has been completed is in the store when it returns."""
        try:
            super().run(stopping, going)
        finally:
            self._settler.submit(self._settle).result()

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

    def paused(self, cause: str) -> None:
        with self._changed:
            if len(self._lanes) == self._places:
                super().paused(cause)

    def _rest(self) -> None:
        """Say in the timeline why nothing runs, when that is so. Under the lock."""
        if len(self._lanes) == self._places:
            if self._free + self._unsettled < self._places:
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
        complete = False
        with self._failing():
            self._end(asked)
            complete = self._is_complete(asked)
            if not complete:
                self._give_back(asked)
        if not complete:
            self._leave([asked])
            return
        with self._changed:
            self._unsettled += 1
        self._ended.append(asked)
        self._settler.submit(self._settle)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """What is raised inside is a failure of this worker."""
        try:
            yield
        except BaseException as error:
            with self._changed:
                self._failure = self._failure or error

    def _leave(self, asked: Sequence[_Asked], *, settled: int = 0) -> None:
        """These make room."""
        with self._changed:
            for one in asked:
                del self._asked[one.request.request_id]
            self._free += len(asked)
            self._unsettled -= settled
            self._changed.notify_all()
            with suppress(StoreError):  # nobody asks any more
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

    def _is_complete(self, asked: _Asked) -> bool:
        done = asked.future
        return not done.cancelled() and done.exception() is None and fault_of(done.result()) is None

    def _give_back(self, asked: _Asked) -> None:
        """A sample without a completion that can be used. Raises EngineError when the engine cannot go on."""
        held, done, ids = asked.held, asked.future, (asked.row.sample_id,)
        if done.cancelled():
            # Otherwise the run is ending: as when it is killed, that is no failed attempt of the sample.
            if asked.given_up:
                held.nack(ids, asked.given_up)
            return
        error = done.exception()
        if isinstance(error, PromptTooLong):
            held.nack(ids, str(error), final=True)
        elif error is not None:
            held.nack(ids, f"{type(error).__name__}: {error}")
            if isinstance(error, EngineError):
                raise error
        else:
            fault = fault_of(done.result())
            held.nack(ids, f"the engine returned a completion that cannot be used: {fault}")

    def _settle(self) -> None:
        """Bring all that has been completed into the store, what belongs to one lease at once."""
        with self._changed:
            ended = [self._ended.popleft() for _ in range(len(self._ended))]
            leases: dict[int, list[_Asked]] = {}
            for asked in ended:
                leases.setdefault(asked.held.lease.lease_id, []).append(asked)
        for together in leases.values():
            with self._failing():
                self._bring_in(together)
            self._leave(together, settled=len(together))

    def _bring_in(self, together: Sequence[_Asked]) -> None:
        completions = [asked.future.result() for asked in together]
        for asked, completion in zip(together, completions, strict=True):
            row = asked.row
            self.generated_tokens += len(completion.token_ids)
            self._fresh.offer(row.sample_id, row.group_id, asked.request.prompt_ids, completion, epoch=asked.epoch)
        together[0].held.ack([asked.row.sample_id for asked in together], completion_columns(completions))


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


def completion_columns(completions: Sequence[Completion]) -> pa.RecordBatch:
    """Completions as the rollout stage's columns, one row each."""
    values = {
        "response_ids": [made.token_ids for made in completions],
        "rollout_logprobs": [made.logprobs for made in completions],
        "token_versions": [made.token_versions for made in completions],
        "response": [made.text for made in completions],
        "finish_reason": [made.finish_reason for made in completions],
    }
    arrays = [pa.array(rows, COLUMNS[name]) for name, rows in values.items()]
    return pa.RecordBatch.from_arrays(arrays, names=list(values))
