"""Attestation while a run goes on: fresh samples are put aside as they come, and compared when the learner has time.

    RolloutWorker ── completions of one version ──► FreshSamples ──► Attestation (in the learner's thread)
                                                         ▲                  │ mismatch: an alarm, and close it
    WeightFollower ── loads the weights again, opens it ─┘ ◄────────────────┘ again a mismatch: stop

    EngineHost ── after each load, the canary ──► FreshSamples

Samples that are trained are often a version old, and come when the learner has other weights already. So some of those
that are *fresh* (all of their tokens from one version) are looked at before the learner changes these weights; where
there were none in time, those of the version before, under its weights, which the channel still has.

The canary is for updates that change less than the noise of the dtype, where samples need many versions to tell. After
each load the engine completes the same prompt, greedily and alone. When its log-probs are those of the version before
to the last bit, while the learner's have changed, it has kept the old weights.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from asyncflow.clock import Clock, SystemClock
from asyncflow.config import Config
from asyncflow.engines.base import LearnerEngine, WeightSnapshot
from asyncflow.engines.weights.attestation import Alternative, Attestor, Evidence, Fault
from asyncflow.errors import WeightsError
from asyncflow.types import Completion, Floats, Int32s, PolicyVersion, Recorder, TrainSample
from asyncflow.workers.alarms import Alarms

VERSIONS = 2
"""Versions of which samples are kept: the learner's, and the one before."""
THOROUGH_VERSIONS = 3
"""Versions that are always compared by contrast too; later only where it costs nothing or the canary said nothing."""
PATIENT_VERSIONS = 5
"""Versions in a row without any attestation, and seconds, after which there is a warning: where steps take
milliseconds, that some pass without a fresh sample says nothing."""
PATIENT_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Canary:
    """A few greedy tokens of always the same prompt, with nothing beside it: what an engine does that keeps its weights
    is then the same to the last bit."""

    version: PolicyVersion
    sample: TrainSample


class Offers(Protocol):
    """Whom completions are offered to as they come: `FreshSamples`, or one in another process."""

    @property
    def epoch(self) -> int:
        """See `FreshSamples`."""

    def offer(self, sample_id: int, group_id: int, prompt_ids: Int32s, completion: Completion, *, epoch: int) -> None:
        """See `FreshSamples`."""


