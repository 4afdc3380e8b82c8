"""docs/tutorial.md as a reader follows it: every block is run, in order, in one shell, and what it prints compared."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.running_service import end_jobs

TUTORIAL = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
QUICK = "configs/tutorial.yaml"
REAL = "configs/quickstart.yaml"


@dataclass(frozen=True)
class Step:
    """A block that is run."""

    kind: str
    """`sh`, `python`, or `yaml`: a workflow whose commands are run."""
    code: str
    shown: str
    """What the page says that it prints."""


def steps_of(page: str) -> list[Step]:
    found: list[Step] = []
    for kind, code in BLOCK.findall(page):
        if kind == "text":
            found[-1] = Step(found[-1].kind, found[-1].code, code)
        else:
            found.append(Step(kind, code, ""))
    return found


def pattern_of(shown: str) -> str:
    """`…` in a line is anything in it, and as a line any lines."""
    lines = [
        r"(?:.*\n)*" if line.strip() == "…" else ".*".join(map(re.escape, line.split("…"))) + r"\n"
        for line in shown.splitlines()
    ]
    return "".join(lines)


def command_of(step: Step, file: Path) -> str:
    """What a shell does in place of the block."""
    match step.kind:
        case "sh":
            return step.code
        case "python":
            file.write_text(step.code, encoding="utf-8")
            return f"python {shlex.quote(str(file))}"
        case "yaml":
            (job,) = yaml.safe_load(step.code)["jobs"].values()
            return "\n".join(one["run"] for one in job["steps"])
    raise AssertionError(f"a block of kind {step.kind}: the tutorial runs sh, python and yaml")


def script_of(steps: list[Step], folder: Path) -> str:
    """One shell for all blocks, as they go on with each other's variables; it ends where one fails."""
    lines = ["set -e"]
    for number, step in enumerate(steps):
        command = command_of(step, folder / f"block{number}.py")
        # The file descriptors of the service are its own: what it says is no part of what a block prints.
        lines += [f"echo {number} > at", "{", command.rstrip(), f"}} > {number}.out 2> {number}.err"]
        if "TOKEN=" in command:
            lines.append("export ASYNCFLOW_URL=$URL ASYNCFLOW_TOKEN=$TOKEN COMMIT=0123abc")
    return "\n".join([*lines, "echo done > at", ""])


def follow(folder: Path, config: str, *, within: float) -> list[str]:
    """Do what the page says, with this configuration, for so many seconds at most; what every block has printed."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    page = TUTORIAL.read_text(encoding="utf-8").replace("8765", str(port))
    assert f"CONFIG={REAL}" in page
    assert "serve --home my-service" in page
    page = page.replace(f"CONFIG={REAL}", f"CONFIG={config}")
    page = page.replace("serve --home my-service", f"serve --home my-service --port {port}", 1)
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "bin").mkdir()
    (folder / "bin" / "asyncflow").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m asyncflow.cli "$@"\n')
    (folder / "bin" / "asyncflow").chmod(0o755)
    steps = steps_of(page)
    (folder / "script").write_text(script_of(steps, folder), encoding="utf-8")
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "XDG_CONFIG_HOME": str(folder / "config")}
    shell = subprocess.Popen(["bash", "script"], cwd=folder, env=environment, start_new_session=True)
    try:
        code = shell.wait(within)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()
        end_jobs(folder / "my-service")
    at = (folder / "at").read_text().strip()
    said = "" if at == "done" else (folder / f"{at}.err").read_text() + (folder / f"{at}.out").read_text()
    assert (code, at) == (0, "done"), f"{steps[int(at)].code}\n{said}"
    printed = [(folder / f"{number}.out").read_text(encoding="utf-8") for number in range(len(steps))]
    for step, text in zip(steps, printed, strict=True):
        whole = text if text.endswith("\n") or not text else f"{text}\n"
        assert re.fullmatch(pattern_of(step.shown), whole), f"{step.code}\nprints\n{text}\nand not\n{step.shown}"
    return printed


@pytest.mark.timeout(1500)
def test_the_tutorial_works_as_it_stands(tmp_path: Path) -> None:
    follow(tmp_path, QUICK, within=1400)


@pytest.mark.long
@pytest.mark.vllm
@pytest.mark.timeout(7200)
def test_the_tutorial_trains_a_real_model(tmp_path: Path) -> None:
    printed = follow(tmp_path, REAL, within=7000)

    found = [[float(part) for part in re.findall(r"accuracy (\S+) after step", text)] for text in printed]
    print(f"\naccuracy {found}")
    assert max(one[-1] - one[0] for one in found if one) >= 0.1


def test_what_the_page_shows_is_compared_with_what_comes() -> None:
    page = "a\n```\nnot run\n```\n```sh\nls\n```\n\n```text\nx … y\n…\n(z)\n```\n```python\nprint()\n```\n"

    steps = steps_of(page)

    assert [(step.kind, step.code) for step in steps] == [("sh", "ls\n"), ("python", "print()\n")]
    pattern = pattern_of(steps[0].shown)
    assert re.fullmatch(pattern, "x 1 y\n(z)\n")
    assert re.fullmatch(pattern, "x 1 y\nmore\nand more\n(z)\n")
    assert not re.fullmatch(pattern, "x 1 y\n(z)\nmore\n")
    assert not re.fullmatch(pattern, "x 1\n y\n(z)\n")
    assert not re.fullmatch(pattern, "x 1 y\nz\n")
