"""Attestation: does the engine sample from the weights that it says it serves? Plain values in, verdicts out.

A digest proves which bytes an engine has received, not which weights compute its tokens. What proves that is the
distribution itself: the engine's log-probs log μ of tokens that it says it sampled under version v, against the
learner's log π_v of the same tokens. Two tests look at them (limits and measurements: docs/attestation.md).

*Distance.* mean |log μ − log π_v| over the tokens must stay below a threshold. By how much two correct implementations
differ depends on the dtype and on the model (bf16: 1e-3 for two layers, 6e-2 for thirty), so the threshold is a
multiple of what was seen on the first version, which is believed only below a ceiling that the dtype sets. Training
changes the noise (larger logits have larger rounding errors), so what was seen follows it, a few percent a version.

*Contrast.* Is log μ nearer to log π_v, or to a named alternative a: the weights before (`stale_weights`), or the same
weights without the temperature (`missing_temperature`)? With d = log π_v − a and m = (log π_v + a) / 2, token by token,

    u = (log μ − m) · d = ½ [(log μ − a)² − (log μ − log π_v)²]

is positive on average for a true engine and negative for one that computes a. Rounding noise of equal size on both
sides cancels in the mean, so this sees differences below the noise once there are tokens enough. Its sum, in units of
its own standard error, is added up over versions as a one-sided CUSUM (Page, Biometrika 41, 1954):

    z_v = Σu / se(Σu),   g ← max(0, g − z_v − SLACK),   alarm at g > LIMIT

Worked example::

    >>> attestor = Attestor(dtypes=("fp32", "fp32"))
    >>> current = np.log(np.array([[0.5, 0.2, 0.9, 0.3]], np.float32))
    >>> attestor.judge(Evidence(behaviour=[current[0]], current=[current[0]])).fault is None
    True
    >>> attestor.judge(Evidence(behaviour=[current[0] - 0.5], current=[current[0]])).fault
    'logprob_mismatch'
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from asyncflow.types import Floats

Dtype = Literal["bf16", "fp32"]
Fault = Literal["stale_weights", "missing_temperature", "logprob_mismatch"]
Alternative = Literal["stale_weights", "missing_temperature"]


CEILING: Mapping[Dtype, float] = {"bf16": 0.25, "fp32": 1e-3}
"""Mean |log μ − log π| that is always a fault, by the coarser dtype of engine and learner."""
FLOOR = 1e-5
"""… and one that never is."""
MARGIN = 4.0
"""Threshold over what was seen on the first version."""
CALIBRATION_TOKENS = 32
"""Tokens on which the first version's noise is measured; until they are there, the ceiling is the threshold. A later
version with fewer does not change it."""
FOLLOWED = 1.05
"""Factor by which one version without fault changes what counts as noise, at most: an engine that goes wrong by a
little more with each version outruns it."""
SLACK = 0.5
"""Standard errors a version by which evidence for an alternative decays."""
LIMIT = 10.0
"""Evidence at which it is believed: for pure noise, that is once in more than 100,000 versions."""
MOST = 8.0
"""Standard errors that one version can count for, so that no single version convicts an engine by contrast alone."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Log-probs of the response tokens of some samples of one version, one (R,) array a sample in each list."""

    behaviour: Sequence[Floats]
    """log μ, as the engine returned them."""
    current: Sequence[Floats]
    """log π_v, computed by the learner under the version that the engine says it served."""
    alternatives: Mapping[Alternative, Sequence[Floats]] = field(default_factory=dict)
    """What the learner computes for an engine that has a fault."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the samples of one version say about the engine."""

    fault: Fault | None
    text: str
    """What is wrong, in one sentence; empty without a fault."""
    mean: float
    """Of |log μ − log π_v| over the tokens, nats."""
    p99: float
    max: float
    threshold: float
    """For the mean."""
    tokens: int
    samples: int
    contrast: Mapping[Alternative, float]
    """Alternative → z of this version; positive: the engine is nearer to what it should be."""


