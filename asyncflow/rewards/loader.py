"""From the names in a configuration to reward functions that can be called."""

from __future__ import annotations

import difflib
import functools
import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from asyncflow.config import RewardConfig
from asyncflow.errors import ConfigError, RewardError
from asyncflow.rewards.functions import BUILT_IN, RewardFunction
from asyncflow.rewards.graders import MADE
from asyncflow.rewards.reward import Reward
from asyncflow.user_code import look_in_current_folder

IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def load_reward(
    specs: Sequence[RewardConfig | RewardFunction] | RewardFunction, *, timeout: float = math.inf
) -> Reward:
    """The weighted sum of the functions that are named, or given themselves (with weight 1); or of a single one.

    A name is a key of `asyncflow.rewards.functions.BUILT_IN`, or an import path `package.module:function`, for which
    modules in the current folder are found as well. A function is known by its own name in metrics; when two have the
    same one, by how they were named here. `timeout` is in seconds a call.

    Raises ConfigError for a name that leads to no function, and RewardError for a module that cannot be imported or a
    function that cannot be called by keyword.
    """
    if callable(specs):
        specs = [specs]
    if not specs:
        raise ConfigError("name at least one reward function")
    named = [(spec.use if isinstance(spec, RewardConfig) else _own_name(spec), spec) for spec in specs]
    loaded = [
        (use, _find(use, spec.options), spec.weight) if isinstance(spec, RewardConfig) else (use, spec, 1.0)
        for use, spec in named
    ]
    own_names = [use if use in BUILT_IN or use in MADE else _own_name(function) for use, function, _ in loaded]
    functions: dict[str, tuple[RewardFunction, float]] = {}
    for (use, function, weight), own_name in zip(loaded, own_names, strict=True):
        name = own_name if own_names.count(own_name) == 1 else use
        if name in functions:
            raise ConfigError(f"the reward function {use} is named twice: name it once, and set its weight")
        functions[name] = (function, weight)
    return Reward(functions, timeout=timeout)


def _own_name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    name = str(getattr(function, "__name__", type(function).__name__))
    return "lambda" if name == "<lambda>" else name


def _find(use: str, options: Mapping[str, Any]) -> RewardFunction:
    if use in MADE:
        try:
            return MADE[use](**options)
        except TypeError:
            raise ConfigError(
                f"reward {use}: {', '.join(options)} are not its options: give it those that its description names"
            ) from None
    if options:
        raise ConfigError(f"reward {use}: only {', '.join(MADE)} takes options: leave them out")
    if use in BUILT_IN:
        return BUILT_IN[use]
    if not IMPORT_PATH.fullmatch(use):
        known = sorted({*BUILT_IN, *MADE})
        near = difflib.get_close_matches(use, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}, or package.module:function"
        raise ConfigError(f"there is no reward function {use!r}: {hint}")
    module_name, _, attributes = use.partition(":")
    module = _import(module_name, use)
    try:
        function = functools.reduce(getattr, attributes.split("."), module)
    except AttributeError:
        near = difflib.get_close_matches(attributes, vars(module), n=1)
        hint = f"did you mean {near[0]}?" if near else "name a function that it defines"
        raise ConfigError(f"reward {use}: {module_name} has no {attributes}: {hint}") from None
    if not callable(function):
        raise ConfigError(f"reward {use}: {attributes} is no function: name one")
    checked: Callable[..., Any] = function
    return checked


def _import(name: str, use: str) -> Any:
    look_in_current_folder()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise RewardError(f"reward {use}: importing {name} failed, it needs {error.name}: install it") from error
        raise ConfigError(
            f"reward {use}: there is no module {name}, neither installed nor in the current folder: correct the name, "
            f"or start from the folder that holds it"
        ) from None
    except Exception as error:
        reason = " ".join(str(error).split())
        raise RewardError(
            f"reward {use}: importing {name} raised {type(error).__name__}: {reason}: correct the module"
        ) from error