class FreshSamples:
    """The last `capacity` single-version completions of the newest versions. Thread-safe."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._samples: dict[PolicyVersion, deque[TrainSample]] = {}
        self._canaries: deque[Canary] = deque(maxlen=VERSIONS)
        self._epoch = 0
        self._closed = False

    @property
    def epoch(self) -> int:
        """Grows when the engine has loaded its weights again: what was begun before says nothing about them."""
        with self._lock:
            return self._epoch

    def offer(self, sample_id: int, group_id: int, prompt_ids: Int32s, completion: Completion, *, epoch: int) -> None:
        """Keep a finished completion, if all of its tokens have one version. `epoch` is from when it was begun."""
        oldest, newest = completion.token_versions.min(), completion.token_versions.max()
        if oldest != newest:
            return
        version = PolicyVersion.unpack(newest)
        sample = _as_sample(sample_id, group_id, prompt_ids, completion)
        with self._lock:
            if self._closed or epoch != self._epoch or not self._capacity:
                return
            self._samples.setdefault(version, deque(maxlen=self._capacity)).append(sample)
            for old in sorted(self._samples)[:-VERSIONS]:
                del self._samples[old]

    def completed_canary(self, version: PolicyVersion, prompt_ids: Int32s, completion: Completion) -> None:
        """The engine has just loaded a version, and completed the canary prompt first of all."""
        canary = Canary(version=version, sample=_as_sample(-1, -1, prompt_ids, completion))
        with self._lock:
            if self._closed:
                return
            if self._canaries and self._canaries[-1].version == version:
                self._canaries.pop()
            self._canaries.append(canary)

    def canaries(self) -> tuple[Canary, Canary] | None:
        """Those of the last version that was loaded and of the one before, or None when there are no two."""
        with self._lock:
            return (self._canaries[0], self._canaries[1]) if len(self._canaries) == VERSIONS else None

    def of(self, version: PolicyVersion) -> list[TrainSample]:
        """What is there of one version."""
        with self._lock:
            return list(self._samples.get(version, ()))

    @property
    def closed(self) -> bool:
        """Whether the engine has to load its weights again."""
        with self._lock:
            return self._closed

    def close(self) -> None:
        """Throw everything away, and take nothing until the engine has loaded its weights again."""
        with self._lock:
            self._closed = True
            self._samples.clear()

    def reopen(self) -> None:
        """The engine has loaded its weights again: take what it begins from now on."""
        with self._lock:
            self._closed = False
            self._epoch += 1
            self._samples.clear()


def _as_sample(sample_id: int, group_id: int, prompt_ids: Int32s, completion: Completion) -> TrainSample:
    shape = completion.token_ids.shape
    return TrainSample(
        sample_id=sample_id,
        group_id=group_id,
        prompt_ids=prompt_ids,
        response_ids=completion.token_ids,
        mask=np.ones(shape, dtype=np.bool_),
        behaviour_logprobs=completion.logprobs,
        advantages=np.zeros(shape, dtype=np.float32),
    )


class Attestation:
    """Compares fresh samples with the learner, and does something about an engine that fails. One thread calls it."""

    def __init__(
        self,
        engine: LearnerEngine,
        fresh: FreshSamples,
        *,
        config: Config,
        recorder: Recorder,
        alarms: Alarms,
        clock: Clock | None = None,
    ) -> None:
        self._clock = clock or SystemClock()
        self._engine = engine
        self._fresh = fresh
        self._enough = min(config.attestation.samples, config.train_batch_size)
        self._looks_back = type(engine).logprobs_under is not LearnerEngine.logprobs_under
        self._on_mismatch = config.attestation.on_mismatch
        self._temperature = config.temperature
        # A learner in fp32 holds more digits than a bf16 engine is given: compare with what was published.
        self._as_published = config.learner.dtype == "fp32" and config.rollout.dtype == "bf16"
        self._recorder = recorder
        self._alarms = alarms
        self._attestor = Attestor(dtypes=(config.rollout.dtype, config.learner.dtype))
        self._snapshots: deque[WeightSnapshot] = deque(maxlen=3)
        self._attested: PolicyVersion | None = None
        """The last version that was compared."""
        self._faults: dict[str, tuple[Fault, PolicyVersion]] = {}
        """What was wrong by each of the two tests, and at which version, until it is right again."""
        self._compared_canary: Canary | None = None
        """The last canary that was compared."""
        self._compared = 0
        """Versions whose samples were compared."""
        self._unattested = 0
        """Publications since the last comparison, or the last alarm that there is none."""
        self._since = self._clock.monotonic()
        """When that was."""

    @property
    def holds(self) -> bool | None:
        """Whether the engine served what it says when this was last looked at; None: it was not yet."""
        if self._faults:
            return False
        return None if self._attested is None else True

    def published(self, snapshot: WeightSnapshot) -> None:
        """The learner has new weights."""
        if not self._enough:
            return
        self._snapshots.append(snapshot)
        before = snapshot.version.n - 1
        if len(self._snapshots) == 3 and self._attested is not None and self._attested.n >= before:
            # The version before is attested, so nobody will ask for the one that came before that.
            self._snapshots.popleft()
        self._unattested += 1
        if self._unattested > PATIENT_VERSIONS and self._clock.monotonic() - self._since > PATIENT_SECONDS:
            self._say_that_nothing_is_attested(snapshot.version)

    def while_idle(self) -> None:
        """The learner has nothing to do: attest its version, if there are samples enough and it was not done yet."""
        if self._snapshots:
            self._compare_canaries()
            version = self._snapshots[-1].version
            if self._is_new(version) and len(samples := self._fresh.of(version)) >= self._enough:
                self._attest(self._snapshots[-1], samples, thorough=True)

    def before_update(self) -> None:
        """The learner is about to change its weights: the last moment at which its version costs one pass only.

        Raises WeightsError when the engine does not serve what it says and a re-sync has not helped (or is not wanted).
        """
        self._compare_canaries()
        open_ = [
            (snapshot, samples)
            for snapshot in list(self._snapshots)[-VERSIONS:]
            if self._is_new(snapshot.version) and (samples := self._fresh.of(snapshot.version))
        ]
        # The newest one with samples enough. One with fewer is looked at when it will not get any more.
        for snapshot, samples in reversed(open_):
            last_chance = not self._looks_back or snapshot is not self._snapshots[-1]
            if len(samples) >= self._enough or last_chance:
                told = self._compared_canary is not None and self._compared_canary.version == snapshot.version
                self._attest(snapshot, samples, thorough=self._compared < THOROUGH_VERSIONS or not told)
                return

    def _is_new(self, version: PolicyVersion) -> bool:
        return self._attested is None or version > self._attested

    def _attest(self, snapshot: WeightSnapshot, samples: Sequence[TrainSample], *, thorough: bool) -> None:
        """`thorough`: by contrast too, which computes the samples once or twice more. To name a fault, always."""
        began = self._clock.monotonic()
        current = self._logprobs(samples, snapshot)
        if current is None:
            return
        evidence = Evidence(behaviour=[sample.behaviour_logprobs for sample in samples], current=current)
        if thorough:
            evidence = replace(evidence, alternatives=self._alternatives(snapshot, samples))
        verdict = self._attestor.judge(evidence)
        if verdict.fault is not None and not thorough:
            verdict = self._attestor.judge(replace(evidence, alternatives=self._alternatives(snapshot, samples)))
        self._compared += 1
        self._attested = snapshot.version
        self._wait_again()
        self._recorder.log(
            "attest",
            {
                "version": str(snapshot.version),
                "attest/logprob_diff_mean": verdict.mean,
                "attest/logprob_diff_p99": verdict.p99,
                "attest/logprob_diff_max": verdict.max,
                "attest/threshold": verdict.threshold,
                "attest/tokens": verdict.tokens,
                "attest/samples": verdict.samples,
                **{f"attest/z_{name}": z for name, z in verdict.contrast.items()},
                "attest/fault": verdict.fault,
                "attest/seconds": self._clock.monotonic() - began,
            },
        )
        details = {"mean": verdict.mean, "threshold": verdict.threshold}
        self._judge("samples", verdict.fault, verdict.text, snapshot.version, details)

    def _compare_canaries(self) -> None:
        """Compare the last two canaries, once, while the learner still has the weights of both."""
        pair = self._fresh.canaries()
        if pair is None or pair[1] is self._compared_canary:
            return
        before, now = pair
        weights = {snapshot.version: snapshot for snapshot in self._snapshots}
        if before.version not in weights or now.version not in weights or not self._looks_back:
            return
        self._compared_canary = now
        same = np.array_equal(before.sample.response_ids, now.sample.response_ids) and np.array_equal(
            before.sample.behaviour_logprobs, now.sample.behaviour_logprobs
        )
        if same and weights[before.version].digest != weights[now.version].digest and self._changed(now, weights):
            text = (
                "its tokens come from older weights than it says: it completes a prompt with the same log-probs to the "
                f"last bit as at version {before.version}, and the learner does not"
            )
            self._judge("canary", "stale_weights", text, now.version, {})
        elif not same:
            self._judge("canary", None, "", now.version, {})

    def _changed(self, now: Canary, weights: Mapping[PolicyVersion, WeightSnapshot]) -> bool:
        """Whether the learner gives most of the tokens other log-probs than under the weights before."""
        older = max(version for version in weights if version < now.version)
        new = self._logprobs([now.sample], weights[now.version])
        old = self._engine.logprobs_under([now.sample], weights=weights[older])
        return new is not None and old is not None and bool(np.mean(new[0] != old[0]) > 0.5)

    def _judge(
        self, test: str, fault: Fault | None, text: str, version: PolicyVersion, details: Mapping[str, Any]
    ) -> None:
        """Do what is configured about a fault. Raises WeightsError when the run has to stop."""
        before = self._faults.pop(test, None)
        if fault is None:
            return
        before = before or next(iter(self._faults.values()), None)
        self._faults[test] = (fault, version)
        if self._on_mismatch == "warn" and before is not None and before[0] == fault:
            return  # said already
        again = self._on_mismatch == "resync" and before is not None
        stops = self._on_mismatch == "stop" or again
        what = f"the engine does not serve version {version}: {text}"
        done = {
            "stop": "the run stops",
            "warn": "the run goes on, because attestation.on_mismatch is warn",
            "resync": "it loads the weights again",
        }[self._on_mismatch]
        if again and before is not None:
            done = f"it was so at version {before[1]} and loaded the weights again, which did not help: the run stops"
        self._alarms.sound(
            fault, f"{what}; {done}", severity="error" if stops else "warning", version=str(version), **details
        )
        if stops:
            raise WeightsError(f"{what}; {done}")
        if self._on_mismatch == "resync":
            self._fresh.close()

    def _alternatives(
        self, snapshot: WeightSnapshot, samples: Sequence[TrainSample]
    ) -> dict[Alternative, list[Floats]]:
        """What the learner would say to these samples if the engine had a fault."""
        alternatives: dict[Alternative, list[Floats]] = {}
        before = [s for s in self._snapshots if s.version < snapshot.version]
        if before and before[-1].digest != snapshot.digest:
            stale = self._engine.logprobs_under(samples, weights=before[-1])
            if stale is not None:
                alternatives["stale_weights"] = stale
        if self._temperature != 1.0:
            own = snapshot is self._snapshots[-1] and not self._as_published
            plain = self._engine.logprobs_under(samples, weights=None if own else snapshot, temperature=1.0)
            if plain is not None:
                alternatives["missing_temperature"] = plain
        return alternatives

    def _logprobs(self, samples: Sequence[TrainSample], snapshot: WeightSnapshot) -> list[Floats] | None:
        """Under this version; None when the engine cannot compute under other weights than its own."""
        own = snapshot is self._snapshots[-1]
        if own and not self._as_published:
            return self._engine.logprobs(samples)
        found = self._engine.logprobs_under(samples, weights=snapshot)
        return self._engine.logprobs(samples) if found is None and own else found

    def _wait_again(self) -> None:
        self._unattested, self._since = 0, self._clock.monotonic()

    def _say_that_nothing_is_attested(self, version: PolicyVersion) -> None:
        self._wait_again()
        since = "yet" if self._attested is None else f"since version {self._attested}"
        self._alarms.sound(
            "unattested",
            f"nothing has been attested {since}: no completion had all of its tokens from one version while the "
            "learner still had the weights",
            version=str(version),
        )
