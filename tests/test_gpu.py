"""What only a GPU can show."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from asyncflow.engines.models import resolve_model
from asyncflow.engines.torch_learner import HuggingFacePolicy, TorchLearner
from asyncflow.report.audit import audit
from asyncflow.types import TrainSample
from tests.conftest import RunTiny

pytestmark = pytest.mark.gpu


def test_the_learner_computes_the_same_on_a_gpu_as_on_a_cpu() -> None:
    sample = TrainSample(
        sample_id=0,
        group_id=0,
        prompt_ids=np.arange(5, 15, dtype=np.int32),
        response_ids=np.arange(20, 40, dtype=np.int32),
        mask=np.ones(20, dtype=np.bool_),
        behaviour_logprobs=np.full(20, -5.0, dtype=np.float32),
        advantages=np.ones(20, dtype=np.float32),
    )
    assert torch.cuda.is_available()
    found = {}
    for device in ("cpu", "cuda"):
        policy = HuggingFacePolicy(resolve_model("tiny"))
        learner = TorchLearner(policy, learning_rate=1e-3, dtype="fp32", serving_dtype="fp32", device=device)
        learner.forward_backward([sample])
        norm = learner.optim_step(20).grad_norm
        found[device] = (learner.logprobs([sample])[0], norm)

    assert np.allclose(found["cpu"][0], found["cuda"][0], atol=1e-4)
    assert found["cpu"][1] == pytest.approx(found["cuda"][1], rel=1e-3)


def test_a_run_on_one_gpu_is_sound(run_tiny: RunTiny) -> None:
    run = run_tiny(
        "rollout.engine=vllm",
        "learner.engine=torch",
        "weights.update=in_flight",
        "steps=4",
        "rollout.options={gpu_memory_utilization: 0.3}",
    )

    assert run.summary.outcome == "finished", run.summary.reason
    assert audit(run.run_dir).ok
