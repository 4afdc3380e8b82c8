"""Generation: samples go to the engine one by one and come back one by one, while new weights arrive."""

from __future__ import annotations

import heapq
import threading
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from asyncflow.engines.base import GenerationRequest
from asyncflow.errors import Closed, EngineError, PromptTooLong
from asyncflow.store.client import LeasedRow, StoreClient
from asyncflow.store.schema import COLUMNS, Stage
from asyncflow.store.table import WEIGHTS
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
