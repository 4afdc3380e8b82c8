"""One short run with the real engines: vLLM in its own process, the torch learner, shared memory between them."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from asyncflow.engines.base import GenerationRequest
from asyncflow.engines.models import load_tokenizer
from asyncflow.engines.vllm import VLLMRollout
from asyncflow.report.audit import audit
from asyncflow.runtime.metrics import read_metrics
from asyncflow.types import Sampling
from tests.conftest import RunTiny

pytestmark = pytest.mark.vllm


def test_a_run_on_vllm_is_sound_spans_versions_and_leaves_weights_that_others_load(run_tiny: RunTiny) -> None:
    run = run_tiny(
        "rollout.engine=vllm",
        "learner.engine=torch",
        "weights.update=in_flight",
        "max_staleness=2",
        "max_new_tokens=48",
        "steps=8",
        "rollout.max_model_len=256",
    )

    assert run.summary.outcome == "finished", run.summary.reason
    result = audit(run.run_dir)
    assert result.ok, result.violations
    assert max(result.staleness) <= 2
    assert result.spanning > 0, "no sample was generated under two policy versions"
    steps = read_metrics(run.run_dir / "metrics.jsonl", "step")
    assert all(step["ess"] > 0.5 for step in steps)

    assert run.weights is not None
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run.weights)
    assert sum(parameter.numel() for parameter in model.parameters()) > 0
    prompt_ids = np.asarray(load_tokenizer(run.weights)("1 + 1 =")["input_ids"], np.int32)
    request = GenerationRequest(request_id="a", prompt_ids=prompt_ids, sampling=Sampling(max_new_tokens=4))
    assert asyncio.run(_completed_by_vllm(VLLMRollout(run.weights, max_model_len=128), request)) >= 1


async def _completed_by_vllm(engine: VLLMRollout, request: GenerationRequest) -> int:
    await engine.start()
    try:
        return len((await engine.generate(request)).token_ids)
    finally:
        await engine.stop()
