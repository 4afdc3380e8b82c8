"""The promise of the README: `make run` teaches a real language model to add."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncflow.launch import launch, resolve
from asyncflow.plan import plan
from asyncflow.report.audit import audit
from tests.conftest import ROOT

pytestmark = [pytest.mark.long, pytest.mark.vllm, pytest.mark.timeout(3600)]


def test_the_quickstart_gains_at_least_a_fifth_of_the_held_out_problems(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    run = launch(plan(resolve(ROOT / "configs" / "quickstart.yaml", [f"run_dir={run_dir}"])))

    summary = run.summary
    assert summary.outcome == "finished", summary.reason
    assert summary.accuracy_before is not None
    assert summary.accuracy_after is not None
    assert summary.accuracy_after - summary.accuracy_before >= 0.20
    result = audit(run_dir)
    assert result.ok, result.violations
    assert max(result.staleness) <= 1
