"""A run that is stopped or killed from outside: real processes, real signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from asyncflow.report.audit import audit
from asyncflow.runtime.metrics import read_metrics
from tests.conftest import TINY
from tests.own_process import OWN
from tests.processes import DEADLINE, wait_until

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts runs of configs/tiny.yaml that would go on for ever; none of them outlives the test."""
    started: list[subprocess.Popen[str]] = []

    def run(run_dir: Path, *overrides: str) -> subprocess.Popen[str]:
        settings = [f"run_dir={run_dir}", "steps=100000", "data.eval_size=0", *overrides]
        flags = [argument for setting in settings for argument in ("--set", setting)]
        process = subprocess.Popen(
            [sys.executable, "-m", "asyncflow.cli", "run", str(TINY), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # a process group of its own, to which a signal goes as Ctrl-C in a terminal does
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate(timeout=DEADLINE)


def steps(run_dir: Path) -> int:
    return len(read_metrics(run_dir / "metrics.jsonl", "step"))


def weight_folders(process: subprocess.Popen[str]) -> set[Path]:
    """Folders of published weights that this process holds the lock of."""
    opened = set()
    for link in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            opened.add(Path(os.readlink(link)))
    return {path for path in opened if path.name.startswith("asyncflow-weights-")}


@pytest.mark.parametrize(
    "engines",
    [
        pytest.param((), id="fake"),
        pytest.param(("placement=colocated", "kl_coef=0.1"), id="colocated"),
        pytest.param((OWN,), id="own process"),
        pytest.param(("rollout.engine=vllm", "learner.engine=torch"), id="vllm", marks=pytest.mark.vllm),
    ],
)
def test_ctrl_c_leaves_a_sound_run_directory_and_nothing_else(
    tmp_path: Path, start: Start, engines: tuple[str, ...]
) -> None:
    run_dir = tmp_path / "run"
    process = start(run_dir, *engines)
    wait_until(lambda: steps(run_dir) >= 2, process)
    family = psutil.Process(process.pid).children(recursive=True)
    folders = weight_folders(process)
    assert folders

    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=DEADLINE)

    assert process.returncode == 130, output
    assert "Traceback" not in output, output
    result = audit(run_dir)
    assert result.ok, result.violations
    assert result.trained + sum(result.dropped.values()) + result.quarantined + result.open == result.admitted
    for name in ("report.html", "summary.json", "weights", "config.json"):
        assert (run_dir / name).exists(), name
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
    assert not any(folder.exists() for folder in folders)


@pytest.mark.parametrize(
    ("overrides", "so_far"),
    [
        pytest.param(("rollout.engine=tests.slow_engine:SlowToStart",), "ledger.sqlite", id="while the engine starts"),
        pytest.param(("rollout.options={token_latency: 1}", "data.eval_size=16"), "served", id="first evaluation"),
        pytest.param(("rollout.options={token_latency: 0.2}", "eval_every=1", "data.eval_size=16"), "step", id="later"),
    ],
)
@pytest.mark.parametrize(
    "signals",
    [
        pytest.param((signal.SIGINT,), id="ctrl-c"),
        pytest.param((signal.SIGTERM,), id="term", marks=pytest.mark.long),
        pytest.param((signal.SIGINT, signal.SIGINT), id="twice"),
    ],
)
def test_a_run_can_be_stopped_while_it_starts_evaluates_and_trains(
    tmp_path: Path, start: Start, overrides: tuple[str, ...], so_far: str, signals: tuple[signal.Signals, ...]
) -> None:
    run_dir = tmp_path / "run"
    process = start(run_dir, *overrides)

    def reached() -> bool:
        return bool((run_dir / so_far).exists() or read_metrics(run_dir / "metrics.jsonl", so_far))

    wait_until(reached, process)
    for number in signals:
        os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=DEADLINE)

    assert process.returncode == 130, output
    assert "Traceback" not in output, output
    assert audit(run_dir).ok
    assert (run_dir / "report.html").exists()
    assert json.loads((run_dir / "summary.json").read_text())["outcome"] == "stopped"


def test_what_a_killed_run_leaves_behind_is_removed_by_the_next_one(tmp_path: Path, start: Start) -> None:
    killed = start(tmp_path / "killed")
    wait_until(lambda: steps(tmp_path / "killed") >= 2, killed)
    left = weight_folders(killed)
    killed.kill()
    killed.communicate(timeout=DEADLINE)
    assert left
    assert all(folder.exists() for folder in left)

    following = start(tmp_path / "next")
    wait_until(lambda: steps(tmp_path / "next") >= 1, following)
    swept = not any(folder.exists() for folder in left)
    os.killpg(following.pid, signal.SIGINT)
    following.communicate(timeout=DEADLINE)

    assert swept
    assert audit(tmp_path / "killed").ok
