"""Which CPU cores the engine and the learner have.

OpenMP threads of two processes that share a core wait for each other at every barrier: beside an unpinned learner, vLLM
on the CPU keeps less than a third of its speed. So on a machine without GPU each side gets cores of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from asyncflow.config import Config
from asyncflow.errors import ConfigError


def has_gpu() -> bool:
    """Whether this machine has a GPU that CUDA or ROCm could use; looks at device files, imports nothing."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()


def resolve_cores(config: Config) -> Config:
    """The configuration with the cores of both sides filled in, where there is something to divide.

    Raises ConfigError for cores that this process may not use.
    """
    available = sorted(os.sched_getaffinity(0))
    for side, cores in (("rollout", config.rollout.cores), ("learner", config.learner.cores)):
        if cores is not None and (unknown := set(cores) - set(available)):
            raise ConfigError(f"{side}.cores: there is no core {min(unknown)}; this process may use {available}")
    if has_gpu() or len(available) < 2:
        return config
    half = len(available) // 2
    learner = config.learner.cores or tuple(c for c in available[:half] if c not in (config.rollout.cores or ()))
    rollout = config.rollout.cores or tuple(c for c in available if c not in learner)
    if not learner or not rollout:
        raise ConfigError("rollout.cores and learner.cores leave nothing for the other side: give each at least one")
    return config.model_copy(
        update={
            "rollout": config.rollout.model_copy(update={"cores": rollout}),
            "learner": config.learner.model_copy(update={"cores": learner}),
        }
    )


def without_lost_cores(config: Config) -> Config:
    """The configuration of a run from another machine, or another cpuset: cores that are not here are derived again."""
    available = os.sched_getaffinity(0)
    sides = {name: getattr(config, name) for name in ("rollout", "learner")}
    if all(set(side.cores or ()) <= available for side in sides.values()):
        return config
    return config.model_copy(update={name: side.model_copy(update={"cores": None}) for name, side in sides.items()})


@contextmanager
def pinned(cores: tuple[int, ...] | None) -> Iterator[None]:
    """Keep the calling thread, and all threads that it starts meanwhile, on these cores; None changes nothing."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