class Attestor:
    """Judges one engine, version after version. Not thread-safe; keeps what it has learned about the noise."""

    def __init__(self, *, dtypes: tuple[Dtype, Dtype]) -> None:
        """`dtypes`: in which the engine and the learner compute."""
        self._ceiling = CEILING["bf16" if "bf16" in dtypes else "fp32"]
        self._seen: list[NDArray[np.float64]] = []
        self._baseline: float | None = None
        self._evidence: dict[Alternative, float] = {}

    @property
    def threshold(self) -> float:
        """Largest mean |log μ − log π_v| that is no fault."""
        if self._baseline is None:
            return self._ceiling
        return min(self._ceiling, max(FLOOR, MARGIN * self._baseline))

    def judge(self, evidence: Evidence) -> Verdict:
        """Look at one version. A version without fault among the first ones calibrates the threshold."""
        difference = np.abs(_joined(evidence.behaviour) - _joined(evidence.current))
        mean, threshold = float(difference.mean()), self.threshold
        contrast = {name: _contrast(evidence, other) for name, other in evidence.alternatives.items()}
        for name, z in contrast.items():
            self._evidence[name] = max(0.0, self._evidence.get(name, 0.0) - z - SLACK)
        far = not mean <= threshold  # also when it is not a number
        believed = [name for name, weight in self._evidence.items() if weight > LIMIT]
        fault: Fault | None = None
        if far:
            fault = self._explanation(evidence, contrast)
        elif believed:
            _, fault = max((self._evidence[name], name) for name in believed)
        if fault is None:
            self._calibrate(difference)
        for name in believed:
            # Half of the way is kept, so that a fault that goes on is confirmed at once.
            self._evidence[name] = LIMIT / 2
        return Verdict(
            fault=fault,
            text="" if fault is None else _told(fault, mean, threshold, far=far),
            mean=mean,
            p99=float(np.quantile(difference, 0.99)),
            max=float(difference.max()),
            threshold=threshold,
            tokens=len(difference),
            samples=len(evidence.behaviour),
            contrast=contrast,
        )

    def _calibrate(self, difference: NDArray[np.float64]) -> None:
        if self._baseline is None:
            self._seen.append(difference)
            if sum(map(len, self._seen)) >= CALIBRATION_TOKENS:
                self._baseline = float(np.concatenate(self._seen).mean())
                self._seen.clear()
        elif len(difference) >= CALIBRATION_TOKENS:
            mean = float(difference.mean())
            self._baseline = min(max(mean, self._baseline / FOLLOWED), self._baseline * FOLLOWED)

    def _explanation(self, evidence: Evidence, contrast: Mapping[Alternative, float]) -> Fault:
        """Name the alternative to which log μ is clearly nearer; a mismatch that none explains has no such name.

        An engine that took most of an update but not all of it lies between the old weights and the new ones: nearer
        than a quarter of the way to the old ones counts as not updated.
        """
        shares = {
            name: share
            for name, other in evidence.alternatives.items()
            if contrast[name] < 0 and (share := _share_of_the_way(evidence, other)) < 0.25
        }
        if not shares:
            return "logprob_mismatch"
        nearest: Alternative = min(shares, key=lambda name: abs(shares[name]))
        return nearest


def _contrast(evidence: Evidence, other: Sequence[Floats]) -> float:
    """z: Σu in units of its standard error, at most `MOST` of them either way; 0 where nothing can be told apart.

    Tokens of a sample need not be independent, and a few samples alone give a poor variance: the larger of the two
    estimates (over tokens, over sums of samples) is taken.
    """
    sums, squares, tokens = [], 0.0, 0
    for behaviour, current, alternative in zip(evidence.behaviour, evidence.current, other, strict=True):
        new, old = current.astype(np.float64), alternative.astype(np.float64)
        u = (behaviour - (new + old) / 2) * (new - old)
        sums.append(float(u.sum()))
        squares += float((u**2).sum())
        tokens += len(u)
    total, samples = sum(sums), len(sums)
    by_token = squares - total**2 / tokens
    by_sample = sum((s - total / samples) ** 2 for s in sums) * samples / max(1, samples - 1)
    if samples == 1:
        by_sample = total**2  # nothing is known about how samples differ
    variance = max(by_token, by_sample)
    if not math.isfinite(total) or variance <= 0:
        return 0.0
    return max(-MOST, min(MOST, total / math.sqrt(variance)))


def _share_of_the_way(evidence: Evidence, other: Sequence[Floats]) -> float:
    """Least-squares place of log μ on the line from the alternative (0) to log π_v (1)."""
    old, new = _joined(other), _joined(evidence.current)
    length = float(((new - old) ** 2).sum())
    return float(((_joined(evidence.behaviour) - old) * (new - old)).sum()) / length if length else math.inf


def _joined(arrays: Sequence[Floats]) -> NDArray[np.float64]:
    return np.concatenate(arrays).astype(np.float64)


def _told(fault: Fault, mean: float, threshold: float, *, far: bool) -> str:
    looks = {
        "stale_weights": "its tokens come from older weights than it says: it did not take an update",
        "missing_temperature": "its log-probs are those without the temperature: let it return them as it samples "
        "(vLLM: logprobs_mode processed_logprobs)",
        "logprob_mismatch": "neither older weights nor a missing temperature explain it, so part of an update may be "
        "missing, or the engine computes another model",
    }[fault]
    if not far:
        return f"{looks} (seen over several versions, below the noise of a single one)"
    return f"{looks} (its log-probs differ from the learner's by {mean:.2g} on average, the limit is {threshold:.2g})"
