"""The reward functions that come with AsyncFlow, in the same signature as those that users write.

A function gets lists with one entry for each completion, by name: what it can ask for is described in
`asyncflow.rewards.reward`. It returns one number (or None: not applicable) for each completion.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from functools import cache
from typing import Any

RewardFunction = Callable[..., Any]

NUMBER = re.compile(
    r"(?:(?<![\w)\]])-)?"  # a sign
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"  # 1,234.5 or 1234.5
    r"|(?<![0-9])\.[0-9]+)"  # .5
)


def last_number(completions: Sequence[str], answer: Sequence[Any], **_: Any) -> list[float]:
    """1.0 where the last number of the completion equals the answer, else 0.0.

    Numbers are compared by value: `1,234.50` equals `1234.5`. A minus directly after a word or a bracket is a
    subtraction (`7-3` ends in 3). Of an answer with more text (`… #### 72`) the last number counts.
    Raises ValueError when the answer holds no number.
    """
    rewards = []
    for completion, expected in zip(completions, answer, strict=True):
        right = _last(str(expected))
        if right is None:
            raise ValueError(f"the answer {expected!r} holds no number")
        rewards.append(float(_last(completion) == right))
    return rewards


def _last(text: str) -> Decimal | None:
    found = NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return Decimal(found[-1].replace(",", "")) if found else None


def digit_share(completions: Sequence[str], **_: Any) -> list[float]:
    """Share of the completion's characters that are digits, 0.0 when it is empty.

    A reward for models that know nothing: even random characters earn some of it, and more is easy to learn.
    """
    return [sum("0" <= character <= "9" for character in text) / max(1, len(text)) for text in completions]


def reasoning_gym(
    completions: Sequence[str],
    question: Sequence[str],
    answer: Sequence[Any],
    source_dataset: Sequence[str],
    **columns: Any,
) -> list[float]:
    """The score (0 to 1) of the task's own verifier, for prompts that come from `reasoning_gym:<task>`.

    What is scored is the text in the last `<answer>…</answer>` of the completion, or all of it when there is none.
    Tasks are scored as their default options define them. Source: reasoning-gym, `score_answer`.
    """
    rewards = []
    for index, completion in enumerate(completions):
        entry = {
            "question": question[index],
            "answer": answer[index],
            "metadata": {name: values[index] for name, values in columns.items()},
        }
        rewards.append(_verified(source_dataset[index], _final_answer(completion), entry))
    return rewards


TASKS_WITH_TUPLES = ("arc_agi", "rearc")
"""Tasks whose verifier compares tuples; the columns of a prompt are JSON, where they have become lists."""


def _verified(task: str, answer: str, entry: Mapping[str, Any]) -> float:
    score = _verifier(task)
    if task in TASKS_WITH_TUPLES:
        entry = _tuples(entry)
    try:
        return float(score(answer, entry))
    except Exception:
        # Some verifiers raise on answers that they cannot parse. Only when the right answer (None where there are many)
        # is scored without complaint is the completion at fault, and worth nothing; else the item is.
        score(entry["answer"], entry)
        return 0.0


@cache
def _verifier(task: str) -> Callable[[str | None, Mapping[str, Any]], float]:
    from reasoning_gym import get_score_answer_fn

    verifier: Callable[[str | None, Mapping[str, Any]], float] = get_score_answer_fn(task)
    return verifier


def _final_answer(completion: str) -> str:
    tagged = re.findall(r"<answer>(.*?)</answer>", completion, flags=re.DOTALL)
    return str(tagged[-1] if tagged else completion).strip()


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def math_verify(completions: Sequence[str], answer: Sequence[Any], **_: Any) -> list[float | None]:
    """1.0 where the completion's mathematical answer equals the expected one symbolically, else 0.0.

    Both may be LaTeX or plain expressions; a `\\boxed{}` in the completion has precedence. None (not applicable) when
    the expected answer cannot be parsed, which is no fault of the completion. Source: math-verify, `parse`, `verify`.
    """
    from math_verify import parse, verify

    rewards: list[float | None] = []
    for completion, expected in zip(completions, answer, strict=True):
        # Its own time limits work by signals, which only reach the main thread: they are switched off.
        text = str(expected)
        right = parse(text if "$" in text or "\\boxed" in text else f"${text}$", parsing_timeout=None)
        if not right:
            rewards.append(None)
            continue
        given = parse(completion, parsing_timeout=None)
        rewards.append(float(verify(right, given, timeout_seconds=None)))
    return rewards


BUILT_IN: Mapping[str, RewardFunction] = {
    "digit_share": digit_share,
    "last_number": last_number,
    "math_verify": math_verify,
    "reasoning_gym": reasoning_gym,
}
"""Short names that a configuration may use."""
