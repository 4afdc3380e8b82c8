"""The learner in plain PyTorch: one process, one device.

Weights exist twice. The fp32 *masters* are what the optimizer changes; the *working* weights, in the dtype of the
computation, are what forward and backward use. In bf16 they are exactly the weights that are exported; each gradient is
added up in fp32 as soon as it is complete. In fp32 both are the same tensors. (Autocast was measured to be as fast and
as close to the engine's log-probs, but it would train norms and embeddings that are not the ones that are served.)

State for resuming a run is what the optimizer changes and nothing that follows from it:

    masters.safetensors, exp_avg.safetensors, exp_avg_sq.safetensors    fp32, by name (Adam's moments: Kingma & Ba 2015)
    engine.json                                                         updates made
    rng.safetensors                                                     torch's random numbers

Left out, and why: several devices and gradient checkpointing (small models first), and dropout (it would make π_θ
differ from what is served, so the model stays in evaluation mode).
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from asyncflow.algorithms.attention import matmul_attention
from asyncflow.algorithms.losses import merge, policy_loss
from asyncflow.algorithms.packing import Packed, pack
from asyncflow.config import Config
from asyncflow.engines.base import OptimStats, ResumableLearner, WeightSnapshot
from asyncflow.engines.models import load_tokenizer
from asyncflow.errors import CheckpointError, ConfigError, EngineError, ModelError, WeightsError
from asyncflow.types import Floats, KLEstimator, TokenSample, TrainSample

Dtype = Literal["bf16", "fp32"]
DTYPES: Mapping[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter."""

LOGITS_AT_ONCE = 512 * 49_152
"""Logits (tokens × vocabulary) that exist at one time, in forward and backward: 100 MB in fp32, a few times."""

MATMUL_ATTENTION_TOKENS = 1024
"""Longest row for which attention on a CPU is `matmul_attention`; its memory grows with the square of it."""


class Policy(Protocol):
    """A model as the learner sees it: hidden states, and a head that turns them into logits."""

    module: nn.Module
    """Holds the parameters, under the names that are exported. Loaded in fp32."""
    vocabulary: int
    shares_prompts: bool
    """Obeys a 4D attention mask, so that responses can share their prompt in one row."""
    attention_parity: float
    """Tokens of a row at which dense attention costs as much as everything else (see `packing.pack`)."""

    def hidden(self, input_ids: Tensor, position_ids: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T), (B, T), (B, 1, T, T) or None → (B, T, H)."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, H) → (N, V)."""

    def describe(self, folder: Path, dtype: torch.dtype) -> None:
        """Write everything but the weights into a folder: the configuration (weights of `dtype`) and the tokenizer."""


