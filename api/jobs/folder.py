"""The folder of a job, which says what became of its process whoever is alive to look.

<job>/config.json    what the runner is to do (`Order`)
<job>/lock           locked by the job's process for as long as it lives
<job>/started.json   one line for each process that began to run the job
<job>/exit.json      how it ended
<job>/run/           the run directory
<job>/log            everything that the process wrote to its terminal

    lock    exit.json   started.json   meaning
    held    -           -              it runs
    free    there       -              it has ended as exit.json says
    free    -           there          it was killed
    free    -           -              it never began
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import psutil

from asyncflow.rundir import SUMMARY

CONFIG: Final = "config.json"
LOCK: Final = "lock"
STARTED: Final = "started.json"
EXIT: Final = "exit.json"
RUN: Final = "run"
LOG: Final = "log"

Outcome = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a runner is to do; `config.json`."""

    config: Mapping[str, Any]
    resume: bool = False
    """The run directory holds a run that goes on, with `config` as changes to what it was."""


@dataclass(frozen=True, kw_only=True)
class Exit:
    """How a runner ended; `exit.json`."""

    outcome: Outcome
    code: str
    """For programs: `finished`, `stopped`, `run_failed`, `invalid_config`, …"""
    message: str


@dataclass(frozen=True, kw_only=True)
class Started:
    """A process that began to run a job."""

    pid: int
    began: int
    """Clock ticks from the start of the machine to its own. Unlike a time it stays what it is when somebody sets the
    clock, and tells it from a later process with the same number."""
    at: float

    def process(self) -> psutil.Process | None:
        """The process, if it lives."""
        try:
            found = psutil.Process(self.pid)
            same = began(self.pid) == self.began
            return found if same and found.status() != psutil.STATUS_ZOMBIE else None
        except (psutil.Error, OSError):
            return None


class JobFolder:
    """The folder of one job."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def run(self) -> Path:
        return self.path / RUN

    @property
    def log(self) -> Path:
        return self.path / LOG

    def make(self, order: Order) -> None:
        """Write down what is to be done. May be called twice, before anything has begun."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(self.path / CONFIG, asdict(order))

    def order(self) -> Order:
        return Order(**json.loads((self.path / CONFIG).read_text(encoding="utf-8")))

    def lock(self) -> int | None:
        """Take the lock and return its descriptor, which no child inherits by itself; None while somebody has it."""
        if not self.path.is_dir():
            self.path.mkdir(mode=0o700, parents=True)
        descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor

    def held(self) -> bool:
        """Whether a process of the job lives."""
        descriptor = self.lock()
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is None

    def touched(self) -> bool:
        """Whether a process began to run the job, or is about to."""
        return self.held() or bool(self.starts()) or self.exit() is not None

    def add_start(self) -> None:
        """Say, on disk, that this process runs the job from now on."""
        line = Started(pid=os.getpid(), began=began(os.getpid()), at=time.time())
        with (self.path / STARTED).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(line)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def starts(self) -> list[Started]:
        """Every process that began to run the job: one, or none. One whose line is torn (a full disk) never began."""
        found = []
        with suppress(FileNotFoundError):
            for line in (self.path / STARTED).read_bytes().splitlines():
                with suppress(ValueError, TypeError):
                    found.append(Started(**json.loads(line)))
        return found

    def end(self, how: Exit) -> None:
        write_json(self.path / EXIT, asdict(how))

    def exit(self) -> Exit | None:
        """How it ended; None as long as it has not, or when it was killed."""
        path = self.path / EXIT
        try:
            how = Exit(**json.loads(path.read_bytes()))
            if how.outcome in get_args(Outcome):
                return how
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            pass
        return Exit(outcome="failed", code="internal_error", message=f"nobody can tell how it ended: {path} is damaged")


def began(pid: int) -> int:
    """When a process began, in clock ticks since the machine did (`starttime` of proc_pid_stat(5)). Raises OSError."""
    stat = Path(f"/proc/{pid}/stat").read_bytes()
    return int(stat[stat.rindex(b")") + 2 :].split()[19])


def write_json(path: Path, value: object) -> None:
    """The whole file or the one before it, for its owner only."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """The same with text."""
    aside = path.with_name(f"{path.name}.part")
    with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def summary_of(folder: JobFolder) -> Mapping[str, Any] | None:
    """`summary.json` of a job's run, if it has one."""
    with suppress(OSError, ValueError):
        value = json.loads((folder.run / SUMMARY).read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else None
    return None
