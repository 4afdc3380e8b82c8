"""Makes the plan of a configuration in a process of its own, with a deadline, and starts nothing.

A plan imports torch, reads data and tries the reward function: none of that may hurt or swell the service.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from asyncflow_api.jobs.folder import Order

from asyncflow.config import Config

MAX_MEMORY: Final = 16 << 30
"""Bytes of private memory of the process."""
MAX_ANSWER: Final = 4 << 20


@dataclass(frozen=True, kw_only=True)
class FieldError:
    """One thing that is wrong."""

    field: str
    """Dotted key, from the top of the request's `config`; `config` itself where it is none in particular."""
    message: str


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What came of a configuration."""

    errors: tuple[FieldError, ...] = ()
    resolved: Mapping[str, Any] | None = None
    """The configuration with everything derived filled in."""
    plan: Mapping[str, str] = field(default_factory=dict)
    """For people: what runs where, how much memory, what a step is."""
    late: bool = False
    """It was not the configuration: there was no answer in time."""

    @property
    def ok(self) -> bool:
        return not self.errors


def validate(
    order: Order, run_dir: Path | None, *, timeout: float, stopped: threading.Event | None = None
) -> Validation:
    """Make the plan in a child process. `run_dir`: of the run that goes on, where one does. `stopped` ends it early."""
    request = {"order": asdict(order), "run_dir": None if run_dir is None else str(run_dir)}
    send: bytes | None = json.dumps(request).encode()
    command = [sys.executable, "-m", "asyncflow_api.jobs.validator", str(int(timeout) + 1)]
    deadline = time.monotonic() + timeout
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True) as child:
        answer = None
        while answer is None and time.monotonic() < deadline and not (stopped is not None and stopped.is_set()):
            try:
                answer, _ = child.communicate(send, timeout=0.2)
            except subprocess.TimeoutExpired:
                send = None  # it goes on with what it was given first
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # with whatever it has started
    if answer is None:
        text = f"its plan could not be made within {timeout:g} s: make data.size smaller, or try again"
        return Validation(errors=(FieldError(field="config", message=text),), late=True)
    try:
        values = json.loads(answer[:MAX_ANSWER])
    except ValueError:
        ended = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
        text = f"its plan could not be made (the process ended with {ended}): it needs too much memory, or crashes"
        return Validation(errors=(FieldError(field="config", message=text),))
    errors = tuple(FieldError(**error) for error in values.pop("errors"))
    return Validation(errors=errors, **values)


def main(seconds: str) -> None:
    """In the child: an order on stdin, the answer on stdout; what libraries print goes to stderr."""
    signal.alarm(int(seconds))  # in case nobody is left to end it
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answer = os.dup(1)
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    with open(answer, "w", encoding="utf-8") as stream:
        json.dump(examine(Order(**request["order"]), request["run_dir"]), stream, default=str)


def examine(order: Order, run_dir: str | None) -> dict[str, Any]:
    """The answer of the child: `errors`, `resolved`, `plan`."""
    from asyncflow.errors import AsyncFlowError
    from asyncflow.launch import prepare_resume, resolve
    from asyncflow.plan import describe, plan

    try:
        if order.resume and run_dir is not None:
            ready, _ = prepare_resume(run_dir, changes=order.config)
        else:
            ready = plan(resolve(order.config))
    except AsyncFlowError as error:
        found = getattr(error, "fields", ()) or [(field_of(str(error)), str(error))]
        return {"errors": [{"field": key, "message": text} for key, text in found]}
    except (MemoryError, OverflowError, RecursionError) as error:
        return {"errors": [{"field": "config", "message": f"it is too large to plan ({type(error).__name__})"}]}
    resolved = ready.config.model_dump(mode="json", exclude={"run_dir"})
    return {"errors": [], "resolved": resolved, "plan": dict(describe(ready))}


def field_of(sentence: str) -> str:
    """The setting with which a sentence begins or which it names first, or `config`."""
    for word in re.findall(r"[a-z_]+(?:\.[a-z_]+)*", sentence):
        head, _, rest = word.partition(".")
        if head in Config.model_fields and (rest or "_" in head or sentence.startswith((f"{word}:", f"{word} "))):
            return str(word)
    return "config"


if __name__ == "__main__":
    main(sys.argv[1])
