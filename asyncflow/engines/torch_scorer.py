"""Log-probs of given responses under a policy that never changes, in plain PyTorch: one process, one device.

It is the forward pass of `TorchLearner`, with the same packing, attention and output head. So, computed in the same
dtype and the same passes, the log-probs of the learner's initial weights are the learner's own, to the bit.

Left out, and why: gradients, optimizer state and fp32 masters (nothing is ever trained).
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from asyncflow.config import Config
from asyncflow.engines.base import ScorerEngine
from asyncflow.engines.torch_learner import DTYPES, LOGITS_AT_ONCE, Dtype, Policy, TorchForward
from asyncflow.errors import ConfigError


class TorchScorer(TorchForward, ScorerEngine):
    """A frozen copy of a policy."""

    def __init__(
        self,
        policy: Policy,
        *,
        dtype: Dtype = "bf16",
        temperature: float = 1.0,
        micro_batch_tokens: int = 4096,
        share_prompts: bool = True,
        device: str | None = None,
        logits_at_once: int = LOGITS_AT_ONCE,
    ) -> None:
        """Takes the policy's module over and converts its parameters to `dtype`; the rest is as in `TorchLearner`."""
        super().__init__(
            policy,
            temperature=temperature,
            micro_batch_tokens=micro_batch_tokens,
            share_prompts=share_prompts,
            device=device,
            logits_at_once=logits_at_once,
        )
        policy.module.requires_grad_(False)
        for parameter in policy.module.parameters():
            # Parameters only, as in the learner: the rotary frequencies are buffers and must stay in fp32.
            parameter.data = parameter.data.to(DTYPES[dtype])

    @classmethod
    def from_config(cls, config: Config, model: Path) -> Self:
        """Options: `share_prompts` (bool), `device` (such as `cuda:0`). Raises ConfigError and ModelError."""
        reference = config.reference
        if unknown := sorted(reference.options.keys() - {"share_prompts", "device"}):
            raise ConfigError(f"reference.options: {unknown[0]} is not an option; use share_prompts, device")
        return cls(
            cls.load_policy(model),
            dtype=reference.dtype or config.learner.dtype,
            temperature=config.temperature,
            micro_batch_tokens=reference.micro_batch_tokens or config.learner.micro_batch_tokens,
            **reference.options,
        )
