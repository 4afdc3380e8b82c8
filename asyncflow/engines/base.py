"""What an engine has to offer to take part: the protocols, and what an engine may declare about itself.

An adapter is a subclass in one file. A rollout engine needs four methods (`start`, `generate`, `load_weights`, `stop`),
a learner engine six, a scorer engine two. What an engine cannot do it does not declare, and `asyncflow.plan` refuses
configurations that would need it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

from asyncflow.config import Config
from asyncflow.types import Completion, Floats, Int32s, PolicyVersion, Sampling, TokenSample, TrainSample, UpdateMode

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a rollout engine can do. The defaults promise nothing."""

    logprobs: bool = False
    """Returns the behaviour policy's log-probability of every sampled token."""
    updates: frozenset[UpdateMode] = frozenset({"boundary"})
    """How it can take new weights. `boundary` needs nothing: the worker waits until nothing runs."""
    weights: str = "huggingface"
    """Kind of weights it serves: names and shapes as Transformers has them, unless it says otherwise."""
    deterministic: bool = False
    """The same request, seed and weights give the same tokens, whatever else runs beside it."""
    sleep: bool = False
    """Can give memory back while it generates nothing (`sleep`, `wake`)."""
    own_process: bool = False
    """Works in Python for every token. Named in a configuration, it gets a process of its own, so that the learner does
    not wait for the interpreter."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One completion that is asked for."""

    request_id: str
    """Unique within the engine's life."""
    prompt_ids: Int32s
    """(P,) prompt tokens, chat template applied."""
    sampling: Sampling


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a rollout engine says it serves."""

    version: PolicyVersion
    digest: str
    """Digest of the weights that were loaded, computed by the engine from the bytes it received."""


class WeightSnapshot(Protocol):
    """One published version of the weights, as an engine receives it. Immutable."""

    @property
    def version(self) -> PolicyVersion: ...

    @property
    def digest(self) -> str: ...

    @property
    def path(self) -> Path:
        """The file that holds the tensors (`asyncflow.engines.weights.channel` describes it)."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor under its Hugging Face name, tied weights once. Raises WeightsError when the bytes do not
        have this digest. The tensors are read-only views that are valid until the next iteration."""


class RolloutEngine(ABC):
    """Turns prompts into completions and takes new weights while it does. All methods run on one event loop."""

    capabilities: ClassVar[Capabilities] = Capabilities()

    @classmethod
    def from_config(cls, config: Config, model: Path) -> Self:  # noqa: ARG003
        """How an engine that is named in the configuration is made. `model` is a local Hugging Face folder.

        Adapters that need more than their options override this. Must not start anything.
        """
        return cls(**config.rollout.options)

    @abstractmethod
    async def start(self) -> None:
        """Load the model and warm up. Raises ModelError or EngineError."""

    @abstractmethod
    async def generate(self, request: GenerationRequest) -> Completion:
        """Complete one prompt. Many calls run at once; the engine batches them as it likes.

        Raises PromptTooLong, or EngineError when the engine cannot go on.
        """

    @abstractmethod
    async def load_weights(self, snapshot: WeightSnapshot, mode: UpdateMode) -> Served:
        """Replace the weights and return what is served now.

        With `boundary` the caller has made sure that nothing is being generated. With `in_flight` sequences may be
        running: pause them between two tokens, swap, and go on with the KV cache they have. Raises WeightsError, after
        which the engine must not be used.
        """

    async def sleep(self) -> None:  # noqa: B027
        """Give back the memory that a learner on the same device can use, the KV cache for one.

        Called when nothing is being generated, and by nobody unless `Capabilities.sleep` is declared. Between this and
        `wake` only `wake` and `stop` are called.
        """

    async def wake(self) -> None:  # noqa: B027
        """Take back what `sleep` gave. The weights are those from before, or are about to be loaded."""

    @abstractmethod
    async def stop(self) -> None:
        """Release everything, processes included. May be called twice, and before `start`."""


@dataclass(frozen=True, kw_only=True)
class OptimStats:
    """What one optimizer update did."""

    grad_norm: float
    """Norm of the gradient before clipping."""
    learning_rate: float


class LearnerEngine(ABC):
    """Holds the policy that is trained. Its methods are never called from two threads at once."""

    weights: ClassVar[str] = "huggingface"
    """Kind of weights that it exports; a rollout engine of the same kind can serve them."""

    @classmethod
    def from_config(cls, config: Config, model: Path) -> Self:  # noqa: ARG003
        """How an engine that is named in the configuration is made. `model` is a local Hugging Face folder."""
        return cls(**config.learner.options)

    @abstractmethod
    def forward_backward(self, samples: Sequence[TrainSample]) -> Mapping[str, float]:
        """Accumulate the gradient of the *summed* loss of these samples (whole groups).

        Nothing is divided here: `optim_step` divides by the whole step's denominator. Returns sums over the samples
        (`loss`, ratios, …) and counts, in the names of `asyncflow.algorithms.losses`, to be added up over a step.
        """

    @abstractmethod
    def optim_step(self, denominator: float) -> OptimStats:
        """Divide the accumulated gradient by `denominator`, clip, update, and clear it.

        A gradient that is zero everywhere (nothing was accumulated) still makes an update.
        Raises EngineError when the gradient is not finite; the weights are unchanged then.
        """

    @abstractmethod
    def logprobs(self, samples: Sequence[TrainSample]) -> list[Floats]:
        """log π_θ of the response tokens under the current weights, temperature applied: one (R,) array a sample."""

    def logprobs_under(
        self,
        samples: Sequence[TrainSample],  # noqa: ARG002
        *,
        weights: WeightSnapshot | None = None,  # noqa: ARG002
        temperature: float | None = None,  # noqa: ARG002
    ) -> list[Floats] | None:
        """`logprobs` as if the weights or the temperature were others (None: its own), which they are not afterwards.

        For attestation (`asyncflow.engines.weights.attestation`). None, the default: this engine cannot do that, and
        only completions of its current version are attested. Raises WeightsError for weights that are not its model's.
        """
        return None

    def rest(self) -> None:  # noqa: B027
        """Give back the memory that is of use only while computing; called before an engine on the same device wakes.

        Weights, gradient and optimizer state stay.
        """

    @abstractmethod
    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor under its Hugging Face name, in the dtype that engines serve, tied weights once."""

    @abstractmethod
    def save_pretrained(self, folder: Path) -> None:
        """Write the weights, configuration and tokenizer in Hugging Face format."""

    @abstractmethod
    def close(self) -> None:
        """Release everything. May be called twice."""


