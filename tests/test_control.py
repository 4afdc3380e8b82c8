"""A run that is watched and steered while it goes on, from another process."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from asyncflow.errors import ControlError
from asyncflow.launch import prepare_resume, resume
from asyncflow.report.audit import audit
from asyncflow.runtime.control import ControlClient, ControlServer
from asyncflow.store.events import Amended
from asyncflow.store.journal import read_ledger
from tests.endless import UNHURRIED, endless_run, step_of
from tests.own_process import OWN
from tests.processes import DEADLINE, wait_until

# -- the socket --------------------------------------------------------------------------------------------------------


class Wishes:
    """A run that only remembers what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[object] = []

    def status(self) -> Mapping[str, Any]:
        return {"step": 3, "served": {"rollout-0": "0.3"}}

    def pause(self) -> None:
        self.asked.append("pause")

    def resume(self) -> None:
        self.asked.append("resume")

    def stop(self) -> None:
        self.asked.append("stop")

    def set_max_staleness(self, bound: int) -> None:
        if bound < 0:
            raise ControlError(f"max_staleness cannot be {bound}: give a whole number")
        self.asked.append(bound)

    def workers(self) -> Sequence[Mapping[str, Any]]:
        return [{"name": "reward", "activity": "busy"}]

    def engines(self) -> Sequence[Mapping[str, Any]]:
        return [{"name": "rollout-0", "served": "0.3"}]

    def drain(self, worker: str) -> None:
        self.asked.append(("drain", worker))

    def undrain(self, worker: str) -> None:
        self.asked.append(("undrain", worker))

    def timeline(self, seconds: float) -> Sequence[Mapping[str, Any]]:
        return [{"worker": "reward", "start": 0.0, "end": seconds}]

    def shares(self, seconds: float) -> Mapping[str, float]:
        return {"reward/busy": seconds / 100}

    def tokenise(self, prompts: Sequence[Any]) -> Sequence[Sequence[int]]:
        return [[len(prompt)] for prompt in prompts]

    def complete(self, prompt: Any, **sampling: Any) -> Mapping[str, Any]:
        return {"prompt": prompt, **sampling}


@pytest.fixture
def wishes() -> Wishes:
    return Wishes()


@pytest.fixture
def run_dir(tmp_path: Path, wishes: Wishes) -> Iterator[Path]:
    """Deep, as run directories are: a path that no socket address could hold."""
    folder = tmp_path / ("deep" * 30) / "run"
    folder.mkdir(parents=True)
    server = ControlServer(wishes, folder)
    yield folder
    server.close()
    assert not (folder / "control.sock").exists()


def test_every_wish_arrives_and_is_answered(run_dir: Path, wishes: Wishes) -> None:
    client = ControlClient(run_dir)

    client.pause()
    client.resume()
    client.set_max_staleness(4)
    client.drain("reward")
    client.undrain("reward")
    client.stop()

    assert wishes.asked == ["pause", "resume", 4, ("drain", "reward"), ("undrain", "reward"), "stop"]
    assert client.status() == {"step": 3, "served": {"rollout-0": "0.3"}}


def test_every_question_is_answered(run_dir: Path) -> None:
    client = ControlClient(run_dir)

    assert client.workers() == [{"name": "reward", "activity": "busy"}]
    assert client.engines() == [{"name": "rollout-0", "served": "0.3"}]
    assert client.timeline(7.0) == [{"worker": "reward", "start": 0.0, "end": 7.0}]
    assert client.shares(50.0) == {"reward/busy": 0.5}
    assert client.tokenise(["a", "bcd"]) == [[1], [3]]
    assert client.complete("x", n=2, max_new_tokens=3, temperature=0.5, top_p=0.9, seed=4, timeout=8.0) == {
        "prompt": "x",
        "n": 2,
        "max_new_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 4,
        "timeout": 8.0,
    }


def test_an_answer_may_be_longer_than_a_request(run_dir: Path, wishes: Wishes) -> None:
    many = [{"worker": "reward", "start": float(place), "end": 1.0} for place in range(100_000)]
    wishes.timeline = lambda seconds: many  # type: ignore[method-assign]
    server = ControlServer(wishes, run_dir)  # at the same place, so that it has the new method
    try:
        assert ControlClient(run_dir).timeline(60.0) == many
    finally:
        server.close()


