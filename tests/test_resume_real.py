"""A real language model, with vLLM and the torch learner, that is killed again and again."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from asyncflow.report.audit import audit
from asyncflow.runtime.metrics import read_metrics
from tests.conftest import ROOT
from tests.processes import wait_until

KILLS = 5
STEPS = 16
SETTINGS = ("train_batch_size=32", f"steps={STEPS}", "data.eval_size=0", "eval_every=0", "checkpoint.every=2")
LIFE = 300.0
"""Seconds in which a life has to make its first steps."""


def asyncflow(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "asyncflow.cli", *arguments])


@pytest.mark.long
@pytest.mark.vllm
@pytest.mark.timeout(3000)
def test_smollm2_killed_at_five_random_moments_reaches_its_last_step(tmp_path: Path) -> None:
    """Each life makes up to four steps, and ends anywhere in the next: generating, training, publishing, saving."""
    run_dir, chance = tmp_path / "run", random.Random(1)
    settings = (*SETTINGS, f"run_dir={run_dir}")
    flags = [part for setting in settings for part in ("--set", setting)]
    process = asyncflow("run", str(ROOT / "configs" / "quickstart.yaml"), *flags)
    moments: list[tuple[float, int]] = []
    for _ in range(KILLS):
        more, delay, began = commits(run_dir) + chance.randint(2, 4), chance.uniform(0, 8), time.monotonic()
        wait_until(lambda more=more: commits(run_dir) >= more, process, within=LIFE)  # type: ignore[misc]
        moment = time.monotonic() + delay
        wait_until(lambda moment=moment: time.monotonic() >= moment, process)  # type: ignore[misc]
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait(timeout=60)
        moments.append((round(time.monotonic() - began, 1), audit(run_dir).learner.n))
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive, "the engine outlived its run"
        process = asyncflow("resume", str(run_dir))
    assert process.wait(timeout=1200) == 0

    account = audit(run_dir)
    print("killed after (seconds of life, step):", moments, "resumed from:", account.resumed)
    assert account.ok, account.violations
    assert account.balanced
    assert account.open == 0
    assert account.learner.n == STEPS
    assert len(account.resumed) == KILLS
    assert json.loads((run_dir / "summary.json").read_text())["outcome"] == "finished"
    assert [line["step"] for line in read_metrics(run_dir / "metrics.jsonl", "step")] == list(range(1, STEPS + 1))


def commits(run_dir: Path) -> int:
    """Steps made in all lives so far, those that were made again included."""
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_text().count('"kind": "step"') if metrics.is_file() else 0
