"""Deterministic engines without a language model: for tests, simulations, and trying out everything around an engine.

The policy is a bigram: a table of logits for the next token given the one before. So log-probs are exact, learning is
real, and a run takes seconds. What goes through the table is what goes through a model: prompts in tokens of the
model's tokenizer, weights by version, updates in mid-sequence.

Left out, and why: top-p and top-k (refused: log-probs would have to be those of the truncated distribution on both
sides).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import ClassVar, Self, cast
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from asyncflow.config import Config
from asyncflow.engines.base import Capabilities, GenerationRequest, RolloutEngine, Served, WeightSnapshot
from asyncflow.engines.models import describe_model, load_tokenizer
from asyncflow.engines.torch_learner import DTYPES, Dtype, Policy, TorchLearner
from asyncflow.engines.torch_scorer import TorchScorer
from asyncflow.engines.weights.channel import weights_digest
from asyncflow.errors import ConfigError, EngineError, ModelError, PromptTooLong, WeightsError
from asyncflow.types import Completion, FinishReason, PolicyVersion, UpdateMode

BIGRAM = "bigram"
"""Kind of weights of all fakes."""
TABLE = "bigram.weight"
"""Name of their one tensor, (V, V): logits of the next token (column) given the last one (row)."""
MAX_VOCABULARY = 4096
"""The table is the square of it: 64 MB in fp32."""

OPTIONS = ("seed", "token_latency", "stale", "stale_from", "ignores_temperature")
"""Of `FakeRollout`, in a configuration."""

Sleep = Callable[[float], Awaitable[object]]


def load_table(model: Path) -> Tensor:
    """(V, V) fp32: the table that a `FakeLearner` saved in this folder, or else the one with which all fakes begin.

    Raises ModelError when the vocabulary is too large for a table.
    """
    from safetensors import safe_open

    vocabulary = describe_model(model).vocab
    if vocabulary > MAX_VOCABULARY:
        raise ModelError(
            f"the fake engines need a vocabulary of at most {MAX_VOCABULARY} tokens, and {model} has {vocabulary}: "
            "use the model `tiny`"
        )
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            if TABLE in weights.keys():  # noqa: SIM118 - it is no mapping
                return cast(Tensor, weights.get_tensor(TABLE)).float()
    return 0.1 * torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(0))


class BigramPolicy:
    """The table as `TorchLearner` takes a policy: the hidden state of a token is its row, which is logits already."""

    shares_prompts = True
    attention_parity = float("inf")

    def __init__(self, model: Path) -> None:
        self._model = model
        table = load_table(model)
        self.vocabulary = len(table)
        self._rows = nn.Embedding(self.vocabulary, self.vocabulary, _weight=table)
        self.module: nn.Module = nn.ModuleDict({"bigram": self._rows})

    def hidden(self, input_ids: Tensor, position_ids: Tensor, mask: Tensor | None) -> Tensor:  # noqa: ARG002
        hidden: Tensor = self._rows(input_ids)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def describe(self, folder: Path, dtype: torch.dtype) -> None:
        info = describe_model(self._model)
        config = {
            "model_type": BIGRAM,
            "architectures": ["Bigram"],
            "dtype": str(dtype).removeprefix("torch."),
            "vocab_size": self.vocabulary,
            "hidden_size": self.vocabulary,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "max_position_embeddings": info.context,
            "tie_word_embeddings": False,
            "eos_token_id": list(info.eos_ids),
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        load_tokenizer(self._model).save_pretrained(folder)


class FakeLearner(TorchLearner):
    """`TorchLearner` on a bigram: the same losses, accumulation and optimizer, in milliseconds."""

    weights: ClassVar[str] = BIGRAM

    @classmethod
    def load_policy(cls, model: Path) -> Policy:
        return BigramPolicy(model)


class FakeScorer(TorchScorer):
    """`TorchScorer` on a bigram: exact log-probs, in milliseconds."""

    weights: ClassVar[str] = BIGRAM

    @classmethod
    def load_policy(cls, model: Path) -> Policy:
        return BigramPolicy(model)


class FakeRollout(RolloutEngine):
    """Samples from the bigram that it serves, one token after the other.

    The same request, seed and weights give the same tokens whatever else runs. It lets the event loop run before every
    token, so that an `in_flight` update comes in mid-sequence, as in a real engine.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        logprobs=True, updates=frozenset({"boundary", "in_flight"}), weights=BIGRAM, deterministic=True
    )

    def __init__(
        self,
        model: Path,
        *,
        dtype: Dtype = "bf16",
        max_model_len: int | None = None,
        seed: int = 0,
        token_latency: float | Callable[[GenerationRequest], float] = 0.0,
        sleep: Sleep = asyncio.sleep,
        fails: Callable[[GenerationRequest], Exception | None] | None = None,
        stale: bool = False,
        stale_from: int | None = None,
        ignores_temperature: bool = False,
    ) -> None:
        """`model` gives the tokenizer and the table to begin with, rounded to `dtype`; `seed` is for requests without.

        Time and faults can be planted: `token_latency` (seconds, of all requests or of each) is waited for with `sleep`
        before every token; an exception that `fails` returns is raised for that request; `stale` says that it serves
        each version it is given, and keeps the first; `stale_from` keeps the one before this number from there on;
        `ignores_temperature` returns the log-probs at temperature 1 of what it samples at another one.
        """
        self._model = model
        self._dtype = DTYPES[dtype]
        self._max_model_len = max_model_len
        self._seed = seed
        self._token_latency = token_latency
        self._sleep = sleep
        self._fails = fails
        self._stale_from = 0 if stale else stale_from
        self._ignores_temperature = ignores_temperature
        self._started = False
        self._running = 0
        self._version = PolicyVersion(n=0)

    @classmethod
    def from_config(cls, config: Config, model: Path) -> Self:
        """Options: `seed`, `token_latency` (seconds), and the faults `stale`, `stale_from` (version) and
        `ignores_temperature`. Raises ConfigError for others."""
        options = config.rollout.options
        if unknown := sorted(options.keys() - set(OPTIONS)):
            raise ConfigError(f"rollout.options: {unknown[0]} is not an option; use {', '.join(OPTIONS)}")
        return cls(model, dtype=config.rollout.dtype, max_model_len=config.rollout.max_model_len, **options)

    async def start(self) -> None:
        """See `RolloutEngine`."""
        info = describe_model(self._model)
        self._context = self._max_model_len or info.context
        self._eos_ids = frozenset(info.eos_ids)
        self._tokenizer = load_tokenizer(self._model)
        self._table: NDArray[np.float64] = load_table(self._model).to(self._dtype).double().numpy()
        self._started = True

    async def generate(self, request: GenerationRequest) -> Completion:
        """See `RolloutEngine`. At temperature 0 the log-probs are those of temperature 1."""
        sampling = request.sampling
        self._check_started()
        if sampling.top_p != 1.0 or sampling.top_k:
            raise EngineError("the fake engine samples from all tokens: leave top_p and top_k at their defaults")
        room = self._context - len(request.prompt_ids)
        if room < 1:
            raise PromptTooLong(
                f"a prompt of {len(request.prompt_ids)} tokens leaves no room for a response: "
                f"the longest sequence has {self._context}"
            )
        if self._fails is not None and (error := self._fails(request)) is not None:
            raise error
        self._running += 1
        try:
            return await self._complete(request, min(room, sampling.max_new_tokens))
        finally:
            self._running -= 1

    async def load_weights(self, snapshot: WeightSnapshot, mode: UpdateMode) -> Served:
        """See `RolloutEngine`. Raises EngineError for a `boundary` at which something is running."""
        self._check_started()
        if mode == "boundary" and self._running:
            raise EngineError(f"weights came at a boundary while {self._running} sequences were running: wait for them")
        received = {name: tensor.clone() for name, tensor in snapshot.tensors()}
        table = received.get(TABLE)
        if table is None or len(received) > 1 or table.shape != self._table.shape:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in received.items())
            raise WeightsError(f"expected {TABLE} {self._table.shape}, received {shapes or 'nothing'}")
        if self._takes(snapshot.version):
            self._table = table.double().numpy()
        self._version = snapshot.version
        return Served(version=snapshot.version, digest=weights_digest(received))

    def _takes(self, version: PolicyVersion) -> bool:
        """Whether it really takes this version. Tests plant faults here."""
        return self._stale_from is None or version.n < self._stale_from

    async def stop(self) -> None:
        """See `RolloutEngine`. What is being generated raises EngineError before its next token."""
        self._started = False

    async def _complete(self, request: GenerationRequest, limit: int) -> Completion:
        sampling = request.sampling
        seconds = self._token_latency(request) if callable(self._token_latency) else self._token_latency
        # Of this request alone: what runs beside it draws from generators of its own.
        own = [sampling.seed] if sampling.seed is not None else [self._seed, crc32(request.request_id.encode())]
        last = int(request.prompt_ids[-1])
        tokens: list[int] = []
        logprobs: list[float] = []
        versions: list[int] = []
        finish_reason: FinishReason = "length"
        for draw in np.random.default_rng(own).random(limit):
            await self._sleep(seconds)
            self._check_started()
            before = last
            last, logprob = self._next(before, sampling.temperature, draw)
            if self._ignores_temperature:
                logprob = float(self._logprobs(before, 1.0)[last])
            tokens.append(last)
            logprobs.append(logprob)
            versions.append(self._version.packed)
            if last in self._eos_ids:
                finish_reason = "stop"
                break
        return Completion(
            token_ids=np.array(tokens, dtype=np.int32),
            logprobs=np.array(logprobs, dtype=np.float32),
            token_versions=np.array(versions, dtype=np.int64),
            text=self._tokenizer.decode(tokens, skip_special_tokens=True),
            finish_reason=finish_reason,
        )

    def _next(self, last: int, temperature: float, draw: float) -> tuple[int, float]:
        """A token and its log-probability, for a uniform draw from [0, 1)."""
        logprobs = self._logprobs(last, temperature)
        if not temperature:
            token = int(logprobs.argmax())
        else:
            cumulative = np.exp(logprobs).cumsum()
            # The last sum is 1 but for rounding, hence the product.
            token = int(np.searchsorted(cumulative, draw * cumulative[-1], side="right"))
        return token, float(logprobs[token])

    def _logprobs(self, last: int, temperature: float) -> NDArray[np.float64]:
        """(V,) log-probabilities of the next token."""
        logits = self._table[last] / (temperature or 1.0)
        logits = logits - logits.max()
        logprobs: NDArray[np.float64] = logits - np.log(np.exp(logits).sum())
        return logprobs

    def _check_started(self) -> None:
        if not self._started:
            raise EngineError("the engine is not running: start it")
