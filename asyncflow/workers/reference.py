"""Scores completions with the reference policy: how likely each token was before any training."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pyarrow as pa
import torch

from asyncflow.engines.base import ScorerEngine
from asyncflow.errors import EngineError
from asyncflow.store.client import Lease, StoreClient
from asyncflow.store.schema import COLUMNS, Stage
from asyncflow.types import Floats, Timeline, TokenSample
from asyncflow.workers.arrow import ragged
from asyncflow.workers.base import Heartbeat, HeldLease, StageWorker

logger = logging.getLogger(__name__)


class ReferenceWorker(StageWorker):
    """Consumes completions, produces reference log-probs. Waits for completions; a sequence that ends makes one.

    It takes whatever is there, up to its tokens, and while it computes more comes: samples of a group that are in the
    same lease share their prompt.
    """

    def __init__(
        self,
        stage: Stage,
        store: StoreClient,
        heartbeat: Heartbeat,
        timeline: Timeline,
        *,
        engine: ScorerEngine,
        max_rows: int,
        max_tokens: int | None,
        cores: tuple[int, ...] | None = None,
        turn: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """`max_rows`, `max_tokens` (prompt and response) bound a lease; one sample is always taken. `cores`: where its
        thread computes; None is where it is started. `turn` is entered for as long as it computes.
        """
        super().__init__(stage, store, heartbeat, timeline)
        self._engine = engine
        self._max_rows = max_rows
        self._max_tokens = max_tokens
        self._cores = cores
        self._turn = turn

    def run(self, stopping: threading.Event, going: threading.Event | None = None) -> None:
        """See `Worker`. The calling thread stays on the reference's cores."""
        if self._cores is not None:
            os.sched_setaffinity(0, self._cores)
            torch.set_num_threads(len(self._cores))
        super().run(stopping, going)

    def room(self) -> int:
        return self._max_rows

    def max_tokens(self) -> int | None:
        return self._max_tokens

    def process(self, held: HeldLease) -> None:
        samples = samples_of(held.lease)
        with self._turn():
            found = self._logprobs(samples)
        scored: dict[int, Floats] = {}
        for sample, logprobs in zip(samples, found, strict=True):
            fault = logprobs if isinstance(logprobs, str) else fault_of(sample, logprobs)
            if fault:
                held.nack((sample.sample_id,), f"the reference policy cannot score it: {fault}", final=True)
            else:
                assert not isinstance(logprobs, str)
                scored[sample.sample_id] = logprobs
        if scored:
            held.ack(tuple(scored), reference_columns(list(scored.values())))

    def _logprobs(self, samples: Sequence[TokenSample]) -> list[Floats | str]:
        """Log-probs of each sample, or why it has none: one that cannot be computed does not keep others from it."""
        try:
            return list(self._engine.logprobs(samples))
        except EngineError:
            raise
        except Exception as error:
            if len(samples) == 1:
                return [f"{type(error).__name__}: {error}"]
            logger.warning("%d samples together cannot be scored (%s): trying each alone", len(samples), error)
            return [logprobs for sample in samples for logprobs in self._logprobs([sample])]


def samples_of(lease: Lease) -> list[TokenSample]:
    """The rows of a lease as a scorer gets them."""
    columns = zip(
        lease.rows,
        ragged(lease.data.column("prompt_ids")),
        ragged(lease.data.column("response_ids")),
        strict=True,
    )
    return [
        TokenSample(sample_id=row.sample_id, group_id=row.group_id, prompt_ids=prompt_ids, response_ids=response_ids)
        for row, prompt_ids, response_ids in columns
    ]


def fault_of(sample: TokenSample, logprobs: Floats) -> str | None:
    """What makes log-probs unfit for a KL term, or None."""
    if len(logprobs) != len(sample.response_ids):
        return f"it has {len(sample.response_ids)} tokens and got {len(logprobs)} log-probs"
    if not np.isfinite(logprobs).all():
        return "a log-prob is not finite"
    return None


def reference_columns(logprobs: Sequence[Floats]) -> pa.RecordBatch:
    """Log-probs as the reference stage's column."""
    return pa.RecordBatch.from_arrays([pa.array(list(logprobs), COLUMNS["ref_logprobs"])], names=["ref_logprobs"])
