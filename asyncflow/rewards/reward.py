"""From completions to rewards: calling functions that other people wrote, and turning what goes wrong into data.

What a function gets
    `f(prompts, completions, completion_ids, **columns)`, all by keyword, each a list with one entry for each
    completion, as TRL's `GRPOTrainer` passes them (its documentation, "Using a custom reward function"). A function
    names the ones it wants; one with `**kwargs` gets all. Columns are those of the data set; an item without a column
    that others have gives None. It may be `async`.

In which form
    `prompts` are as the data have them, text or message lists. `completions` are strings, also for chat prompts: a
    completion is what is scored, and nearly every function begins by taking the text out of it. TRL instead passes
    `[{"role": "assistant", "content": …}]` for chat prompts, and a function written for that cannot take strings.
    Nothing about a function tells the two apart without calling it, so `Reward.probe`, which calls it once anyhow,
    finds out: one that raises on a string and does not on messages gets messages from then on, for chat prompts.
    There is no setting, because only one value can be right. A function that accepts both gets strings.

What it returns
    A list with one finite number, or None (not applicable), for each completion.

How long it may take
    `timeout` seconds a call (`reward_timeout` in the configuration). Functions are called by one thread at a time,
    except that one which did not return in time is left behind, and may still be at work when the next call is made.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from asyncflow.errors import RewardError, RewardTimeout
from asyncflow.rewards.calls import Calls, Wait, wait_for
from asyncflow.rewards.functions import RewardFunction
from asyncflow.types import Int32s, Prompt

TRIAL_COMPLETION = "The answer is 1."
"""What `Reward.probe` scores: not empty, so that taking a message out of it fails."""
REASON_LIMIT = 300
"""Characters of another program's error message that a reason keeps."""

RIGHT_RESULT = "return a list with one number, or None, for each completion"

GIVEN = ("prompts", "completions", "completion_ids")


@dataclass(frozen=True, kw_only=True)
class RewardInput:
    """One completion to be scored."""

    prompt: Prompt
    completion: str
    """The response decoded, special tokens left out."""
    completion_ids: Sequence[int] | Int32s
    """(R,) response tokens."""


@dataclass(frozen=True, kw_only=True)
class RewardOutput:
    """A completion that was scored."""

    reward: float
    """Sum of weight × value over the functions that apply; finite."""
    parts: Mapping[str, float | None]
    """Each function's own value, without its weight, by its name; None where it does not apply."""


@dataclass(frozen=True, kw_only=True)
class RewardFailure:
    """A completion that could not be scored."""

    reason: str
    """One line that names the function and what it did."""


