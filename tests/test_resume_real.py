"""A real language model, with vLLM and the torch learner, that is killed again and again."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from asyncflow.report.audit import audit
from asyncflow.runtime.metrics import read_metrics
from tests.conftest import ROOT
from tests.processes import DEADLINE

STEPS = 14
SETTINGS = ("train_batch_size=32", f"steps={STEPS}", "data.eval_size=0", "eval_every=0", "checkpoint.every=3")


def asyncflow(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "asyncflow.cli", *arguments])


@pytest.mark.long
@pytest.mark.vllm
@pytest.mark.timeout(3000)
def test_smollm2_killed_at_five_random_moments_reaches_its_last_step(tmp_path: Path) -> None:
    """Each life lasts between a second (it is killed while it starts) and most of a minute (between checkpoints)."""
    run_dir, chance = tmp_path / "run", random.Random(1)
    settings = (*SETTINGS, f"run_dir={run_dir}")
    flags = [part for setting in settings for part in ("--set", setting)]
    process = asyncflow("run", str(ROOT / "configs" / "quickstart.yaml"), *flags)
    moments = []
    for _ in range(5):
        seconds = chance.uniform(15, 55)
        with_time_up = threading.Timer(seconds, process.send_signal, [signal.SIGKILL])
        with_time_up.start()
        family = psutil.Process(process.pid).children(recursive=True)
        process.wait(timeout=DEADLINE)
        with_time_up.cancel()
        moments.append((round(seconds), steps(run_dir)))
        psutil.wait_procs(family, timeout=60)
        if process.returncode == 0:
            break
        process = (
            asyncflow("resume", str(run_dir))
            if (run_dir / "ledger.sqlite").exists()
            else asyncflow("run", str(ROOT / "configs" / "quickstart.yaml"), *flags)
        )
    assert process.wait(timeout=1200) == 0
    print("killed after (seconds, steps made so far):", moments)

    account = audit(run_dir)
    assert account.ok, account.violations
    assert account.balanced
    assert account.open == 0
    assert account.learner.n == STEPS
    assert len(account.resumed) >= 3  # those that were killed while they started have not resumed yet
    assert json.loads((run_dir / "summary.json").read_text())["outcome"] == "finished"
    assert [line["step"] for line in read_metrics(run_dir / "metrics.jsonl", "step")] == list(range(1, STEPS + 1))


def steps(run_dir: Path) -> int:
    return len(read_metrics(run_dir / "metrics.jsonl", "step"))
