"""Runs in processes of their own, as a user starts them."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

DEADLINE = 180.0
"""Seconds after which a run that does not do what it should has failed the test."""


def wait_until(
    condition: Callable[[], bool], process: subprocess.Popen[Any] | None = None, *, within: float = DEADLINE
) -> None:
    """Look at the condition until it holds, for so many seconds at most; the process under test, if there is one, must
    be alive meanwhile."""
    deadline, pause = time.monotonic() + within, threading.Event()
    while not condition():
        assert process is None or process.poll() is None, process and process.communicate()
        assert time.monotonic() < deadline, "the run did not get so far in time"
        pause.wait(0.005)
