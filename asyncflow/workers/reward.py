"""Scores completions as they come."""

from __future__ import annotations

import json

import pyarrow as pa

from asyncflow.rewards import Reward, RewardFailure, RewardInput, RewardOutput
from asyncflow.store.client import Lease, StoreClient
from asyncflow.store.schema import COLUMNS, Stage
from asyncflow.types import Prompt, Timeline
from asyncflow.workers.arrow import ragged, strings
from asyncflow.workers.base import Heartbeat, HeldLease, StageWorker


class RewardWorker(StageWorker):
    """Consumes completions, produces rewards. Waits for completions; a sequence that ends makes one."""

    def __init__(
        self, stage: Stage, store: StoreClient, heartbeat: Heartbeat, timeline: Timeline, *, reward: Reward
    ) -> None:
        super().__init__(stage, store, heartbeat, timeline)
        self._reward = reward

    def process(self, held: HeldLease) -> None:
        inputs = inputs_of(held.lease)
        scored: dict[int, RewardOutput] = {}
        for row, result in zip(held.lease.rows, self._reward.score(inputs), strict=True):
            if isinstance(result, RewardFailure):
                held.nack((row.sample_id,), result.reason, final=True)
            else:
                scored[row.sample_id] = result
        if scored:
            held.ack(tuple(scored), reward_columns(list(scored.values())))


def inputs_of(lease: Lease) -> list[RewardInput]:
    """The rows of a lease as reward functions get them."""
    data = lease.data
    columns = zip(
        strings(data.column("prompt")),
        strings(data.column("prompt_columns")),
        strings(data.column("response")),
        ragged(data.column("response_ids")),
        strict=True,
    )
    return [
        RewardInput(
            prompt=Prompt(messages=_messages(prompt), columns=json.loads(prompt_columns)),
            completion=response,
            completion_ids=response_ids,
        )
        for prompt, prompt_columns, response, response_ids in columns
    ]


def _messages(prompt: str) -> str | tuple[dict[str, str], ...]:
    messages = json.loads(prompt)
    return messages if isinstance(messages, str) else tuple(messages)


def reward_columns(results: list[RewardOutput]) -> pa.RecordBatch:
    """Rewards as the reward stage's columns."""
    values = {
        "reward": [result.reward for result in results],
        "reward_parts": [json.dumps(dict(result.parts)) for result in results],
    }
    arrays = [pa.array(column, COLUMNS[name]) for name, column in values.items()]
    return pa.RecordBatch.from_arrays(arrays, names=list(values))
