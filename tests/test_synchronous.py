"""`max_staleness: 0` is the synchronous trainer, to the bit."""

from __future__ import annotations

import pytest

from asyncflow.launch import resolve
from asyncflow.plan import plan
from asyncflow.report.audit import audit
from asyncflow.rewards import BUILT_IN
from asyncflow.runtime.metrics import read_metrics
from tests import reference_trainer
from tests.conftest import TINY, RunTiny

SETTINGS = [
    "deterministic=true",
    "max_staleness=0",
    "steps=25",
    "learning_rate=0.05",
    "learner.dtype=fp32",
    "rollout.dtype=fp32",
    "learner.micro_batch_tokens=1",  # the plain loop goes group by group
    "data.eval_size=0",
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("update", ["boundary", "in_flight"])
def test_without_staleness_every_version_equals_the_plain_synchronous_trainer_to_the_bit(
    run_tiny: RunTiny, seed: int, update: str
) -> None:
    settings = [*SETTINGS, f"seed={seed}", f"weights.update={update}"]
    ready = plan(resolve(TINY, settings))
    expected = reference_trainer.train(
        ready.config, ready.problems.train, ready.model, ready.tokenizer, BUILT_IN["digit_share"]
    )

    run = run_tiny(*settings)

    assert run.summary.outcome == "finished", run.summary.reason
    published = read_metrics(run.run_dir / "metrics.jsonl", "weights")
    assert [line["digest"] for line in published] == expected
    assert len(set(expected)) == 26, "the trainer has to change the weights in every step for this to say anything"
    assert set(audit(run.run_dir).staleness) == {0}


def test_with_staleness_the_weights_differ_from_the_synchronous_ones(run_tiny: RunTiny) -> None:
    settings = [*SETTINGS, "max_staleness=2"]
    ready = plan(resolve(TINY, settings))
    synchronous = reference_trainer.train(
        ready.config, ready.problems.train, ready.model, ready.tokenizer, BUILT_IN["digit_share"]
    )

    run = run_tiny(*settings)

    published = read_metrics(run.run_dir / "metrics.jsonl", "weights")
    assert published[-1]["digest"] != synchronous[-1]
