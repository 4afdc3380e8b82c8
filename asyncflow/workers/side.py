"""The rollout side of a run: the engine, who runs it, and who brings it samples; in the run's process or in another.

Whoever places it makes a `RolloutSide`; nobody else knows where it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from asyncflow.config import Config
from asyncflow.engines.base import RolloutEngine
from asyncflow.store.client import StoreClient
from asyncflow.store.schema import Stage
from asyncflow.types import Int32s, Sampling, Timeline
from asyncflow.workers.attestation import FreshSamples, Offers
from asyncflow.workers.base import Heartbeat, Worker
from asyncflow.workers.host import EngineHost, Host
from asyncflow.workers.rollout import Rollouts, RolloutWorker

ENGINE = "rollout-0"
"""Name of the one rollout engine of a run."""


@dataclass(frozen=True, kw_only=True)
class RolloutSide:
    """As the rest of a run sees it."""

    host: Host
    worker: Worker
    rollouts: Rollouts
    """The same one, for those who ask about its completions."""
    fresh: FreshSamples
    """Where its completions of one version are, and whether the engine has to load its weights again."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the parts of the side need in the process in which they are."""

    config: Config
    stage: Stage
    store: StoreClient
    heartbeat: Heartbeat
    timeline: Timeline


def rollout_parts(
    engine: RolloutEngine, around: Surroundings, *, canary: Int32s | None, fresh: Offers
) -> tuple[EngineHost, RolloutWorker]:
    """The parts of the side in this process. Starts nothing."""
    config, timeline = around.config, around.timeline
    assert config.rollout.timeout is not None, "a plan derives it"
    host = EngineHost(engine, ENGINE, timeline, rollout_timeout=config.rollout.timeout, canary=canary)
    worker = RolloutWorker(
        around.stage,
        around.store,
        around.heartbeat,
        timeline,
        host=host,
        sampling=Sampling(max_new_tokens=config.max_new_tokens, temperature=config.temperature),
        max_concurrency=config.rollout.max_concurrency,
        seed=config.seed if config.deterministic else None,
        fresh=fresh,
    )
    return host, worker


def side_here(engine: RolloutEngine, around: Surroundings, *, canary: Int32s | None) -> RolloutSide:
    """The side in the process of the run."""
    fresh = FreshSamples(around.config.attestation.samples)
    host, worker = rollout_parts(engine, around, canary=canary, fresh=fresh)
    return RolloutSide(host=host, worker=worker, rollouts=worker, fresh=fresh)
