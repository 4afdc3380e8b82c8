"""Engines by name: a short name of ours, an entry point of an installed package, or an import path."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
from collections.abc import Mapping
from typing import TypeVar

from asyncflow.engines.base import LearnerEngine, RolloutEngine, ScorerEngine
from asyncflow.errors import ConfigError
from asyncflow.user_code import look_in_current_folder

ROLLOUT_ENGINES: Mapping[str, str] = {
    "vllm": "asyncflow.engines.vllm:VLLMRollout",
    "fake": "asyncflow.engines.fake:FakeRollout",
}
LEARNER_ENGINES: Mapping[str, str] = {
    "torch": "asyncflow.engines.torch_learner:TorchLearner",
    "fake": "asyncflow.engines.fake:FakeLearner",
}
SCORER_ENGINES: Mapping[str, str] = {
    "torch": "asyncflow.engines.torch_scorer:TorchScorer",
    "fake": "asyncflow.engines.fake:FakeScorer",
}
SCORER_OF_WEIGHTS: Mapping[str, str] = {"huggingface": "torch", "bigram": "fake"}
"""Kind of weights → the scorer that reads them, where none is named."""
ENTRY_POINTS = "asyncflow.engines"
"""Entry point group in which other packages offer engines of any kind."""

Engine = TypeVar("Engine", bound=RolloutEngine | LearnerEngine | ScorerEngine)


def rollout_class(name: str) -> type[RolloutEngine]:
    """The rollout engine of this name. Raises ConfigError, which says what there is."""
    return _find(name, ROLLOUT_ENGINES, RolloutEngine, "rollout.engine")  # type: ignore[type-abstract]


def learner_class(name: str) -> type[LearnerEngine]:
    """The learner engine of this name. Raises ConfigError, which says what there is."""
    return _find(name, LEARNER_ENGINES, LearnerEngine, "learner.engine")  # type: ignore[type-abstract]


def scorer_class(name: str) -> type[ScorerEngine]:
    """The scorer engine of this name. Raises ConfigError, which says what there is."""
    return _find(name, SCORER_ENGINES, ScorerEngine, "reference.engine")  # type: ignore[type-abstract]


def _find(name: str, known: Mapping[str, str], kind: type[Engine], key: str) -> type[Engine]:
    path = known.get(name, name)
    if ":" not in path:
        offered = {entry.name: entry.value for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}
        if name not in offered:
            names = sorted({*known, *offered})
            near = difflib.get_close_matches(name, names, n=1)
            suggestion = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(
                f"{key}: there is no engine {name!r}; {suggestion}"
                f"use one of {', '.join(names)}, or an import path such as my_package.my_module:MyEngine"
            )
        path = offered[name]
    module, _, attribute = path.partition(":")
    look_in_current_folder()
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ConfigError(f"{key}: {path} cannot be imported ({error}): install what it needs") from error
    except AttributeError:
        raise ConfigError(f"{key}: the module {module} has no {attribute!r}: name a class that it defines") from None
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ConfigError(f"{key}: {path} must be a subclass of asyncflow.{kind.__name__}")
    return found
