"""Runs in processes of their own, as a user starts them."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable

DEADLINE = 180.0
"""Seconds after which a run that does not do what it should has failed the test."""


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    """Look at the condition until it holds; the process under test, if there is one, must be alive meanwhile."""
    deadline, pause = time.monotonic() + DEADLINE, threading.Event()
    while not condition():
        assert process is None or process.poll() is None, process and process.communicate()
        assert time.monotonic() < deadline, "the run did not get so far in time"
        pause.wait(0.005)
