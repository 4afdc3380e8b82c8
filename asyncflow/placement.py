"""Which CPU cores the engine, the learner and the reference have.

OpenMP threads of two processes that share a core wait for each other at every barrier: beside an unpinned learner, vLLM
on the CPU keeps less than a third of its speed. So on a machine without GPU each side gets cores of its own, or, when
`placement` is colocated, all sides get all cores and take turns. The reference is beside the learner unless it is given
cores of its own: both are threads of one process, and what it computes would otherwise be computed by the learner.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from asyncflow.config import Config
from asyncflow.errors import ConfigError


def has_gpu() -> bool:
    """Whether this machine has a GPU that CUDA or ROCm could use; looks at device files, imports nothing."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()


def resolve_cores(config: Config) -> Config:
    """The configuration with the cores of all sides filled in, where there is something to divide.

    Raises ConfigError for cores that this process may not use, and for colocated sides that differ.
    """
    available = sorted(os.sched_getaffinity(0))
    given = {side: getattr(config, side).cores for side in ("rollout", "learner", "reference")}
    for side, cores in given.items():
        if cores is not None and (unknown := set(cores) - set(available)):
            raise ConfigError(f"{side}.cores: there is no core {min(unknown)}; this process may use {available}")
    if config.placement == "colocated":
        return _colocated(config, [cores for cores in given.values() if cores is not None], tuple(available))
    if has_gpu() or len(available) < 2:
        return config
    half = len(available) // 2
    beside = set(config.reference.cores or ()) if config.kl_coef else set()
    learner = config.learner.cores or tuple(
        c for c in available[:half] if c not in (config.rollout.cores or ()) and c not in beside
    )
    rollout = config.rollout.cores or tuple(c for c in available if c not in learner and c not in beside)
    if not learner or not rollout:
        sides = "rollout.cores, learner.cores and reference.cores" if beside else "rollout.cores and learner.cores"
        raise ConfigError(f"{sides} leave nothing for the other side: give each at least one")
    return _with_cores(config, rollout=rollout, learner=learner)


def _colocated(config: Config, given: Sequence[tuple[int, ...]], available: tuple[int, ...]) -> Config:
    """All sides on the same cores: those that are given, else all; on a GPU, the cores are nobody's."""
    if any(set(cores) != set(given[0]) for cores in given):
        raise ConfigError(
            "placement colocated has engine, learner and reference on the same cores: give one of rollout.cores, "
            "learner.cores and reference.cores, or none, which is all cores"
        )
    if not given and has_gpu():
        return config
    cores = given[0] if given else available
    return _with_cores(config, rollout=cores, learner=cores)


def _with_cores(config: Config, *, rollout: tuple[int, ...], learner: tuple[int, ...]) -> Config:
    return config.model_copy(
        update={
            "rollout": config.rollout.model_copy(update={"cores": rollout}),
            "learner": config.learner.model_copy(update={"cores": learner}),
            "reference": config.reference.model_copy(update={"cores": config.reference.cores or learner}),
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
