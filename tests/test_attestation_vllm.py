"""Attestation of the real engine: faults in its weights are named, and a healthy engine is left in peace."""

from __future__ import annotations

import os
from typing import Literal

import pytest

from asyncflow.engines.models import resolve_model
from asyncflow.engines.vllm import VLLMRollout
from asyncflow.runtime.metrics import read_metrics
from tests.conftest import RunTiny

pytestmark = pytest.mark.vllm

SETTINGS = (
    "learner.engine=torch",
    "max_new_tokens=24",
    "data.eval_size=0",
    "zero_variance=keep",
    "temperature=0.8",
)
CORES = (max(os.sched_getaffinity(0)),)

Dtype = Literal["bf16", "fp32"]


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("fault", "alarm"), [("SkipsOneTensor", "logprob_mismatch"), ("KeepsTheFirst", "stale_weights")]
)
def test_a_fault_in_the_weights_is_named_and_stops_the_run(
    run_tiny: RunTiny, dtype: Dtype, fault: str, alarm: str
) -> None:
    from tests.planted_vllm import with_fault

    engine = with_fault(fault, resolve_model("tiny"), dtype=dtype, max_model_len=128, cores=CORES)

    run = run_tiny(
        *SETTINGS,
        f"rollout.dtype={dtype}",
        f"learner.dtype={dtype}",
        # One of sixteen matrices changes little. In bf16 its share of an update must stand out of the noise.
        f"learning_rate={0.01 if dtype == 'bf16' else 0.002}",
        "steps=12",
        rollout=engine,
    )

    assert run.summary.outcome == "failed"
    alarms = read_metrics(run.run_dir / "metrics.jsonl", "alarm")
    assert [line["alarm"] for line in alarms] == [alarm, alarm]
    assert alarms[0]["version"] in ("0.1", "0.2")
    assert "loaded the weights again, which did not help" in str(run.summary.reason)


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.long)])
def test_a_healthy_engine_raises_no_alarm(run_tiny: RunTiny, dtype: Dtype) -> None:
    engine = VLLMRollout(resolve_model("tiny"), dtype=dtype, max_model_len=128, cores=CORES)

    run = run_tiny(
        *SETTINGS,
        f"rollout.dtype={dtype}",
        f"learner.dtype={dtype}",
        "weights.update=in_flight",
        "learning_rate=0.002",
        "steps=30",
        rollout=engine,
    )

    assert run.summary.outcome == "finished", run.summary.reason
    assert read_metrics(run.run_dir / "metrics.jsonl", "alarm") == []
    attested = read_metrics(run.run_dir / "metrics.jsonl", "attest")
    assert attested  # how many versions have samples in time depends on the machine
    assert all(line["attest/fault"] is None for line in attested)