def test_a_refusal_comes_back_as_it_was_said(run_dir: Path, wishes: Wishes) -> None:
    with pytest.raises(ControlError, match=r"max_staleness cannot be -1: give a whole number"):
        ControlClient(run_dir).set_max_staleness(-1)

    assert wishes.asked == []


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"pause\n",
        b"[]\n",
        b'{"call": "explode"}\n',
        b'{"call": "__init__"}\n',
        b'{"call": ["pause"]}\n',
        b"\xff\n",
    ],
)
def test_what_is_no_request_is_answered_with_what_would_be_one(run_dir: Path, wishes: Wishes, line: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as connection, address(run_dir) as name:
        connection.settimeout(DEADLINE)
        connection.connect(name)
        connection.sendall(line)
        answer = json.loads(connection.makefile("rb").readline())

    assert answer["error"].startswith("ask for one of status, pause, resume, stop, set_max_staleness")
    assert wishes.asked == []


def test_arguments_that_a_call_does_not_take_are_refused(run_dir: Path, wishes: Wishes) -> None:
    with pytest.raises(ControlError, match="unexpected keyword argument 'now'"):
        ControlClient(run_dir)._call("pause", now=True)

    assert wishes.asked == []


def test_a_client_that_says_nothing_keeps_nobody_else_waiting(run_dir: Path, wishes: Wishes) -> None:
    with socket.socket(socket.AF_UNIX) as silent, address(run_dir) as name:
        silent.connect(name)
        ControlClient(run_dir).pause()

    assert wishes.asked == ["pause"]


def test_only_the_owner_may_steer(run_dir: Path) -> None:
    assert (run_dir / "control.sock").stat().st_mode & 0o777 == 0o600


def test_where_no_run_goes_on_is_said(tmp_path: Path, wishes: Wishes) -> None:
    with pytest.raises(ControlError, match=r"there is no directory .*/gone: name a run directory"):
        ControlClient(tmp_path / "gone").status()
    with pytest.raises(ControlError, match=r"no run is going on in .*asyncflow resume"):
        ControlClient(tmp_path).status()

    with socket.socket(socket.AF_UNIX) as left, address(tmp_path) as name:
        left.bind(name)  # as a process that was killed leaves it
    with pytest.raises(ControlError, match="no run is going on"):
        ControlClient(tmp_path).status()

    server = ControlServer(wishes, tmp_path)
    ControlClient(tmp_path).pause()
    server.close()
    server.close()
    assert wishes.asked == ["pause"]


@contextlib.contextmanager
def address(folder: Path) -> Iterator[str]:
    """Of the socket in a folder, below the kernel's limit."""
    descriptor = os.open(folder, os.O_PATH)
    yield f"/proc/self/fd/{descriptor}/control.sock"
    os.close(descriptor)


# -- a real run --------------------------------------------------------------------------------------------------------


@pytest.fixture
def endless(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A run for a test that steers it, with the settings that the test asks for."""
    run_dir = tmp_path / "run"
    with endless_run(run_dir, UNHURRIED, *getattr(request, "param", ())) as process:
        yield run_dir, process


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run for tests that change nothing about it."""
    run_dir = tmp_path_factory.mktemp("shared") / "run"
    with endless_run(run_dir, UNHURRIED):
        yield run_dir


def asyncflow(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "asyncflow.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)


@pytest.mark.parametrize("endless", [(), (OWN,)], ids=["here", "own process"], indirect=True)
def test_a_run_is_paused_changed_and_stopped_from_another_terminal(
    endless: tuple[Path, subprocess.Popen[str]],
) -> None:
    run_dir, process = endless
    client = ControlClient(run_dir)

    assert asyncflow("pause", str(run_dir)).returncode == 0
    wait_until(lambda: not client.status()["open"]["generating"], process)
    wait_until(lambda: settled(client), process)
    at = client.status()
    assert at["phase"] == "paused"
    assert "paused" in asyncflow("status", str(run_dir)).stdout
    assert json.loads(asyncflow("status", str(run_dir), "--json").stdout)["step"] == at["step"]  # and it stays there

    assert asyncflow("set", str(run_dir), "max_staleness=3").returncode == 0
    assert client.status()["max_staleness"] == 3
    assert asyncflow("resume-run", str(run_dir)).returncode == 0
    wait_until(lambda: step_of(run_dir) >= at["step"] + 4, process)

    assert asyncflow("stop", str(run_dir)).returncode == 0
    output, _ = process.communicate(timeout=DEADLINE)

    assert process.returncode == 130, output
    account = audit(run_dir)
    assert account.ok, account.violations
    assert account.highest_bound == 3
    assert max(account.staleness) <= 3
    made = account.learner.n
    ready, _ = prepare_resume(run_dir, overrides=[f"steps={made + 2}"])
    assert ready.config.max_staleness == 3  # what was set while it went on, and not what it began with
    assert resume(run_dir, overrides=[f"steps={made + 2}"]).summary.steps == made + 2
    assert audit(run_dir).taken_back == 0  # the checkpoint at the end was of the last step


def settled(client: ControlClient) -> bool:
    """Two looks in a row see the same step."""
    before = client.status()["step"]
    threading.Event().wait(0.6)
    return bool(client.status()["step"] == before)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("max_staleness=-1", "max_staleness cannot be -1"),
        ("max_staleness=many", "write max_staleness=N, N a whole number"),
        ("max_staleness", "write max_staleness=N"),
        ("learning_rate=1", "cannot be set while a run goes on"),
    ],
)
def test_an_impossible_setting_is_refused_in_a_sentence(shared_run: Path, setting: str, says: str) -> None:
    result = asyncflow("set", str(shared_run), setting)

    assert result.returncode == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert not any(isinstance(record.event, Amended) for record in read_ledger(shared_run / "ledger.sqlite"))


def test_a_second_process_in_the_same_directory_is_refused(shared_run: Path) -> None:
    result = asyncflow("resume", str(shared_run))

    assert result.returncode == 2
    assert "another process runs in" in result.stderr


def test_a_lower_bound_holds_for_what_is_leased_from_then_on(endless: tuple[Path, subprocess.Popen[str]]) -> None:
    run_dir, process = endless
    client = ControlClient(run_dir)
    client.set_max_staleness(4)
    at = step_of(run_dir)
    wait_until(lambda: step_of(run_dir) >= at + 6, process)
    client.set_max_staleness(0)
    at = step_of(run_dir)
    wait_until(lambda: step_of(run_dir) >= at + 6, process)
    client.stop()
    process.communicate(timeout=DEADLINE)

    account = audit(run_dir)
    assert account.ok, account.violations
    assert account.steps[-1].staleness_max == 0
    assert account.terms.max_staleness == 0
