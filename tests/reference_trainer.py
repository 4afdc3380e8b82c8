"""A plain synchronous GRPO trainer: no store, no workers, no threads, no weight channel. What AsyncFlow must equal.

It generates a whole batch, scores it, takes one step, and only then goes on. It has its own loss and its own optimizer
step, and shares with AsyncFlow only the sampler (the fake engine), the data and the tokenizer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asyncflow.config import Config
from asyncflow.data import tokenise
from asyncflow.engines.base import GenerationRequest
from asyncflow.engines.fake import TABLE, FakeRollout, load_table
from asyncflow.engines.weights.channel import weights_digest
from asyncflow.types import Completion, PolicyVersion, Prompt, Sampling


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The weights as the fake engine takes them."""

    version: PolicyVersion
    table: torch.Tensor
    digest: str = ""
    path: Any = None

    def tensors(self) -> Any:
        yield TABLE, self.table


def train(
    config: Config, problems: Sequence[Prompt], model: Path, tokenizer: Any, reward: Callable[..., list[float]]
) -> list[str]:
    """Digests of the weights: the initial ones, then those after every step."""
    table = load_table(model).requires_grad_()
    optimizer = torch.optim.AdamW([table], lr=config.learning_rate, weight_decay=0.0, fused=True)
    engine = FakeRollout(model, dtype="fp32")
    asyncio.run(engine.start())
    digests = [weights_digest({TABLE: table.detach()})]
    order = np.concatenate([np.random.default_rng((config.seed, epoch)).permutation(len(problems)) for epoch in (0, 1)])
    sample_id = 0
    for step in range(config.steps):
        asyncio.run(engine.load_weights(Snapshot(version=PolicyVersion(n=step), table=table.detach()), "boundary"))
        first = step * config.groups_per_step
        tokens = 0
        for index in order[first : first + config.groups_per_step]:
            prompt = problems[index]
            prompt_ids = tokenise(prompt, tokenizer)
            completions = []
            for _ in range(config.num_generations):
                completions.append(sample(engine, config, prompt_ids, sample_id))
                sample_id += 1
            texts = [completion.text for completion in completions]
            columns = {name: [value] * len(texts) for name, value in prompt.columns.items()}
            tokens += backward(table, int(prompt_ids[-1]), completions, reward(texts, **columns), config)
        if tokens:
            update(table, optimizer, tokens, config)
        digests.append(weights_digest({TABLE: table.detach()}))
    return digests


def sample(engine: FakeRollout, config: Config, prompt_ids: Any, sample_id: int) -> Completion:
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=config.seed * 1_000_003 + sample_id,
    )
    request = GenerationRequest(request_id=f"{sample_id}", prompt_ids=prompt_ids, sampling=sampling)
    return asyncio.run(engine.generate(request))


def backward(
    table: torch.Tensor, last: int, completions: Sequence[Completion], rewards: list[float], config: Config
) -> int:
    """Add the gradient of a group's summed loss to `table.grad`. Returns the tokens that took part."""
    values = np.asarray(rewards, dtype=np.float32).astype(np.float64)  # the store keeps rewards in float32
    if (values == values[0]).all():
        return 0
    scores = (values - values.mean()) / (values.std(ddof=1) + 1e-4)
    # The prompt's last token is computed once, and predicts the first token of every completion.
    inputs, sources = [last], []
    for completion in completions:
        sources += [0, *range(len(inputs), len(inputs) + len(completion.token_ids) - 1)]
        inputs += completion.token_ids[:-1].tolist()
    targets = torch.tensor([t for c in completions for t in c.token_ids.tolist()])
    behaviour = torch.tensor(np.concatenate([c.logprobs for c in completions]))
    advantages = torch.tensor(
        np.concatenate([np.full(len(c.token_ids), a, np.float32) for c, a in zip(completions, scores, strict=True)])
    )
    logits = torch.nn.functional.embedding(torch.tensor(inputs), table)[torch.tensor(sources)]
    logprobs = torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]
    correction = (logprobs.detach() - behaviour).exp().clamp(max=config.importance_cap)
    ratio = (logprobs - logprobs.detach()).exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = -(correction * torch.minimum(ratio * advantages, clipped * advantages)).sum()
    loss.backward()
    return len(targets)


def update(table: torch.Tensor, optimizer: torch.optim.Optimizer, tokens: int, config: Config) -> None:
    """Mean over the step's tokens, clip, step."""
    assert table.grad is not None
    norm = float(torch.linalg.vector_norm(table.grad)) / tokens
    table.grad *= min(1.0, config.learner.grad_clip / (norm + 1e-6)) / tokens
    optimizer.step()
    table.grad.zero_()
