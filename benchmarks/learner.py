"""Speed of the torch learner on SmolLM2-135M: sharing a group's prompt against computing it once for every sample.

    asyncflow bench learner [--cores 0] [--rounds 5] [--json FILE]

Both do the same work exactly (a test shows it): 16 samples of two groups, chat prompts of 36 tokens, responses of 24.
A round measures one after the other; the ratio of a round is what can be trusted on a machine that others share.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asyncflow.engines.models import resolve_model
from asyncflow.engines.torch_learner import HuggingFacePolicy, TorchLearner
from asyncflow.placement import pinned
from asyncflow.types import TrainSample
from benchmarks.machine import machine, write_json

GROUPS, SAMPLES, PROMPT, RESPONSE = 2, 8, 36, 24


def samples(vocabulary: int) -> list[TrainSample]:
    """Random tokens: speed does not depend on them."""
    random = np.random.default_rng(0)
    drawn = []
    for group in range(GROUPS):
        prompt = random.integers(5, vocabulary, PROMPT, dtype=np.int32)
        for number in range(SAMPLES):
            drawn.append(
                TrainSample(
                    sample_id=group * SAMPLES + number,
                    group_id=group,
                    prompt_ids=prompt,
                    response_ids=random.integers(5, vocabulary, RESPONSE, dtype=np.int32),
                    mask=np.ones(RESPONSE, dtype=np.bool_),
                    behaviour_logprobs=np.full(RESPONSE, -5.0, dtype=np.float32),
                    advantages=np.full(RESPONSE, number - 3.5, dtype=np.float32),
                )
            )
    return drawn


def seconds(learner: TorchLearner, batch: list[TrainSample]) -> float:
    began = time.perf_counter()
    learner.forward_backward(batch)
    return time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and return the result."""
    parser = argparse.ArgumentParser(
        prog="asyncflow bench learner", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cores", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(len(arguments.cores))
    with pinned(tuple(arguments.cores)):
        result = measure(arguments.cores, arguments.rounds)
    print(json.dumps(result, indent=2))
    write_json(result, arguments.json)
    return result


def measure(cores: Sequence[int], rounds: int) -> dict[str, Any]:
    """Both ways in turns, on these cores."""
    policies = {shared: HuggingFacePolicy(resolve_model("smollm2-135m")) for shared in (True, False)}
    learners = {
        shared: TorchLearner(policy, learning_rate=1e-5, share_prompts=shared) for shared, policy in policies.items()
    }
    batch = samples(policies[True].vocabulary)
    tokens = sum(sample.tokens for sample in batch)
    for learner in learners.values():
        seconds(learner, batch)  # what is allocated and chosen at first use
    measured = [{shared: seconds(learner, batch) for shared, learner in learners.items()} for _ in range(rounds)]
    ratios = [one[False] / one[True] for one in measured]
    return {
        "benchmark": "learner",
        "machine": machine(),
        "cores": list(cores),
        "sequence_tokens": tokens,
        "shared_tok_per_s": tokens / statistics.median(one[True] for one in measured),
        "separate_tok_per_s": tokens / statistics.median(one[False] for one in measured),
        "speedup_median": statistics.median(ratios),
        "speedup_min": min(ratios),
        "speedup_max": max(ratios),
        "rounds": [{"shared_s": one[True], "separate_s": one[False]} for one in measured],
    }


if __name__ == "__main__":
    main()