class HuggingFacePolicy:
    """A decoder language model of Transformers. Raises ModelError for one that cannot be loaded or taken apart."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()  # the terminal belongs to the run's own progress
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, attn_implementation=_register_attention()
            )
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{path} cannot be loaded: {' '.join(str(error).split())}") from error
        self.module: nn.Module = model.eval()
        self._model = model
        self._path = path
        # A padding index would drop that token's gradient; often it is the end-of-sequence token. No row needs it.
        model.get_input_embeddings().padding_idx = None
        config = model.config.get_text_config()
        self.vocabulary = int(config.vocab_size)
        # Measured on a CPU: its attention kernel does a quarter of the arithmetic per second of matrix products.
        self.attention_parity = 2.0 * config.hidden_size
        self.shares_prompts = self._sees_all(config) and self._obeys_mask()
        self._check_head()

    def hidden(self, input_ids: Tensor, position_ids: Tensor, mask: Tensor | None) -> Tensor:
        output = self._model.base_model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._model.get_output_embeddings()(hidden)
        return logits

    def describe(self, folder: Path, dtype: torch.dtype) -> None:
        config = copy.deepcopy(self._model.config)
        config.dtype = str(dtype).removeprefix("torch.")
        config.save_pretrained(folder)
        self._model.generation_config.save_pretrained(folder)
        load_tokenizer(self._path).save_pretrained(folder)

    @staticmethod
    def _sees_all(config: Any) -> bool:
        """No layer has a window: models build such masks themselves, and a given mask would take their place."""
        layers = set(getattr(config, "layer_types", None) or ["full_attention"])
        return layers == {"full_attention"} and (
            getattr(config, "sliding_window", None) is None or getattr(config, "use_sliding_window", True) is False
        )

    @torch.no_grad()
    def _obeys_mask(self) -> bool:
        """Compare a shared row with its two sequences computed alone: tells what no configuration says."""
        prompt, first, second = [1, 2, 3], [4, 5, 6], [7, 3, 2]
        branches = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
        mask = torch.ones(9, 9, dtype=torch.bool).tril() & ((branches == 0) | (branches[:, None] == branches))
        try:
            row = self.hidden(
                torch.tensor([prompt + first + second]),
                torch.tensor([[0, 1, 2, 3, 4, 5, 3, 4, 5]]),
                mask[None, None],
            )[0]
        except (RuntimeError, ValueError, TypeError):
            return False
        alone = self.hidden(torch.tensor([prompt + first, prompt + second]), torch.arange(6).expand(2, -1), None)
        alone = alone[:, 3:].flatten(0, 1)
        return bool((row[3:] - alone).norm() < 1e-3 * alone.norm())

    @torch.no_grad()
    def _check_head(self) -> None:
        ids = torch.tensor([[1, 2, 3, 4]])
        whole = self._model(input_ids=ids, use_cache=False).logits[0]
        parts = self.logits(self.hidden(ids, torch.arange(4)[None], None)[0])
        if not (whole - parts).norm() < 1e-3 * whole.norm():
            raise ModelError(
                f"{self._path} changes its logits after the output head (a cap or a scale), which this learner does "
                "not do: use a model without, or a learner engine of your own"
            )


def _register_attention() -> str:
    """Make ours known to Transformers, with the masks of scaled-dot-product attention; returns its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        short = query.device.type == "cpu" and query.shape[2] <= MATMUL_ATTENTION_TOKENS
        if not short or options.get("position_bias") is not None:
            output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, **options)
            return output
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        return matmul_attention(query, key, value, mask, scale).transpose(1, 2).contiguous(), None

    AttentionInterface.register("asyncflow", attention)
    AttentionMaskInterface.register("asyncflow", sdpa_mask)
    return "asyncflow"


