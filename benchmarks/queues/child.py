"""A program in a process of its own that answers requests: one JSON line each, both ways."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TextIO

import psutil

from benchmarks.queues.base import MissingFeature

ROOT = Path(__file__).resolve().parents[2]


class ChildFailed(Exception):
    """A child could not do what it was asked for, or is not there any more."""


def serve(functions: Mapping[str, Callable[..., Any]], *arguments: Any) -> None:
    """Answer `{"do": name, "with": {…}}` with what the function returns, until the standard input ends.

    What anything else here or below prints goes to the standard error.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": functions[request["do"]](*arguments, **request["with"])}
        except MissingFeature as missing:
            answer = {"missing": str(missing)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class Child:
    """Such a program, seen by who asks."""

    def __init__(self, command: Sequence[str], *, log: Path) -> None:
        """`log`: file of what it prints besides its answers."""
        self._log = log
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                cwd=ROOT,
                start_new_session=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests: TextIO = self._process.stdin  # type: ignore[assignment]
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._listener = threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True)
        self._listener.start()

    def ask(self, do: str, *, timeout: float = 900.0, **values: Any) -> Any:
        """Raises MissingFeature for what it cannot do, and ChildFailed."""
        try:
            self._requests.write(json.dumps({"do": do, "with": values}) + "\n")
            self._requests.flush()
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            raise ChildFailed(f"{do} was not done within {timeout:.0f} s: see {self._log}") from None
        except OSError:
            line = ""
        if not line:
            raise ChildFailed(f"the process that does {do} has ended: {_tail(self._log)}")
        answer = json.loads(line)
        if "missing" in answer:
            raise MissingFeature(answer["missing"])
        if "error" in answer:
            raise ChildFailed(f"{do} failed:\n{answer['error']}")
        return answer["result"]

    def processes(self) -> list[psutil.Process]:
        """It, and all processes below it."""
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._process.pid)
            return [root, *root.children(recursive=True)]
        return []

    def suspend(self) -> None:
        """Stop all of its processes where they are, so that they take nothing from another child that is measured."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.suspend()

    def resume(self) -> None:
        for process in reversed(self.processes()):
            with suppress(psutil.NoSuchProcess):
                process.resume()

    def close(self, *, patience: float = 30.0) -> None:
        """Ask it to end; kill what is left of it. May be called twice."""
        self.resume()
        # A process object knows its own: it does not kill another one that has got the same id since.
        processes = self.processes()
        with suppress(OSError, subprocess.TimeoutExpired):
            self._requests.close()
            self._process.wait(patience)
        for process in reversed(processes):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        self._listener.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _listen(self, answers: TextIO) -> None:
        with answers:
            for line in answers:
                self._answers.put(line)
        self._answers.put("")


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time that these processes have used so far."""
    total = 0.0
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            times = psutil.Process(pid).cpu_times()
            total += times.user + times.system
    return total


def cpu_share(pids: Sequence[int], seconds: float) -> float:
    """Cores that these processes keep busy for a while."""
    before, began = cpu_seconds(pids), time.perf_counter()
    time.sleep(seconds)
    return (cpu_seconds(pids) - before) / (time.perf_counter() - began)


def _tail(log: Path, lines: int = 20) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def end_in_order() -> None:
    """Let SIGTERM end this process as Ctrl-C does, so that what the children have started ends with them."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
