"""Asynchronous reinforcement learning of language models.

The names below are the public interface; they are loaded when they are first used, so importing this package is free.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncflow.client import Client
    from asyncflow.config import Config, load_config
    from asyncflow.engines.base import (
        Capabilities,
        GenerationRequest,
        LearnerEngine,
        OptimStats,
        ResumableLearner,
        RolloutEngine,
        ScorerEngine,
        Served,
        WeightSnapshot,
    )
    from asyncflow.errors import AsyncFlowError
    from asyncflow.launch import Run, resume, run
    from asyncflow.report.audit import audit
    from asyncflow.types import Completion, PolicyVersion, Sampling, TokenSample, TrainSample

__version__ = "0.1.0"

_HOMES = {
    "asyncflow.client": ("Client",),
    "asyncflow.config": ("Config", "load_config"),
    "asyncflow.engines.base": (
        "Capabilities",
        "GenerationRequest",
        "LearnerEngine",
        "OptimStats",
        "ResumableLearner",
        "RolloutEngine",
        "ScorerEngine",
        "Served",
        "WeightSnapshot",
    ),
    "asyncflow.errors": ("AsyncFlowError",),
    "asyncflow.launch": ("Run", "resume", "run"),
    "asyncflow.report.audit": ("audit",),
    "asyncflow.types": ("Completion", "PolicyVersion", "Sampling", "TokenSample", "TrainSample"),
}

__all__ = [
    "AsyncFlowError",
    "Capabilities",
    "Client",
    "Completion",
    "Config",
    "GenerationRequest",
    "LearnerEngine",
    "OptimStats",
    "PolicyVersion",
    "ResumableLearner",
    "RolloutEngine",
    "Run",
    "Sampling",
    "ScorerEngine",
    "Served",
    "TokenSample",
    "TrainSample",
    "WeightSnapshot",
    "audit",
    "load_config",
    "resume",
    "run",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'asyncflow' has no attribute {name!r}")
