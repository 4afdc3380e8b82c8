"""Reward functions that are made from settings: a configuration says what they compare, and no code is named.

    reward: [{use: string_check, options: {input: "{{sample.output_text}}", reference: "{{item.answer}}",
              operation: eq}}]

Templates are those of OpenAI's graders (https://platform.openai.com/docs/guides/graders), of which a small part is
taken: `{{sample.output_text}}` is the completion, `{{item.a}}` a column of the data, `{{item.a.b}}` an entry of an
object in one. Nothing in them is evaluated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from asyncflow.errors import ConfigError
from asyncflow.rewards.functions import RewardFunction

PLACE: Final = re.compile(r"\{\{([^{}]*)\}\}")
COLUMN: Final = re.compile(r"item((?:\.\w+)+)")
OUTPUT: Final = "sample.output_text"

OPERATIONS: Final[Mapping[str, Callable[[str, str], bool]]] = {
    "eq": lambda given, reference: given == reference,
    "ne": lambda given, reference: given != reference,
    "like": lambda given, reference: reference in given,
    "ilike": lambda given, reference: reference.casefold() in given.casefold(),
}


def string_check(*, input: object = None, reference: object = None, operation: object = None) -> RewardFunction:
    """A function that gives 1.0 where the operation holds, else 0.0.

    `eq` and `ne` compare as it is; `like` looks for the reference within the input, `ilike` without regard to case.
    Raises ConfigError, one sentence, for settings that cannot be.
    """
    if not isinstance(operation, str) or operation not in OPERATIONS:
        raise ConfigError(f"reward string_check: operation must be one of {', '.join(OPERATIONS)}, not {operation!r}")
    holds = OPERATIONS[operation]
    left, right = Template("input", input), Template("reference", reference)

    def string_check(completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        rewards = []
        for index, completion in enumerate(completions):
            item = {name: values[index] for name, values in columns.items()}
            rewards.append(float(holds(left.filled(completion, item), right.filled(completion, item))))
        return rewards

    return string_check


MADE: Final[Mapping[str, Callable[..., RewardFunction]]] = {"string_check": string_check}
"""Short names that a configuration may use together with `options`."""


class Template:
    """Text with places for the completion and for columns."""

    def __init__(self, name: str, text: object) -> None:
        """Raises ConfigError for a place that is neither; `name` is that of the setting."""
        if not isinstance(text, str):
            raise ConfigError(f"reward string_check: {name} must be text, such as {{{{{OUTPUT}}}}}")
        if "{{" in PLACE.sub("", text):
            raise ConfigError(f"reward string_check: {name} has {{{{ that nothing closes: write {{{{{OUTPUT}}}}}")
        self._text = text
        self.columns: frozenset[str] = frozenset(_columns(name, PLACE.findall(text)))
        """Columns of the data that it needs."""

    def filled(self, completion: str, item: Mapping[str, Any]) -> str:
        """Raises ValueError for an item that has not what is needed."""

        def value(place: re.Match[str]) -> str:
            name = place[1].strip()
            return completion if name == OUTPUT else _text_of(name, item)

        return PLACE.sub(value, self._text)


def _columns(name: str, places: Iterable[str]) -> Iterable[str]:
    for place in map(str.strip, places):
        if place == OUTPUT:
            continue
        if COLUMN.fullmatch(place) is None:
            raise ConfigError(
                f"reward string_check: {name} has {{{{{place[:60]}}}}}: write {{{{{OUTPUT}}}}} for the completion, "
                "{{item.NAME}} for a column of the data, and nothing else"
            )
        yield place.split(".")[1]


def _text_of(place: str, item: Mapping[str, Any]) -> str:
    value: Any = item
    for name in place.split(".")[1:]:
        value = value.get(name) if isinstance(value, Mapping) else None
        if value is None:
            raise ValueError(f"the item has no {place}")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
