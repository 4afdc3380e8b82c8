"""Starting a job's process so that it survives the service, and ending it with everything that it started."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from contextlib import suppress

import psutil
from asyncflow_api.jobs.folder import JobFolder, Started, began

FIRST_FREE = 10
"""Descriptors below are the child's own."""
LOCK_IN_CHILD = 3


def spawn(folder: JobFolder, lock: int) -> int:
    """Start the runner in a session of its own, with the lock that this process holds; returns its pid.

    The caller closes `lock` afterwards: the child has it then. Killed at any moment in between, this process leaves
    behind either a free lock and no child, or a child with the lock.
    """
    kept = fcntl.fcntl(lock, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE)
    log = os.fspath(folder.log)
    try:
        return os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", "asyncflow_api.jobs.runner", os.fspath(folder.path.resolve()), str(LOCK_IN_CHILD)],
            {**os.environ, "PYTHONUNBUFFERED": "1"},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
                (os.POSIX_SPAWN_DUP2, kept, LOCK_IN_CHILD),
            ],
            setsid=True,
        )
    finally:
        os.close(kept)


def bury(pid: int) -> None:
    """Take the exit status of a child that has ended; nothing where it lives, or is no child of this process."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def terminate(started: Started) -> None:
    """Ask the runner to stop: it passes that on to what it started."""
    if (process := started.process()) is not None:
        with suppress(psutil.Error):
            process.terminate()


def kill(started: Started) -> None:
    """End the runner, everything that it started, and everything in its session, at once."""
    victims = {}
    if (process := started.process()) is not None:
        victims[process.pid] = process
        with suppress(psutil.Error):
            process.suspend()  # so that it starts nothing meanwhile
            victims |= {child.pid: child for child in process.children(recursive=True)}
    if not _number_was_reused(started):
        # A session's number is taken for as long as anybody is in it, so these are the job's.
        for other in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                if os.getsid(other.pid) == started.pid:
                    victims[other.pid] = other
    for victim in victims.values():
        with suppress(psutil.Error):
            victim.send_signal(signal.SIGKILL)


def _number_was_reused(started: Started) -> bool:
    try:
        return bool(began(started.pid) != started.began)
    except OSError:
        return False
