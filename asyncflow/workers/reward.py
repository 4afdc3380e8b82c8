"""Scores completions as they come."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pyarrow as pa

from asyncflow.errors import RewardTimeout
from asyncflow.rewards import Reward, RewardFailure, RewardInput, RewardOutput
from asyncflow.store.client import Lease, LeasedRow, StoreClient
from asyncflow.store.schema import COLUMNS, Stage
from asyncflow.types import Prompt, Timeline
from asyncflow.workers.alarms import Alarms
from asyncflow.workers.arrow import ragged, strings
from asyncflow.workers.base import Heartbeat, HeldLease, StageWorker


class RewardWorker(StageWorker):
    """Consumes completions, produces rewards. Waits for completions; a sequence that ends makes one."""

    def __init__(
        self,
        stage: Stage,
        store: StoreClient,
        heartbeat: Heartbeat,
        timeline: Timeline,
        *,
        reward: Reward,
        alarms: Alarms,
    ) -> None:
        super().__init__(stage, store, heartbeat, timeline)
        self._reward = reward
        self._alarms = alarms

    def process(self, held: HeldLease) -> None:
        rows = list(zip(held.lease.rows, inputs_of(held.lease), strict=True))
        # What comes again may have hung: alone, it cannot take others with it.
        self._score(held, [(row, item) for row, item in rows if row.attempt == 1])
        for row, item in rows:
            if row.attempt > 1:
                self._score(held, [(row, item)])

    def _score(self, held: HeldLease, rows: Sequence[tuple[LeasedRow, RewardInput]]) -> None:
        if not rows:
            return
        try:
            results = self._reward.score([item for _, item in rows])
        except RewardTimeout as error:
            ids = tuple(row.sample_id for row, _ in rows)
            again = "they are tried one by one" if len(ids) > 1 else f"it was attempt {rows[0][0].attempt}"
            names = f"sample{'s' if len(ids) > 1 else ''} {', '.join(map(str, ids[:8]))}{', …' if len(ids) > 8 else ''}"
            self._alarms.sound("reward_hung", f"{error} for {names}: {again}", samples=ids)
            held.nack(ids, str(error))
            return
        scored: dict[int, RewardOutput] = {}
        for (row, _), result in zip(rows, results, strict=True):
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
