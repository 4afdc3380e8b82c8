"""Attestation while a run goes on: fresh samples are put aside as they come, and compared when the learner has time.

    RolloutWorker ── completions of one version ──► FreshSamples ──► Attestation (in the learner's thread)
                                                         ▲                  │ mismatch: an alarm, and close it
    WeightFollower ── loads the weights again, opens it ─┘ ◄────────────────┘ again a mismatch: stop

Samples that are trained are often a version old, and come when the learner has other weights already. So some of those
that are *fresh* (all of their tokens from one version) are looked at before the learner changes these weights; where
there were none in time, those of the version before, under its weights, which the channel still has.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence

import numpy as np

from asyncflow.config import Config
from asyncflow.engines.base import LearnerEngine, WeightSnapshot
from asyncflow.engines.weights.attestation import Alternative, Attestor, Evidence, Fault
from asyncflow.errors import WeightsError
from asyncflow.types import Completion, Floats, Int32s, PolicyVersion, Recorder, TrainSample
from asyncflow.workers.alarms import Alarms

VERSIONS = 2
"""Versions of which samples are kept: the learner's, and the one before."""
PATIENT_VERSIONS = 5
"""Versions in a row without any attestation after which there is a warning."""


class FreshSamples:
    """The last `capacity` single-version completions of the newest versions. Thread-safe."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._samples: dict[PolicyVersion, deque[TrainSample]] = {}
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
        shape = completion.token_ids.shape
        sample = TrainSample(
            sample_id=sample_id,
            group_id=group_id,
            prompt_ids=prompt_ids,
            response_ids=completion.token_ids,
            mask=np.ones(shape, dtype=np.bool_),
            behaviour_logprobs=completion.logprobs,
            advantages=np.zeros(shape, dtype=np.float32),
        )
        version = PolicyVersion.unpack(newest)
        with self._lock:
            if self._closed or epoch != self._epoch or not self._capacity:
                return
            self._samples.setdefault(version, deque(maxlen=self._capacity)).append(sample)
            for old in sorted(self._samples)[:-VERSIONS]:
                del self._samples[old]

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
    ) -> None:
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
        self._resynced: PolicyVersion | None = None
        """The version at which the engine had to load its weights again, until one is right after that."""
        self._fault: Fault | None = None
        """Of the last version that was compared."""
        self._warned = False

    def published(self, snapshot: WeightSnapshot) -> None:
        """The learner has new weights."""
        if not self._enough:
            return
        self._snapshots.append(snapshot)
        before = snapshot.version.n - 1
        if len(self._snapshots) == 3 and self._attested is not None and self._attested.n >= before:
            # The version before is attested, so nobody will ask for the one that came before that.
            self._snapshots.popleft()
        self._notice_gaps(snapshot.version)

    def while_idle(self) -> None:
        """The learner has nothing to do: attest its version, if there are samples enough and it was not done yet."""
        if self._snapshots:
            version = self._snapshots[-1].version
            if self._is_new(version) and len(samples := self._fresh.of(version)) >= self._enough:
                self._attest(self._snapshots[-1], samples)

    def before_update(self) -> None:
        """The learner is about to change its weights: the last moment at which its version costs one pass only.

        Raises WeightsError when the engine does not serve what it says and a re-sync has not helped (or is not wanted).
        """
        open_ = [
            (snapshot, samples)
            for snapshot in list(self._snapshots)[-VERSIONS:]
            if self._is_new(snapshot.version) and (samples := self._fresh.of(snapshot.version))
        ]
        # The newest one with samples enough. One with fewer is looked at when it will not get any more.
        for snapshot, samples in reversed(open_):
            last_chance = not self._looks_back or snapshot is not self._snapshots[-1]
            if len(samples) >= self._enough or last_chance:
                self._attest(snapshot, samples)
                return

    def _is_new(self, version: PolicyVersion) -> bool:
        return self._attested is None or version > self._attested

    def _attest(self, snapshot: WeightSnapshot, samples: Sequence[TrainSample]) -> None:
        began = time.monotonic()
        evidence = self._evidence(snapshot, samples)
        if evidence is None:
            return
        verdict = self._attestor.judge(evidence)
        self._attested = snapshot.version
        self._warned = False
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
                "attest/seconds": time.monotonic() - began,
            },
        )
        before, self._fault = self._fault, verdict.fault
        if verdict.fault is None:
            self._resynced = None
            return
        if self._on_mismatch == "warn" and verdict.fault == before:
            return  # said already
        again = self._on_mismatch == "resync" and self._resynced is not None
        stops = self._on_mismatch == "stop" or again
        what = f"the engine does not serve version {snapshot.version}: {verdict.text}"
        done = {
            "stop": "the run stops",
            "warn": "the run goes on, because attestation.on_mismatch is warn",
            "resync": "it loads the weights again",
        }[self._on_mismatch]
        if again:
            done = (
                f"it was so at version {self._resynced} and loaded the weights again, which did not help: the run stops"
            )
        self._alarms.sound(
            verdict.fault,
            f"{what}; {done}",
            severity="error" if stops else "warning",
            version=str(snapshot.version),
            mean=verdict.mean,
            threshold=verdict.threshold,
        )
        if stops:
            raise WeightsError(f"{what}; {done}")
        if self._on_mismatch == "resync":
            self._resynced = snapshot.version
            self._fresh.close()

    def _evidence(self, snapshot: WeightSnapshot, samples: Sequence[TrainSample]) -> Evidence | None:
        """What the learner says to these samples; None when it cannot compute under another version's weights."""
        current = self._logprobs(samples, snapshot)
        if current is None:
            return None
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
        return Evidence(
            behaviour=[sample.behaviour_logprobs for sample in samples], current=current, alternatives=alternatives
        )

    def _logprobs(self, samples: Sequence[TrainSample], snapshot: WeightSnapshot) -> list[Floats] | None:
        own = snapshot is self._snapshots[-1]
        if own and not self._as_published:
            return self._engine.logprobs(samples)
        found = self._engine.logprobs_under(samples, weights=snapshot)
        return self._engine.logprobs(samples) if found is None and own else found

    def _notice_gaps(self, version: PolicyVersion) -> None:
        """Warn once when nothing has been attested for some versions."""
        last = -1 if self._attested is None else self._attested.n
        if not self._warned and version.n - last > PATIENT_VERSIONS:
            self._warned = True
            since = "yet" if self._attested is None else f"since version {self._attested}"
            self._alarms.sound(
                "unattested",
                f"nothing has been attested {since}: no completion had all of its tokens from one version while the "
                "learner still had the weights",
                version=str(version),
            )