class TorchForward:
    """A policy's forward pass, down to the log-probs of response tokens: what a learner and a scorer share."""

    def __init__(
        self,
        policy: Policy,
        *,
        temperature: float,
        micro_batch_tokens: int,
        share_prompts: bool,
        device: str | None,
        logits_at_once: int,
    ) -> None:
        """Moves the policy's module to the device. `TorchLearner` says what the arguments are."""
        self._policy = policy
        self._temperature = temperature
        self._micro_batch_tokens = micro_batch_tokens
        self._share_prompts = share_prompts and policy.shares_prompts
        self._chunk_tokens = max(1, logits_at_once // policy.vocabulary)
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        policy.module.to(self._device)

    @classmethod
    def load_policy(cls, model: Path) -> Policy:
        """The policy that `from_config` takes. Raises ModelError."""
        return HuggingFacePolicy(model)

    @torch.no_grad()
    def logprobs(self, samples: Sequence[TokenSample]) -> list[Floats]:
        """log π of the response tokens, temperature applied: one (R,) float32 array a sample."""
        found: dict[int, Floats] = {}
        for packed in self._pack(samples):
            hidden = self._hidden(packed)
            parts = [self._logprobs(hidden[c], packed.targets[c]) for c in self._chunks(len(packed.targets))]
            values = torch.cat(parts).cpu().numpy() if parts else np.zeros(0, dtype=np.float32)
            ends = np.cumsum([len(samples[i].response_ids) for i in packed.samples])
            found |= dict(zip(packed.samples, np.split(values, ends[:-1]), strict=True))
        return [found[i] for i in range(len(samples))]

    def close(self) -> None:
        """Every tensor goes; a call that comes after this fails."""
        self.__dict__.clear()

    def _pack(self, samples: Sequence[TokenSample]) -> list[Packed]:
        return pack(
            samples,
            pass_tokens=self._micro_batch_tokens,
            share_prompts=self._share_prompts,
            attention_parity=self._policy.attention_parity,
            device=self._device,
        )

    def _hidden(self, packed: Packed) -> Tensor:
        """(N, H): the hidden states that predict the response tokens."""
        hidden = self._policy.hidden(packed.input_ids, packed.position_ids, packed.mask)
        return hidden.flatten(0, 1).index_select(0, packed.sources)

    def _logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """(N, H), (N,) → (N,) fp32."""
        logits = self._policy.logits(hidden).float()
        if self._temperature != 1.0:
            logits = logits / self._temperature
        return torch.log_softmax(logits, dim=-1).gather(-1, targets[:, None])[:, 0]

    def _chunks(self, tokens: int) -> Iterator[slice]:
        return (slice(start, start + self._chunk_tokens) for start in range(0, tokens, self._chunk_tokens))


class TorchLearner(TorchForward, ResumableLearner):
    """AdamW on fp32 masters, gradients of a step as sums, logits in chunks.

    Weight decay applies to matrices (the embedding included), not to vectors (norms, biases). With `warmup_updates`
    W the i-th optimizer update (from 0) uses learning_rate · min(1, (i + 1)/W).
    """

    def __init__(
        self,
        policy: Policy,
        *,
        learning_rate: float,
        dtype: Dtype = "bf16",
        serving_dtype: Dtype = "bf16",
        temperature: float = 1.0,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        importance_cap: float | None = 5.0,
        kl_coef: float = 0.0,
        kl_estimator: KLEstimator = "k3",
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        grad_clip: float = 1.0,
        warmup_updates: int = 0,
        micro_batch_tokens: int = 4096,
        share_prompts: bool = True,
        device: str | None = None,
        logits_at_once: int = LOGITS_AT_ONCE,
    ) -> None:
        """Takes the policy's module over.

        `temperature` is the one that the behaviour policy samples with: logits are divided by it. `kl_coef` weighs the
        KL term in the loss of samples that bring the reference's log-probs. `grad_clip` is the
        largest norm of a gradient. `micro_batch_tokens` bounds one pass, counted as it is computed (shared prompts
        once, padding included). `share_prompts` False computes a prompt once per sample, which is also what happens
        where the policy cannot share. `device` None takes a GPU if there is one. `logits_at_once` bounds tokens ×
        vocabulary of a chunk of the output head.
        """
        super().__init__(
            policy,
            temperature=temperature,
            micro_batch_tokens=micro_batch_tokens,
            share_prompts=share_prompts,
            device=device,
            logits_at_once=logits_at_once,
        )
        self._learning_rate = learning_rate
        self._serving_dtype = DTYPES[serving_dtype]
        self._clip_low = clip_low
        self._clip_high = clip_high
        self._importance_cap = importance_cap
        self._kl_coef = kl_coef
        self._kl_estimator: KLEstimator = kl_estimator
        self._grad_clip = grad_clip
        self._warmup_updates = warmup_updates
        self._updates = 0

        self._names, self._working = self._exported(policy.module)
        self._masters = self._split_off_masters(DTYPES[dtype])
        for master in self._masters:
            master.grad = torch.zeros_like(master)
        matrices = [master for master in self._masters if master.ndim > 1]
        vectors = [master for master in self._masters if master.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=learning_rate, betas=betas, fused=True
        )

    @classmethod
    def from_config(cls, config: Config, model: Path) -> Self:
        """Options: `share_prompts` (bool), `device` (such as `cuda:0`). Raises ConfigError and ModelError."""
        options = config.learner.options
        if unknown := sorted(options.keys() - {"share_prompts", "device"}):
            raise ConfigError(f"learner.options: {unknown[0]} is not an option; use share_prompts, device")
        return cls(
            cls.load_policy(model),
            learning_rate=config.learning_rate,
            dtype=config.learner.dtype,
            serving_dtype=config.rollout.dtype,
            temperature=config.temperature,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            importance_cap=config.importance_cap,
            kl_coef=config.kl_coef if config.kl_in == "loss" else 0.0,
            kl_estimator=config.kl,
            betas=config.learner.betas,
            weight_decay=config.learner.weight_decay,
            grad_clip=config.learner.grad_clip,
            warmup_updates=config.learner.warmup_steps * config.updates_per_step * config.epochs_per_step,
            micro_batch_tokens=config.learner.micro_batch_tokens,
            **options,
        )

    def forward_backward(self, samples: Sequence[TrainSample]) -> Mapping[str, float]:
        """See `LearnerEngine`. Splits the samples into passes of at most `micro_batch_tokens` computed tokens."""
        trained = [sample for sample in samples if sample.mask.any()]
        sums: dict[str, float] = {}
        for packed in self._pack(trained):
            hidden = self._hidden(packed)
            behaviour, advantages, mask, proximal, reference = self._columns(trained, packed)
            # The head is differentiated chunk by chunk, down to this leaf and no further; one backward pass then goes
            # on from it. So only one chunk's logits exist, and nothing is computed twice.
            leaf = hidden.detach().requires_grad_()
            for chunk in self._chunks(len(packed.targets)):
                loss, part = policy_loss(
                    self._logprobs(leaf[chunk], packed.targets[chunk]),
                    behaviour[chunk],
                    None if proximal is None else proximal[chunk],
                    advantages[chunk],
                    mask[chunk],
                    clip_low=self._clip_low,
                    clip_high=self._clip_high,
                    importance_cap=self._importance_cap,
                    reference_logprobs=None if reference is None else reference[chunk],
                    kl_coef=self._kl_coef,
                    kl_estimator=self._kl_estimator,
                )
                loss.backward()  # type: ignore[no-untyped-call]
                sums = merge(sums, part)
            hidden.backward(leaf.grad)  # type: ignore[no-untyped-call]
        return sums

    def optim_step(self, denominator: float) -> OptimStats:
        """See `LearnerEngine`. The learning rate that is returned is the one that this update used."""
        if not denominator > 0:
            raise ValueError(f"a gradient cannot be divided by {denominator}")
        gradients = [master.grad for master in self._masters if master.grad is not None]
        # Each tensor's norm is accumulated in fp32, their squares in Python's float64.
        norm = math.sqrt(sum(float(n) ** 2 for n in torch._foreach_norm(gradients))) / denominator
        if not math.isfinite(norm):
            torch._foreach_zero_(gradients)
            raise EngineError(
                f"the gradient of optimizer update {self._updates} is not finite (its norm is {norm}): "
                "lower the learning rate, or compute in fp32"
            )
        rate = self._learning_rate * min(1.0, (self._updates + 1) / max(1, self._warmup_updates))
        torch._foreach_mul_(gradients, min(1.0, self._grad_clip / (norm + 1e-6)) / denominator)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        torch._foreach_zero_(gradients)
        if self._working is not self._masters:
            with torch.no_grad():
                torch._foreach_copy_(self._working, self._masters)
        self._updates += 1
        return OptimStats(grad_norm=norm, learning_rate=rate)

    def rest(self) -> None:
        """See `LearnerEngine`. On a GPU: what PyTorch keeps for the next tensors goes back to the device."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def logprobs_under(
        self,
        samples: Sequence[TrainSample],
        *,
        weights: WeightSnapshot | None = None,
        temperature: float | None = None,
    ) -> list[Floats]:
        """See `LearnerEngine`. The working weights are exchanged for the time of the call; where they are the masters
        (fp32), that takes a copy of them."""
        own = self._temperature
        try:
            if temperature is not None:
                self._temperature = temperature
            if weights is None:
                return self.logprobs(samples)
            with self._holding(weights):
                return self.logprobs(samples)
        finally:
            self._temperature = own

    @contextmanager
    @torch.no_grad()
    def _holding(self, weights: WeightSnapshot) -> Iterator[None]:
        """Other weights in the working tensors. Between two passes nothing else refers to them."""
        separate = self._working is not self._masters
        kept = self._masters if separate else [working.detach().clone() for working in self._working]
        places = dict(zip(self._names, self._working, strict=True))
        try:
            for name, tensor in weights.tensors():
                if name not in places or places[name].shape != tensor.shape:
                    raise WeightsError(f"version {weights.version} is not of this model: it has {name} {tensor.shape}")
                places.pop(name).copy_(tensor)
            if places:
                raise WeightsError(f"version {weights.version} is not of this model: it has no {min(places)}")
            yield
        finally:
            torch._foreach_copy_(self._working, kept)

    @torch.no_grad()
    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `LearnerEngine`. In the order of the names, on the CPU; valid until the next `optim_step`."""
        for name, working, master in sorted(zip(self._names, self._working, self._masters, strict=True)):
            exact = working if working.dtype == self._serving_dtype else master
            yield name, exact.detach().to("cpu", self._serving_dtype)

    def save_pretrained(self, folder: Path) -> None:
        """See `LearnerEngine`. The weights are those that are exported, in the dtype that is served."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        self._policy.describe(folder, self._serving_dtype)
        weights = {name: tensor.contiguous() for name, tensor in self.export_weights()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def save_state(self, folder: Path) -> None:
        """See `LearnerEngine`. Takes 12 bytes a parameter."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True)
        save_file(dict(zip(self._names, self._masters, strict=True)), folder / "masters.safetensors")
        moments = [self._optimizer.state.get(master, {}) for master in self._masters]
        for moment in MOMENTS if all(moments) else ():
            tensors = {name: state[moment] for name, state in zip(self._names, moments, strict=True)}
            save_file(tensors, folder / f"{moment}.safetensors")
        save_file({"torch": torch.get_rng_state()}, folder / "rng.safetensors")
        (folder / "engine.json").write_text(json.dumps({"updates": self._updates}) + "\n", encoding="utf-8")

    @torch.no_grad()
    def load_state(self, folder: Path) -> None:
        """See `LearnerEngine`."""
        try:
            state = json.loads((folder / "engine.json").read_text(encoding="utf-8"))
            self._fill(folder / "masters.safetensors", self._masters)
            self._updates = int(state["updates"])
            if self._updates:
                for master in self._masters:
                    self._optimizer.state[master] = {
                        "step": torch.tensor(float(self._updates)),
                        **{moment: torch.empty_like(master) for moment in MOMENTS},
                    }
                for moment in MOMENTS:
                    tensors = [self._optimizer.state[master][moment] for master in self._masters]
                    self._fill(folder / f"{moment}.safetensors", tensors)
            self._fill_rng(folder / "rng.safetensors")
        except (OSError, ValueError, LookupError, RuntimeError) as error:
            raise CheckpointError(f"the learner's state in {folder} does not fit this model: {error}") from error
        if self._working is not self._masters:
            torch._foreach_copy_(self._working, self._masters)

    def _fill(self, file: Path, tensors: Sequence[Tensor]) -> None:
        """Copy a file's tensors, which must be exactly those of the parameters, into these."""
        from safetensors import safe_open

        with safe_open(file, framework="pt") as saved:
            if set(saved.keys()) != set(self._names):
                raise ValueError(f"{file.name} holds other tensors than the model")
            for name, tensor in zip(self._names, tensors, strict=True):
                source = saved.get_tensor(name)
                if source.shape != tensor.shape:
                    raise ValueError(f"{name} has the shape {list(source.shape)}, the model's is {list(tensor.shape)}")
                tensor.copy_(source)

    @staticmethod
    def _fill_rng(file: Path) -> None:
        from safetensors.torch import load_file

        torch.set_rng_state(load_file(file)["torch"])

    @staticmethod
    def _exported(module: nn.Module) -> tuple[list[str], list[Tensor]]:
        """Parameters under their first name: a tied one is known by several."""
        named = dict(module.named_parameters())
        return list(named), list(named.values())

    def _split_off_masters(self, dtype: torch.dtype) -> list[Tensor]:
        if dtype == torch.float32:
            return self._working
        masters = [parameter.data for parameter in self._working]
        for parameter, master in zip(self._working, masters, strict=True):
            # Parameters only, one by one: the rotary frequencies are buffers and must stay in fp32.
            parameter.data = master.to(dtype)
            parameter.register_post_accumulate_grad_hook(_move_gradient_to(master))  # type: ignore[no-untyped-call]
        return masters

    def _columns(
        self, samples: Sequence[TrainSample], packed: Packed
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        ordered = [samples[i] for i in packed.samples]
        proximal = _of_all("proximal", [sample.proximal_logprobs for sample in ordered])
        reference = _of_all("reference", [sample.reference_logprobs for sample in ordered])

        def joined(columns: Sequence[np.ndarray[Any, Any]]) -> Tensor:
            return torch.from_numpy(np.concatenate(columns)).to(self._device)

        return (
            joined([sample.behaviour_logprobs for sample in ordered]),
            joined([sample.advantages for sample in ordered]),
            joined([sample.mask for sample in ordered]),
            joined(proximal) if proximal else None,
            joined(reference) if reference else None,
        )


def _of_all(name: str, given: Sequence[Floats | None]) -> list[Floats]:
    """The log-probs of all samples, or an empty list. Raises ValueError for those of some."""
    there = [logprobs for logprobs in given if logprobs is not None]
    if there and len(there) < len(given):
        raise ValueError(f"give the {name} log-probabilities of all samples of a step, or of none")
    return there


def _move_gradient_to(master: Tensor) -> Callable[[Tensor], None]:
    """A hook that adds a working parameter's gradient to its master's, in fp32, and frees it at once."""

    def hook(parameter: Tensor) -> None:
        assert master.grad is not None
        assert parameter.grad is not None
        master.grad.add_(parameter.grad)
        parameter.grad = None

    return hook
