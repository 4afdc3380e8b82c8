"""Parts that take their time, named in the configuration as users name theirs, so that a run waits for one of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence

from asyncflow.engines.base import Served, WeightSnapshot
from asyncflow.engines.fake import FakeLearner, FakeRollout, FakeScorer
from asyncflow.types import Floats, TokenSample, TrainSample, UpdateMode

SECONDS = 0.04
"""That one call takes. All other parts of a run of fakes take a few milliseconds a step together."""


def take_time(seconds: float = SECONDS) -> None:
    threading.Event().wait(seconds)


def slow_reward(completions: Sequence[str], **_: object) -> list[float]:
    """Counts characters, slowly."""
    for _one in completions:
        take_time()
    return [float(len(completion)) for completion in completions]


class SlowRollout(FakeRollout):
    """Takes its time for every completion."""

    def __init__(self, model: object, **options: object) -> None:
        super().__init__(model, **{**options, "token_latency": SECONDS})  # type: ignore[arg-type]


class SlowLearner(FakeLearner):
    def forward_backward(self, samples: Sequence[TrainSample]) -> Mapping[str, float]:
        take_time(len(samples) * SECONDS)
        return super().forward_backward(samples)


class SlowScorer(FakeScorer):
    def logprobs(self, samples: Sequence[TokenSample]) -> list[Floats]:
        take_time(len(samples) * SECONDS)
        return super().logprobs(samples)


class SlowToLoad(FakeRollout):
    """Takes its time for new weights."""

    async def load_weights(self, snapshot: WeightSnapshot, mode: UpdateMode) -> Served:
        await asyncio.sleep(10 * SECONDS)
        return await super().load_weights(snapshot, mode)
