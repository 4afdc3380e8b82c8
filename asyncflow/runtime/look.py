"""What those who look on are told of a run that goes on: its workers and engines, as plain JSON values."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from asyncflow.config import Config
from asyncflow.errors import ControlError
from asyncflow.pipeline import Pipeline
from asyncflow.runtime.timeline import TraceTimeline
from asyncflow.workers.base import Worker

WINDOW = 60.0
"""Seconds over which shares of time are told."""


def workers(pipeline: Pipeline, timeline: TraceTimeline) -> list[dict[str, Any]]:
    """Every part that is somewhere between a prompt and new weights, in data order.

    `activity` and `cause` are the timeline's; `shares` are of the last `WINDOW` seconds, `seconds` since the process
    began.
    """
    doing, shares, totals = timeline.doing(), timeline.recent_shares(WINDOW), timeline.totals()
    stages, now = pipeline.store.schema.stages, time.monotonic()
    found = []
    for worker in pipeline.workers:
        if worker.name not in (*stages, pipeline.feeder.name, pipeline.weights.name, pipeline.evaluator.name):
            continue
        at = doing.get(worker.name)
        found.append(
            {
                "name": worker.name,
                "stage": worker.name if worker.name in stages else None,
                "activity": "idle" if at is None else at.activity,
                "cause": None if at is None else at.cause or None,
                "since_seconds": 0.0 if at is None else at.seconds,
                "heartbeat_seconds": None if worker.beat is None else max(0.0, now - worker.beat),
                "drained": worker.drained,
                "shares": {name: shares.get(f"{worker.name}/{name}", 0.0) for name in ("busy", "idle", "blocked")},
                "seconds": {name: totals.get((worker.name, name), 0.0) for name in ("busy", "idle", "blocked")},
            }
        )
    return found


def engines(pipeline: Pipeline, config: Config) -> list[dict[str, Any]]:
    """The rollout engines: what they serve, whether the learner's log-probs agree, and how much they have to do."""
    served = pipeline.weights.served
    return [
        {
            "name": pipeline.host.name,
            "kind": config.rollout.engine,
            "served": None if served is None else str(served.version),
            "digest": None if served is None else served.digest,
            "attested": pipeline.attestation.holds,
            "in_flight": len(pipeline.rollouts.under_way()),
        }
    ]


def drainable(pipeline: Pipeline, name: str) -> Worker:
    """The worker of this name, where it takes work from the store or puts it there. Raises ControlError."""
    names = (pipeline.feeder.name, *pipeline.store.schema.stages)
    found: Mapping[str, Worker] = {worker.name: worker for worker in pipeline.workers if worker.name in names}
    if name not in found:
        raise ControlError(f"there is no worker {name!r} that can be drained: name one of {', '.join(found)}")
    return found[name]
