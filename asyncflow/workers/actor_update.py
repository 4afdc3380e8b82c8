"""The learner: takes scored groups as they become ready, accumulates gradients, and steps when B places are consumed.

A step streams: groups are trained while later ones of the same step are still being generated. It waits for all of its
groups only where it has to: with more than one update a step, π_prox must be computed before the first of them;
`deterministic` accumulates in sample order; `colocated` has the machine for itself then; and `stream: false` says so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch

from asyncflow.algorithms.advantages import group_advantages, is_zero_variance
from asyncflow.algorithms.kl import sequence_kl
from asyncflow.algorithms.losses import merge, summarise
from asyncflow.config import Config
from asyncflow.engines.base import LearnerEngine, OptimStats
from asyncflow.engines.weights.channel import WeightChannel
from asyncflow.store.client import Lease, StoreClient
from asyncflow.store.samplers import NUMBER
from asyncflow.store.schema import Stage
from asyncflow.types import PolicyVersion, Recorder, Timeline, TrainSample
from asyncflow.workers.arrow import floats, ragged, strings
from asyncflow.workers.attestation import Attestation
from asyncflow.workers.base import Heartbeat, HeldLease, StageWorker

REFILLED = "zero_variance_refilled"

S = TypeVar("S", TrainSample, "Scored")


@dataclass
class Step:
    """What has been gathered for the step under way."""

    began: float
    places: int = 0
    """Of `train_batch_size`, consumed so far."""
    refilled: int = 0
    """Groups that were dropped and replaced."""
    held: list[HeldLease] = field(default_factory=list)
    waiting: list[TrainSample] = field(default_factory=list)
    """Samples that have not been through the model yet."""
    trained: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    masked: dict[int, PolicyVersion] = field(default_factory=dict)
    """Trained sample → its oldest token that is in the loss, where older ones are too old for it."""
    denominator: int = 0
    """Tokens in the loss of the optimizer update under way."""
    updates: list[OptimStats] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    kl_penalties: list[float] = field(default_factory=list)
    """What KL in the reward took from each reward."""
    rewards: list[float] = field(default_factory=list)
    reward_stds: list[float] = field(default_factory=list)
    """Of each group, of the rewards that its advantages are made from (KL in the reward included)."""
    lengths: list[int] = field(default_factory=list)
    truncated: int = 0
    staleness: list[int] = field(default_factory=list)
    spans: int = 0
    """Trained samples whose tokens come from more than one policy version."""
    forward_backward_s: float = 0.0
    optim_s: float = 0.0


class ActorUpdate(StageWorker):
    """Consumes scored groups, produces policy versions. Waits for the groups of its step; a reward completes one."""

    pauses = True

    def __init__(
        self,
        stage: Stage,
        store: StoreClient,
        heartbeat: Heartbeat,
        timeline: Timeline,
        *,
        engine: LearnerEngine,
        channel: WeightChannel,
        recorder: Recorder,
        attestation: Attestation,
        config: Config,
        generated_tokens: Callable[[], int],
        after_step: Callable[[PolicyVersion], None],
        on_done: Callable[[], None],
        take_turn: Callable[[], None] | None = None,
    ) -> None:
        """`after_step` is called with each new version when it is committed and published, `on_done` after the last.
        `take_turn` returns once the engine leaves the machine to the learner, until the next publication.
        """
        super().__init__(stage, store, heartbeat, timeline)
        self._engine = engine
        self._channel = channel
        self._recorder = recorder
        self._attestation = attestation
        self._config = config
        self._generated_tokens = generated_tokens
        self._after_step = after_step
        self._on_done = on_done
        self._one_update = config.updates_per_step == config.epochs_per_step == 1
        self._take_turn = take_turn
        self._streams = self._one_update and config.stream and not config.deterministic and take_turn is None
        self._max_refill = config.groups_per_step if config.max_refill is None else config.max_refill
        self.version = PolicyVersion(n=0)
        """Of the weights that the engine holds."""
        self.computing = False
        """Whether it works on a lease right now."""
        self.passes = 0
        """Forward and backward passes, and updates, so far."""
        self._step: Step | None = None
        self._generated_before = 0
        self._use_cores()

    def run(self, stopping: threading.Event, going: threading.Event | None = None) -> None:
        """See `Worker`."""
        self._use_cores()
        super().run(stopping, going)

    def _use_cores(self) -> None:
        """How many threads PyTorch computes with is a setting of the thread that computes."""
        if self._config.learner.cores is not None:
            torch.set_num_threads(len(self._config.learner.cores))

    @property
    def between_steps(self) -> bool:
        """Whether the engine's weights are those of `version`: no update of a step under way is in them."""
        return self._step is None or not self._step.updates

    def publish(self) -> None:
        """Put the current weights into the channel under the current version."""
        began = time.monotonic()
        with self.timeline.span(self.name, "publish", version=str(self.version)):
            snapshot = self._channel.publish(self.version, self._engine.export_weights())
        self._attestation.published(snapshot)
        self._recorder.log(
            "weights",
            {"version": str(self.version), "digest": snapshot.digest, "publish_s": time.monotonic() - began},
        )

    # -- a lease ---------------------------------------------------------------------------------------------------

    def room(self) -> int:
        return self._config.train_batch_size

    def max_tokens(self) -> int | None:
        return self._config.learner.micro_batch_tokens

    def turn(self) -> None:
        if self._step is None:
            self.timeline.lap()
            self._step = Step(began=time.monotonic())
        super().turn()

    def idle(self) -> None:
        self._attestation.while_idle()

    def process(self, held: HeldLease) -> None:
        self.computing = True
        try:
            self._process(held)
        finally:
            self.computing = False

    def _process(self, held: HeldLease) -> None:
        step = self._step
        assert step is not None, "a turn begins a step"
        step.held.append(held)
        for group in groups_of(held.lease):
            self._take(step, held, group)
        if self._streams:
            self._forward_backward(step, step.waiting)
            step.waiting = []
        if step.places == self._config.train_batch_size:
            self._finish(step)

    def _take(self, step: Step, held: HeldLease, group: Sequence[Scored]) -> None:
        """Decide what becomes of one group: trained, skipped or replaced."""
        ids = [scored.sample_id for scored in group]
        rewards = np.array([scored.reward for scored in group], dtype=np.float64)
        penalties = self._kl_penalties(group)
        shaped = rewards - penalties if penalties else rewards
        flat = is_zero_variance(shaped)
        if flat and self._config.zero_variance == "refill" and step.refilled < self._max_refill:
            step.refilled += 1
            self.store.drop(ids, reason=REFILLED)
            held.forget(ids)
            return
        step.places += self._config.num_generations
        step.kl_penalties += penalties
        step.rewards += rewards.tolist()
        step.reward_stds.append(float(shaped.std()))
        step.lengths += [len(scored.response_ids) for scored in group]
        step.truncated += sum(scored.truncated for scored in group)
        if flat and self._config.zero_variance != "keep":
            step.skipped += ids
            return
        step.trained += ids
        advantages = group_advantages(shaped)
        for scored, advantage in zip(group, advantages, strict=True):
            sample = scored.to_train(float(advantage), masked=scored.truncated and self._config.truncated == "mask")
            step.waiting.append(sample)
            step.staleness.append(self.version.n - scored.oldest.n)
            step.spans += scored.oldest != scored.newest
            if not scored.young.all():
                step.masked[scored.sample_id] = scored.oldest

    def _kl_penalties(self, group: Sequence[Scored]) -> list[float]:
        """What each reward loses, or nothing where KL is not in the reward."""
        config = self._config
        if config.kl_in != "reward":
            return []
        return [
            config.kl_coef * sequence_kl(scored.behaviour_logprobs, scored.reference_logprobs, config.kl)
            for scored in group
            if scored.reference_logprobs is not None
        ]

    # -- a step ----------------------------------------------------------------------------------------------------

    def _finish(self, step: Step) -> None:
        if self._take_turn is not None:
            self._take_turn()
        # An update cannot be taken back, so nothing that goes into it may be lost before the commit.
        for held in step.held:
            held.renew()
        self._attestation.before_update()
        if not self._streams:
            self._train_gathered(step)
        elif step.denominator:
            self._update(step)
        version = replace(self.version, n=self.version.n + 1)
        sync_began = time.monotonic()
        leases = [held.lease.lease_id for held in step.held]
        with self.timeline.span(self.name, "commit", version=str(version)):
            self.store.commit(
                leases=leases, trained=step.trained, skipped=step.skipped, version=version, masked=step.masked
            )
        for held in step.held:
            held.forget([row.sample_id for row in held.lease.rows])
        self.version = version
        if self._take_turn is not None:
            self._engine.rest()
        self.publish()
        self._report(step, weight_sync_s=time.monotonic() - sync_began)
        self._step = None
        self._after_step(self.version)
        if self.version.n == self._config.steps:
            self._on_done()

    def _train_gathered(self, step: Step) -> None:
        """Train a step whose samples are all there: `epochs_per_step` times over `updates_per_step` parts."""
        samples = sorted(step.waiting, key=lambda sample: sample.sample_id)
        if not samples:
            return
        if not self._one_update:
            began = time.monotonic()
            with self.timeline.span(self.name, "logprobs", samples=len(samples)):
                parts = [self._engine.logprobs(part) for part in self._micro_batches(samples)]
            proximal = [logprobs for part in parts for logprobs in part]
            step.forward_backward_s += time.monotonic() - began
            samples = [replace(s, proximal_logprobs=p) for s, p in zip(samples, proximal, strict=True)]
        for _ in range(self._config.epochs_per_step):
            for part in split_groups(samples, self._config.updates_per_step):
                for micro_batch in self._micro_batches(part):
                    self._forward_backward(step, micro_batch)
                if step.denominator:
                    self._update(step)

    def _forward_backward(self, step: Step, samples: Sequence[TrainSample]) -> None:
        tokens = int(sum(sample.mask.sum() for sample in samples))
        if not tokens:
            return
        began = time.monotonic()
        with self.timeline.span(self.name, "forward_backward", samples=len(samples), tokens=tokens):
            step.sums = merge(step.sums, self._engine.forward_backward(samples))
        step.forward_backward_s += time.monotonic() - began
        step.denominator += tokens
        self.passes += 1

    def _update(self, step: Step) -> None:
        began = time.monotonic()
        with self.timeline.span(self.name, "optimizer"):
            step.updates.append(self._engine.optim_step(step.denominator))
        step.optim_s += time.monotonic() - began
        step.denominator = 0
        self.passes += 1

    def _micro_batches(self, samples: Sequence[TrainSample]) -> Iterable[list[TrainSample]]:
        """Whole groups, as many as `micro_batch_tokens` allows, in order."""
        batch: list[TrainSample] = []
        tokens = 0
        for group in by_group(samples):
            size = sum(sample.tokens for sample in group)
            if batch and tokens + size > self._config.learner.micro_batch_tokens:
                yield batch
                batch, tokens = [], 0
            batch += group
            tokens += size
        if batch:
            yield batch

    def _report(self, step: Step, *, weight_sync_s: float) -> None:
        seconds = time.monotonic() - step.began
        generated = self._generated_tokens()
        groups = len(step.reward_stds)
        busy = step.forward_backward_s + step.optim_s + weight_sync_s
        last = step.updates[-1] if step.updates else None
        self._recorder.log(
            "step",
            {
                "step": self.version.n,
                "policy_version": str(self.version),
                "reward": float(np.mean(step.rewards)),
                "reward_std": float(np.mean(step.reward_stds)),
                "frac_reward_zero_std": sum(std == 0.0 for std in step.reward_stds) / groups,
                "completions/mean_length": float(np.mean(step.lengths)),
                "completions/truncated_frac": step.truncated / len(step.lengths),
                "samples": len(step.trained),
                "skipped": len(step.skipped),
                "refilled_groups": step.refilled,
                "sample/staleness_mean": float(np.mean(step.staleness)) if step.staleness else 0.0,
                "sample/staleness_p95": float(np.percentile(step.staleness, 95)) if step.staleness else 0.0,
                "sample/staleness_max": max(step.staleness, default=0),
                "sample/version_spans": step.spans,
                "sample/masked": len(step.masked),
                "updates": len(step.updates),
                "grad_norm": last.grad_norm if last else 0.0,
                "learning_rate": last.learning_rate if last else 0.0,
                **summarise(step.sums),
                **({"kl/penalty": float(np.mean(step.kl_penalties))} if step.kl_penalties else {}),
                "step_time": seconds,
                "perf/rollout_wait_s": max(0.0, seconds - busy),
                "perf/fwd_bwd_s": step.forward_backward_s,
                "perf/optim_s": step.optim_s,
                "perf/weight_sync_s": weight_sync_s,
                "rollout/generated_tok_s": (generated - self._generated_before) / seconds,
                "rollout/completions_s": len(step.lengths) / seconds,
                **self.timeline.lap(),
            },
        )
        self._generated_before = generated


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One row of a lease of the training stage."""

    sample_id: int
    group_id: int
    prompt_ids: np.ndarray[tuple[int], np.dtype[np.int32]]
    response_ids: np.ndarray[tuple[int], np.dtype[np.int32]]
    behaviour_logprobs: np.ndarray[tuple[int], np.dtype[np.float32]]
    young: np.ndarray[tuple[int], np.dtype[np.bool_]]
    """Tokens that are not too old for the loss: all of them, unless `late_samples` is `mask`."""
    oldest: PolicyVersion
    """Of those that are young enough."""
    newest: PolicyVersion
    truncated: bool
    reward: float
    reference_logprobs: np.ndarray[tuple[int], np.dtype[np.float32]] | None

    def to_train(self, advantage: float, *, masked: bool) -> TrainSample:
        """As the engine sees it. The end-of-sequence token is a token like the others; a masked sample has none in the
        loss."""
        shape = self.response_ids.shape
        return TrainSample(
            sample_id=self.sample_id,
            group_id=self.group_id,
            prompt_ids=self.prompt_ids,
            response_ids=self.response_ids,
            mask=self.young & (not masked),
            behaviour_logprobs=self.behaviour_logprobs,
            advantages=np.full(shape, advantage, dtype=np.float32),
            reference_logprobs=self.reference_logprobs,
        )


def groups_of(lease: Lease) -> list[list[Scored]]:
    """The rows of a lease, group by group."""
    data = lease.data
    has_reference = "ref_logprobs" in data.schema.names
    columns = zip(
        lease.rows,
        ragged(data.column("prompt_ids")),
        ragged(data.column("response_ids")),
        ragged(data.column("rollout_logprobs")),
        ragged(data.column("token_versions")),
        strings(data.column("finish_reason")),
        floats(data.column("reward")),
        ragged(data.column("ref_logprobs")) if has_reference else [None] * len(lease.rows),
        strict=True,
    )
    scored = [
        Scored(
            sample_id=row.sample_id,
            group_id=row.group_id,
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            behaviour_logprobs=logprobs,
            young=(young := (versions & NUMBER) >= lease.oldest_trainable),
            oldest=PolicyVersion.unpack(versions[young].min()),
            newest=PolicyVersion.unpack(versions.max()),
            truncated=finish_reason == "length",
            reward=float(reward),
            reference_logprobs=reference,
        )
        for row, prompt_ids, response_ids, logprobs, versions, finish_reason, reward, reference in columns
    ]
    return by_group(scored)


def by_group(samples: Sequence[S]) -> list[list[S]]:
    """Samples of one group together, groups in order of their first sample."""
    groups: dict[int, list[S]] = {}
    for sample in samples:
        groups.setdefault(sample.group_id, []).append(sample)
    return list(groups.values())


def split_groups(samples: Sequence[TrainSample], parts: int) -> list[list[TrainSample]]:
    """Whole groups in `parts` parts as equal as can be, in order; fewer parts when there are fewer groups."""
    groups = by_group(samples)
    bounds = np.linspace(0, len(groups), min(parts, len(groups)) + 1).round().astype(int)
    return [[sample for group in groups[a:b] for sample in group] for a, b in pairwise(bounds)]
