"""What AsyncFlow puts into every vLLM process, by the entry point `vllm.general_plugins`.

vLLM calls `register` in every process of everybody who has both packages installed, so it only adds the name of our
weight transport to vLLM's list. What concerns a process as a whole happens only where an AsyncFlow run has asked for it
in the environment, and never in the run's own process.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading

BACKEND = "asyncflow_shm"
"""Name of our transport in vLLM's `WeightTransferConfig`."""
OWNER = "ASYNCFLOW_ENGINE_OWNER_PID"
"""Process whose death ends this one."""
CORES = "ASYNCFLOW_ENGINE_CORES"
"""Comma-separated CPU cores to which this process is restricted; not set: all."""


def register() -> None:
    """Make our weight transport known, and tie an engine process to the run that started it. May be called twice."""
    _register_transport()
    owner = os.environ.get(OWNER)
    if owner is None or int(owner) == os.getpid():
        return
    # Ctrl-C in a terminal goes to a whole process group. It is for the run, which then stops its engine in good order.
    os.setpgid(0, 0)
    if cores := os.environ.get(CORES):
        _restrict_to({int(core) for core in cores.split(",")})
    _die_with(int(owner))


def _register_transport() -> None:
    """Without importing it: it loads when an engine is configured with it."""
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    except ImportError:  # a vLLM that is older than pluggable transports
        return
    with contextlib.suppress(ValueError):  # registered already
        WeightTransferEngineFactory.register_engine(
            BACKEND, "asyncflow.engines.weights.vllm_transfer", "SharedMemoryTransfer"
        )


def _restrict_to(cores: set[int]) -> None:
    """All threads, because those that run already (of libraries that were imported before) do not follow the first.

    A thread that is bound to some of these cores stays where it is: vLLM binds its OpenMP threads one by one.
    """
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):
            allowed = os.sched_getaffinity(int(thread))
            os.sched_setaffinity(int(thread), allowed & cores or cores)


def _die_with(owner: int) -> None:
    """End this process when `owner` ends, whatever way it goes. A thread waits for it and costs nothing until then."""

    def wait(descriptor: int) -> None:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.poll()
        os._exit(1)

    try:
        descriptor = os.pidfd_open(owner)
    except ProcessLookupError:
        os._exit(1)
    threading.Thread(target=wait, args=(descriptor,), name="asyncflow-owner", daemon=True).start()
