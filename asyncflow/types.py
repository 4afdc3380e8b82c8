"""The values that cross a boundary between two parts: versions, samples, completions, training samples.

Everything here is frozen, keyword-only and free of heavy imports, so that any process can hold it.

Worked example::

    >>> version = PolicyVersion(n=3)
    >>> str(version), PolicyVersion.parse("0.3") == version, PolicyVersion.unpack(version.packed) == version
    ('0.3', True, True)
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

FinishReason = Literal["stop", "length"]
UpdateMode = Literal["boundary", "in_flight"]
KLEstimator = Literal["k1", "k2", "k3", "k3+"]
Activity = Literal["busy", "idle", "blocked"]
"""`busy`: it computes. `idle`: it has nothing to work on. `blocked`: it has work and may not go on with it."""


@dataclass(frozen=True, kw_only=True, order=True)
class PolicyVersion:
    """Names one set of weights: the n-th publication of one incarnation of the learner."""

    incarnation: int = 0
    """Grows by one each time a learner restarts from a checkpoint, so that a number never names two sets of weights."""
    n: int
    """Publications so far; 0 is the initial model."""

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that cannot be packed."""
        if not (0 <= self.n < 1 << 32 and 0 <= self.incarnation < 1 << 31):
            raise ValueError(f"there is no policy version {self}: its numbers are at least 0 and below 2³² and 2³¹")

    @property
    def packed(self) -> int:
        """Both numbers in one int64, the form in which `token_versions` stores them (order is kept)."""
        return self.incarnation << 32 | self.n

    @classmethod
    def unpack(cls, packed: int) -> PolicyVersion:
        """Inverse of `packed`."""
        return cls(incarnation=int(packed) >> 32, n=int(packed) & 0xFFFFFFFF)

    @classmethod
    def parse(cls, text: str) -> PolicyVersion:
        """Inverse of `str`; ValueError when the text is not `incarnation.n`."""
        incarnation, n = text.split(".")
        return cls(incarnation=int(incarnation), n=int(n))

    def __str__(self) -> str:
        return f"{self.incarnation}.{self.n}"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One item of a data set, before it is tokenised and becomes a group of samples."""

    messages: str | tuple[Mapping[str, str], ...]
    """Plain text, or chat messages (`role`, `content`) to which the model's chat template applies."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Every other column of the item, passed on to the reward functions by name (JSON values)."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a completion is sampled. The defaults sample from the model's own distribution."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    seed: int | None = None
    """None lets the engine choose. With a seed, a deterministic engine gives the same tokens for the same weights."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a rollout engine returns for one request. R is the number of response tokens."""

    token_ids: Int32s
    """(R,) response tokens, the end-of-sequence token included when it was sampled."""
    logprobs: Floats
    """(R,) behaviour policy: the engine's own log-probability of each token at sampling, temperature applied."""
    token_versions: Int64s
    """(R,) packed `PolicyVersion` whose weights produced each token; never decreases."""
    text: str
    """The response decoded, special tokens left out."""
    finish_reason: FinishReason
    """`stop`: the model ended it. `length`: it was cut at `max_new_tokens`."""


@dataclass(frozen=True, kw_only=True)
class TokenSample:
    """One sample whose response tokens are to get log-probs. P prompt tokens, R response tokens."""

    sample_id: int
    group_id: int
    """Samples of one group share their prompt, so an engine may compute it once."""
    prompt_ids: Int32s
    """(P,)"""
    response_ids: Int32s
    """(R,)"""

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True, kw_only=True)
class TrainSample(TokenSample):
    """One sample as the learner engine sees it. P prompt tokens, R response tokens."""

    mask: Bools
    """(R,) True where the token takes part in the loss."""
    behaviour_logprobs: Floats
    """(R,) log μ of each response token."""
    advantages: Floats
    """(R,) advantage of each response token."""
    proximal_logprobs: Floats | None = None
    """(R,) log π_prox, or None when the step makes one update only, where it equals the current policy's."""
    reference_logprobs: Floats | None = None
    """(R,) log π_ref, or None without a KL term."""


class Recorder(Protocol):
    """Takes the measurements of a run; one call is one line of `metrics.jsonl`."""

    def log(self, kind: str, values: Mapping[str, Any]) -> None:
        """Record `values` (JSON) as an event of this kind (`step`, `eval`, …). Raises OSError when the disk is full."""


class Timeline(Protocol):
    """Takes what the parts of a run do, and when. Thread-safe; microseconds a call, so that nobody need think twice.

    A track is a part of the run (`feeder`, `rollout`, …), or a lane of many equal things (`generation/3`). A part is in
    one activity until it enters the next, so its shares of time add up; what it does within is told in spans.
    """

    def now(self) -> float:
        """Seconds from an arbitrary origin, for `record`."""

    def enter(self, track: str, activity: Activity, cause: str = "") -> None:
        """From now on the track is in this activity; nothing changes when it is already. `cause` names what a track
        that is not busy waits for (`Table.awaited`)."""

    def leave(self, track: str) -> None:
        """From now on the track does not take part."""

    def span(self, track: str, name: str, **args: Any) -> AbstractContextManager[None]:
        """What is done inside is one piece of work of this name."""

    def record(self, track: str, name: str, began: float, **args: Any) -> None:
        """A piece of work that began at `began` ends now."""

    def add(self, track: str, name: str, seconds: float) -> None:
        """Time that goes into the shares under this name, and is no span."""

    def lap(self) -> Mapping[str, float]:
        """Shares of the time since the last lap, as metrics, 0 to 1: `stage/<track>/busy`, `…/idle`, `…/blocked`, of
        the last two `…/wait_for/<cause>`, and `…/<name>` of each kind of span or added time. Keeps what was recorded
        until here. Raises OSError when it cannot, because the disk is full for example."""