class ResumableLearner(LearnerEngine):
    """A learner engine whose runs can be resumed from a checkpoint."""

    @abstractmethod
    def save_state(self, folder: Path) -> None:
        """Write everything that the next update depends on (weights, optimizer, schedule, RNG) into a new folder.

        Called between two steps. What was accumulated but not applied is left out. Raises OSError.
        """

    @abstractmethod
    def load_state(self, folder: Path) -> None:
        """Go on as if the engine that wrote this folder had never ended. Raises CheckpointError if it does not fit."""


class ScorerEngine(ABC):
    """A policy with fixed weights that says how likely given responses are. Never called from two threads at once."""

    weights: ClassVar[str] = "huggingface"
    """Kind of weights that it reads; a reference reads the kind that the learner does."""

    @classmethod
    def from_config(cls, config: Config, model: Path) -> Self:  # noqa: ARG003
        """How an engine that is named in the configuration is made. `model` is a local Hugging Face folder."""
        return cls(**config.reference.options)

    @abstractmethod
    def logprobs(self, samples: Sequence[TokenSample]) -> list[Floats]:
        """log π of the response tokens, temperature applied: one (R,) float32 array a sample, in their order.

        Depends on nothing but the samples. Raises EngineError when the engine cannot go on; anything else that it
        raises is the samples' fault.
        """

    @abstractmethod
    def close(self) -> None:
        """Release everything. May be called twice."""
