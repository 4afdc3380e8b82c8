"""Runs of configs/tiny.yaml that go on until somebody stops them, in processes of their own."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from asyncflow.errors import ControlError
from asyncflow.runtime.control import ControlClient
from tests.conftest import TINY
from tests.processes import DEADLINE, wait_until

UNHURRIED = "rollout.options={token_latency: 0.002}"
"""So that a step takes as long as people can see."""


@contextlib.contextmanager
def endless_run(run_dir: Path, *overrides: str, steps: int = 2) -> Iterator[subprocess.Popen[str]]:
    """A run that has made so many steps and goes on; it is killed at the end, if it still does."""
    settings = ("steps=100000", f"run_dir={run_dir}", "data.eval_size=0", *overrides)
    process = subprocess.Popen(
        [sys.executable, "-m", "asyncflow.cli", "run", str(TINY), *(x for s in settings for x in ("--set", s))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_until(lambda: step_of(run_dir) >= steps, process)
        yield process
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE)


def step_of(run_dir: Path) -> int:
    try:
        return int(ControlClient(run_dir).status().get("step", 0))
    except ControlError:  # it has only just started
        return 0


def stop(run_dir: Path, process: subprocess.Popen[str]) -> str:
    """In order; what it printed."""
    ControlClient(run_dir).stop()
    output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130, output
    return output