class Reward:
    """The weighted sum of some reward functions. Thread-safe: functions are called by one thread at a time."""

    def __init__(
        self, functions: Mapping[str, tuple[RewardFunction, float]], *, timeout: float = math.inf, wait: Wait = wait_for
    ) -> None:
        """`functions` are (function, weight) by name; `timeout` is in seconds a call, waited for with `wait`.

        Raises RewardError for a function that cannot be called by keyword.
        """
        self._calls = Calls(timeout=timeout, wait=wait)
        self._lock = threading.Lock()
        self._functions = [
            _Scored(name, function, weight, self._calls) for name, (function, weight) in functions.items()
        ]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the functions: the keys of `RewardOutput.parts`."""
        return tuple(function.name for function in self._functions)

    def score(self, batch: Sequence[RewardInput]) -> list[RewardOutput | RewardFailure]:
        """Score each completion, in order. What a function does wrong becomes a failure with its reason.

        When a function raises, it is called again with one completion at a time, so that only those fail that it cannot
        score. A completion fails with the reasons of all functions that failed on it, or when none applies to it.

        Raises RewardTimeout when a call takes too long: nothing is known about these completions then, and one that is
        at fault is found by scoring them alone. Raises RewardError when too many calls never came back.
        """
        # Rollouts and an evaluation may be scored at the same time, and hardly any reward function expects that.
        with self._lock:
            columns = [function.values(batch) for function in self._functions]
        return [self._combine(values) for values in zip(*columns, strict=True)]

    def probe(self, prompt: Prompt) -> None:
        """Score one item of the data with a made-up completion, before anything is started.

        Raises RewardError, one sentence that says what to do, when a function takes a column that the data do not have,
        raises, or returns something else than one finite number or None for each completion. Also finds out whether a
        function takes completions as strings or as messages (see the module).
        """
        for function in self._functions:
            function.probe(prompt)

    def close(self) -> None:
        """End what functions run on. May be called twice; `score` starts it again."""
        self._calls.close()

    def _combine(self, values: Sequence[float | RewardFailure | None]) -> RewardOutput | RewardFailure:
        failures = [value.reason for value in values if isinstance(value, RewardFailure)]
        if failures:
            return RewardFailure(reason="; ".join(failures))
        parts = {
            function.name: value
            for function, value in zip(self._functions, values, strict=True)
            if not isinstance(value, RewardFailure)
        }
        applicable = [
            function.weight * value
            for function, value in zip(self._functions, parts.values(), strict=True)
            if value is not None
        ]
        if not applicable:
            return RewardFailure(reason=f"no reward function applies: {', '.join(self.names)} returned None")
        total = math.fsum(applicable)
        if not math.isfinite(total):
            return RewardFailure(reason=f"the weighted sum of the rewards is {total}")
        return RewardOutput(reward=total, parts=parts)


class _Misbehaved(Exception):
    """What a function did wrong, said in one line without its name."""

    def __init__(
        self, problem: str, *, advice: str = "correct it, or name another function", again: bool = False
    ) -> None:
        super().__init__(problem)
        self.advice = advice
        self.again = again
        """Whether fewer completions, or another form of them, may go better."""


class _Scored:
    """One function with its name and weight."""

    def __init__(self, name: str, function: RewardFunction, weight: float, calls: Calls) -> None:
        self.name = name
        self.weight = weight
        self._function = function
        self._calls = calls
        self._completions_as: Literal["text", "messages"] = "text"
        try:
            parameters = inspect.signature(function).parameters.values()
        except ValueError:
            raise RewardError(
                f"the parameters of the reward function {name} cannot be read: wrap it in a def"
            ) from None
        keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        self._takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
        self._takes = {parameter.name for parameter in parameters if parameter.kind in keyword}
        self._needs = {p.name for p in parameters if p.kind in keyword and p.default is inspect.Parameter.empty}
        if any(p.kind is inspect.Parameter.POSITIONAL_ONLY and p.default is p.empty for p in parameters):
            raise RewardError(
                f"the reward function {name} has parameters that cannot be given by name: write it as "
                f"def {name}(completions, **columns)"
            )

    def values(self, batch: Sequence[RewardInput]) -> list[float | RewardFailure | None]:
        """One value, or failure, for each completion."""
        try:
            return self._called(batch, self._completions_as)
        except _Misbehaved as problem:
            if problem.again and len(batch) > 1:
                return [value for one in batch for value in self.values([one])]
            return [RewardFailure(reason=f"{self.name} {problem}")] * len(batch)

    def probe(self, prompt: Prompt) -> None:
        # Twice the same completion, because a single number for the whole batch looks right when there is one.
        batch = [RewardInput(prompt=prompt, completion=TRIAL_COMPLETION, completion_ids=(0,))] * 2
        try:
            values = self._trial(batch)
        except RewardTimeout as error:
            raise RewardError(f"{error}: give what it waits for a deadline, or raise reward_timeout") from None
        except _Misbehaved as problem:
            raise RewardError(f"the reward function {self.name} {problem}: {problem.advice}") from problem.__cause__
        for value in values:
            if isinstance(value, RewardFailure):
                raise RewardError(
                    f"the reward function {value.reason}: return a finite number, or None if not applicable"
                )

    def _trial(self, batch: Sequence[RewardInput]) -> list[float | RewardFailure | None]:
        try:
            return self._called(batch, "text")
        except _Misbehaved as problem:
            if not problem.again or isinstance(batch[0].prompt.messages, str):
                raise
            try:
                values = self._called(batch, "messages")
            except _Misbehaved:
                raise problem from problem.__cause__
            self._completions_as = "messages"
            return values

    def _called(
        self, batch: Sequence[RewardInput], completions_as: Literal["text", "messages"]
    ) -> list[float | RewardFailure | None]:
        """Call the function once and check what it returns. Raises _Misbehaved."""
        arguments = self._arguments(batch, completions_as)
        try:
            result = self._calls.call(self.name, self._function, arguments)
        except RewardError:
            raise
        except ModuleNotFoundError as error:
            raise _Misbehaved(
                f"needs the module {error.name}, which is not installed", advice="install it, or name another function"
            ) from error
        except (Exception, SystemExit) as error:  # a verifier may run code that calls exit()
            raise _Misbehaved(f"raised {type(error).__name__}: {_line(error)}", again=True) from error
        values = result.tolist() if hasattr(result, "tolist") else result  # arrays and tensors
        if not isinstance(values, list | tuple):
            raise _Misbehaved(f"returned {_kind(result)}, not a list", advice=RIGHT_RESULT)
        if len(values) != len(batch):
            raise _Misbehaved(f"returned {len(values)} values for {len(batch)} completions", advice=RIGHT_RESULT)
        return [self._checked(value) for value in values]

    def _arguments(self, batch: Sequence[RewardInput], completions_as: Literal["text", "messages"]) -> dict[str, Any]:
        names = list(dict.fromkeys(name for item in batch for name in item.prompt.columns))
        missing = sorted(self._needs - {*names, *GIVEN})
        if missing:
            raise _Misbehaved(
                f"takes {', '.join(missing)}, and the data have the columns {', '.join(sorted(names)) or '(none)'}",
                advice="rename the column or the parameter, or give the parameter a default value",
            )
        arguments: dict[str, Any] = {name: [item.prompt.columns.get(name) for item in batch] for name in names}
        arguments["prompts"] = [_prompt(item.prompt) for item in batch]
        arguments["completions"] = [_completion(item, completions_as) for item in batch]
        arguments["completion_ids"] = [[int(token) for token in item.completion_ids] for item in batch]
        return arguments if self._takes_all else {n: value for n, value in arguments.items() if n in self._takes}

    def _checked(self, value: Any) -> float | RewardFailure | None:
        if value is None:
            return None
        try:
            # Text that looks like a number is a mistake; tensors and NumPy scalars are numbers.
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            number = math.nan
        if math.isfinite(number):
            return number
        return RewardFailure(reason=f"{self.name} returned {_kind(value)} for a completion, not a finite number")


def _prompt(prompt: Prompt) -> str | list[dict[str, str]]:
    return prompt.messages if isinstance(prompt.messages, str) else [dict(message) for message in prompt.messages]


def _completion(item: RewardInput, form: Literal["text", "messages"]) -> str | list[dict[str, str]]:
    if form == "text" or isinstance(item.prompt.messages, str):
        return item.completion
    return [{"role": "assistant", "content": item.completion}]


def _kind(value: object) -> str:
    return str(value) if value is None or isinstance(value, float) else type(value).__name__


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= REASON_LIMIT else text[:REASON_LIMIT] + "…"
