"""Reward functions: the built-in ones, how they are found, called and checked, and what happens when they fail."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncflow.config import DataConfig, RewardConfig
from asyncflow.data import load_problems
from asyncflow.errors import ConfigError, RewardError
from asyncflow.rewards import BUILT_IN, Reward, RewardFailure, RewardInput, RewardOutput, load_reward
from asyncflow.types import Prompt

TEXT = Prompt(messages="1 + 1?", columns={"answer": "2", "level": 3})
CHAT = Prompt(messages=({"role": "user", "content": "1 + 1?"},), columns={"answer": "2", "level": 3})


def inputs(*completions: str, prompt: Prompt = TEXT) -> list[RewardInput]:
    return [
        RewardInput(prompt=prompt, completion=text, completion_ids=np.arange(3, dtype=np.int32)) for text in completions
    ]


def score(function: Callable[..., Any], *completions: str, prompt: Prompt = TEXT) -> list[float | str]:
    """Rewards, or the reason of a failure."""
    reward = load_reward([function])
    with contextlib.closing(reward):
        return [
            result.reason if isinstance(result, RewardFailure) else result.reward
            for result in reward.score(inputs(*completions, prompt=prompt))
        ]


def refusal(function: Callable[..., Any], prompt: Prompt = TEXT) -> str:
    reward = load_reward([function])
    with contextlib.closing(reward), pytest.raises(RewardError) as caught:
        reward.probe(prompt)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Built-in functions


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("15 - 43 = -28", "-28", 1.0),
        ("23 - 60 = −37.", "-37", 1.0),
        ("It is 7-3", "3", 1.0),
        ("It is 7 - 3", "-3", 0.0),
        ("(4)-3", 3, 1.0),
        (r"\boxed{-3}", -3, 1.0),
        ("$1,234.50 in all", "1234.5", 1.0),
        ("1, 2, 3", "3", 1.0),
        ("about .5", 0.5, 1.0),
        ("12 apples", "#### 12", 1.0),
        ("12 and then 13", "12", 0.0),
        ("no number", "12", 0.0),
        ("", "12", 0.0),
        ("2.", "2.0", 1.0),
        ("0.1", 0.1, 1.0),
    ],
)
def test_last_number_compares_the_last_number_by_value(completion: str, answer: object, expected: float) -> None:
    assert BUILT_IN["last_number"](completions=[completion], answer=[answer]) == [expected]


def test_last_number_refuses_an_answer_without_a_number() -> None:
    assert score(BUILT_IN["last_number"], "12", prompt=Prompt(messages="?", columns={"answer": "none"})) == [
        "last_number raised ValueError: the answer 'none' holds no number"
    ]


def test_digit_share_is_the_share_of_digits() -> None:
    assert score(BUILT_IN["digit_share"], "1a2b", "", "12", "²ab") == [0.5, 0.0, 1.0, 0.0]


def test_math_verify_compares_mathematics_and_works_off_the_main_thread() -> None:
    prompt = Prompt(messages="?", columns={"answer": r"\frac{1}{2}"})
    found: list[list[float | str]] = []

    thread = threading.Thread(
        target=lambda: found.append(
            score(BUILT_IN["math_verify"], r"so $\boxed{0.5}$", "$2/4$", "$0.3$", "", prompt=prompt)
        )
    )
    thread.start()
    thread.join()

    assert found == [[1.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize("task", ["chain_sum", "needle_haystack", "prime_factorization", "rearc"])
def test_the_reasoning_gym_reward_asks_the_verifier_of_the_task(task: str) -> None:
    problems = load_problems(DataConfig(train=f"reasoning_gym:{task}", size=2), 0)
    prompt = problems.train[0]
    right = str(prompt.columns["answer"])

    rewards = score(BUILT_IN["reasoning_gym"], right, f"I think <answer> {right} </answer>", "nonsense", prompt=prompt)

    assert rewards[:2] == [1.0, 1.0]
    assert isinstance(rewards[2], float)
    assert rewards[2] < 0.5


# What a function gets


def test_a_function_gets_what_its_parameters_name() -> None:
    seen: dict[str, Any] = {}

    def only_some(completion_ids: list[list[int]], answer: list[str], missing: str = "default") -> list[float]:
        seen.update(completion_ids=completion_ids, answer=answer, missing=missing)
        return [0.0] * len(answer)

    assert score(only_some, "a", "b") == [0.0, 0.0]
    assert seen == {"completion_ids": [[0, 1, 2], [0, 1, 2]], "answer": ["2", "2"], "missing": "default"}
    assert type(seen["completion_ids"][0][0]) is int


def test_a_function_with_keyword_arguments_gets_everything() -> None:
    seen: dict[str, Any] = {}

    def everything(**given: Any) -> list[float]:
        seen.update(given)
        return [0.0]

    score(everything, "a")

    assert seen == {
        "prompts": ["1 + 1?"],
        "completions": ["a"],
        "completion_ids": [[0, 1, 2]],
        "answer": ["2"],
        "level": [3],
    }


def test_the_function_of_the_design_works_on_chat_prompts() -> None:
    def exact(completions, answer, **_):  # type: ignore[no-untyped-def]
        return [float(c.strip() == a) for c, a in zip(completions, answer, strict=True)]

    reward = load_reward([exact])
    reward.probe(CHAT)

    assert reward.score(inputs(" 2", "3", prompt=CHAT)) == [
        RewardOutput(reward=1.0, parts={"exact": 1.0}),
        RewardOutput(reward=0.0, parts={"exact": 0.0}),
    ]


def test_a_function_written_for_chat_messages_is_recognised_and_gets_them() -> None:
    seen: list[Any] = []

    def conversational(prompts: Any, completions: Any, **_: Any) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        seen.extend([prompts[0], completions[0]])
        return [float(len(text)) for text in texts]

    reward = load_reward([conversational])
    reward.probe(CHAT)
    seen.clear()

    assert reward.score(inputs("abc", prompt=CHAT)) == [RewardOutput(reward=3.0, parts={"conversational": 3.0})]
    assert seen == [[{"role": "user", "content": "1 + 1?"}], [{"role": "assistant", "content": "abc"}]]
    # TRL's rule: completions of text prompts are text.
    assert "string indices must be integers" in refusal(conversational, TEXT)


def test_asynchronous_functions_share_one_loop_also_when_called_from_another() -> None:
    loops = set()

    async def remote(completions: Sequence[str], **_: Any) -> list[float]:
        await asyncio.sleep(0)
        loops.add(asyncio.get_running_loop())
        return [float(len(text)) for text in completions]

    async def caller() -> list[RewardOutput | RewardFailure]:
        return reward.score(inputs("abc"))

    reward = load_reward([remote])
    with contextlib.closing(reward):
        reward.probe(TEXT)
        assert asyncio.run(caller()) == reward.score(inputs("abc")) == [RewardOutput(reward=3.0, parts={"remote": 3.0})]
    assert len(loops) == 1
    assert loops.pop().is_closed()
    reward.close()


def test_partial_functions_and_objects_are_functions_too() -> None:
    class Judge:
        def __call__(self, completions: Sequence[str], level: Sequence[int]) -> tuple[float, ...]:
            return tuple(float(value) for value in level)

    def scaled(completions: Sequence[str], factor: float) -> Any:
        return np.array([factor for _ in completions], dtype=np.float32)

    reward = load_reward([Judge(), functools.partial(scaled, factor=0.5), lambda completions: [1]])

    assert reward.names == ("Judge", "scaled", "lambda")
    assert reward.score(inputs("a")) == [RewardOutput(reward=4.5, parts={"Judge": 3.0, "scaled": 0.5, "lambda": 1.0})]


# How values become a reward


def test_the_reward_is_the_weighted_sum_of_the_functions_that_apply() -> None:
    def length(completions: Sequence[str]) -> list[float]:
        return [float(len(text)) for text in completions]

    def maybe(completions: Sequence[str]) -> list[float | None]:
        return [None if text == "skip" else 1.0 for text in completions]

    reward = Reward({"length": (length, 0.5), "maybe": (maybe, -2.0)})

    assert reward.score(inputs("abcd", "skip")) == [
        RewardOutput(reward=0.0, parts={"length": 4.0, "maybe": 1.0}),
        RewardOutput(reward=2.0, parts={"length": 4.0, "maybe": None}),
    ]


def test_a_completion_to_which_nothing_applies_fails() -> None:
    assert score(lambda completions: [None, 1.0], "a", "b") == ["no reward function applies: lambda returned None", 1.0]


def test_a_sum_that_overflows_fails() -> None:
    reward = Reward({"large": (lambda completions: [1e308], 100.0)})

    assert reward.score(inputs("a")) == [RewardFailure(reason="the weighted sum of the rewards is inf")]


def test_an_empty_batch_gives_nothing() -> None:
    assert load_reward([BUILT_IN["digit_share"]]).score([]) == []


# Failures are data


def test_only_the_completion_that_a_function_cannot_score_fails() -> None:
    def picky(completions: Sequence[str], **_: Any) -> list[float]:
        if "poison" in completions:
            raise KeyError("no such\nthing")
        return [1.0] * len(completions)

    assert score(picky, "a", "poison", "b") == [1.0, "picky raised KeyError: 'no such\\nthing'", 1.0]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_verifier_that_exits_fails_its_sample_and_nothing_else(asynchronous: bool) -> None:
    def verify(completions: Sequence[str]) -> list[float]:
        if "exit()" in completions:
            raise SystemExit(3)
        return [1.0] * len(completions)

    async def verify_later(completions: Sequence[str]) -> list[float]:
        return verify(completions)

    rewards = score(verify_later if asynchronous else verify, "exit()", "a")

    assert "SystemExit: 3" in str(rewards[0])
    assert rewards[1] == 1.0


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (np.float32("nan"), "float32"),
        ("1.0", "str"),
        ([1.0], "list"),
        (10**400, "int"),
        (1j, "complex"),
    ],
)
def test_what_is_not_a_finite_number_fails_its_sample(value: object, shown: str) -> None:
    assert score(lambda completions: [1.0, value, np.float32(0.5), True], "a", "b", "c", "d") == [
        1.0,
        f"lambda returned {shown} for a completion, not a finite number",
        0.5,
        1.0,
    ]


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ([1.0], "lambda returned 1 values for 2 completions"),
        (1.0, "lambda returned 1.0, not a list"),
        (None, "lambda returned None, not a list"),
        ("ab", "lambda returned str, not a list"),
        ({"a": 1, "b": 2}, "lambda returned dict, not a list"),
        (np.float32(1), "lambda returned float32, not a list"),
    ],
)
def test_a_result_of_the_wrong_shape_fails_the_whole_batch(result: object, reason: str) -> None:
    assert score(lambda completions: result, "a", "b") == [reason, reason]


def test_a_completion_fails_with_the_reasons_of_all_functions() -> None:
    def first(completions: Sequence[str]) -> list[float]:
        return [math.nan]

    def second(completions: Sequence[str]) -> list[float]:
        raise ValueError("bad")

    (failure,) = load_reward([first, second]).score(inputs("a"))

    assert failure == RewardFailure(
        reason="first returned nan for a completion, not a finite number; second raised ValueError: bad"
    )


def test_a_column_that_one_item_does_not_have_is_none_there() -> None:
    batch = [*inputs("a"), *inputs("b", prompt=Prompt(messages="?", columns={"level": 1}))]

    def fine(completions: Sequence[str], answer: Sequence[str | None]) -> list[float]:
        return [0.0 if value is None else 1.0 for value in answer]

    def strict(completions: Sequence[str], answer: Sequence[str]) -> list[float]:
        return [float(value) for value in answer]

    assert [getattr(result, "reward", None) for result in load_reward([fine]).score(batch)] == [1.0, 0.0]
    assert load_reward([strict]).score(batch) == [
        RewardOutput(reward=2.0, parts={"strict": 2.0}),
        RewardFailure(reason="strict takes answer, and the data have the columns level"),
    ]


def test_a_long_error_message_becomes_one_short_line() -> None:
    def long(completions: Sequence[str]) -> list[float]:
        raise ValueError("many\nlines\n" * 1000)

    (reason,) = score(long, "a")

    assert isinstance(reason, str)
    assert "\n" not in reason
    assert len(reason) < 400


# The trial before a run


def test_the_trial_accepts_what_works() -> None:
    for function in (BUILT_IN["last_number"], lambda completions: [None] * len(completions)):
        load_reward([function]).probe(CHAT)


def test_the_trial_names_what_is_wrong_and_what_would_be_right() -> None:
    def raises(completions: Sequence[str]) -> list[float]:
        raise ZeroDivisionError("division by zero")

    def needs(completions: Sequence[str], solution: Sequence[str]) -> list[float]:
        return []

    def uninstalled(completions: Sequence[str]) -> list[float]:
        import no_such_module_anywhere  # type: ignore[import-not-found] # noqa: F401

        return []

    assert refusal(raises) == (
        "the reward function raises raised ZeroDivisionError: division by zero: correct it, or name another function"
    )
    assert refusal(needs) == (
        "the reward function needs takes solution, and the data have the columns answer, level: "
        "rename the column or the parameter, or give the parameter a default value"
    )
    assert "needs the module no_such_module_anywhere, which is not installed: install it" in refusal(uninstalled)
    assert "returned nan for a completion" in refusal(lambda completions: [math.nan] * len(completions))
    assert "returned 1 values for 2 completions: return a list" in refusal(lambda completions: [1.0])
    assert "returned 0.5, not a list: return a list with one number" in refusal(lambda completions: 0.5)
    assert "returned None, not a list" in refusal(lambda completions: None)


def test_a_failure_on_chat_prompts_is_reported_as_it_was_with_text() -> None:
    def broken(completions: Any) -> list[float]:
        raise TypeError(f"got {completions[0]!r}")

    assert "got 'The answer is 1.'" in refusal(broken, CHAT)


# Names


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty current folder."""
    path = list(sys.path)
    with contextlib.chdir(tmp_path):
        yield tmp_path
    sys.path[:] = path


def test_short_names_and_weights_come_from_the_configuration() -> None:
    reward = load_reward([RewardConfig(use="last_number"), RewardConfig(use="digit_share", weight=0.5)])

    assert reward.names == ("last_number", "digit_share")
    assert reward.score(inputs("x2")) == [RewardOutput(reward=1.25, parts={"last_number": 1.0, "digit_share": 0.5})]


def test_a_single_function_needs_no_list() -> None:
    assert load_reward(BUILT_IN["digit_share"]).names == ("digit_share",)


def test_a_module_in_the_current_folder_is_found(folder: Path) -> None:
    (folder / "my_rewards_a.py").write_text(
        "class Judges:\n    @staticmethod\n    def strict(completions, **_): return [2.0 for _ in completions]\n"
        "def strict(completions): return [1.0 for _ in completions]\n"
    )

    reward = load_reward([RewardConfig(use="my_rewards_a:Judges.strict"), RewardConfig(use="my_rewards_a:strict")])

    # Two functions of the same name are told apart by where they come from.
    (result,) = reward.score(inputs("a"))
    assert result == RewardOutput(reward=3.0, parts={"my_rewards_a:Judges.strict": 2.0, "my_rewards_a:strict": 1.0})


@pytest.mark.parametrize(
    ("use", "error", "complaint"),
    [
        ("last_numbr", ConfigError, "there is no reward function 'last_numbr': did you mean last_number?"),
        (
            "zzz",
            ConfigError,
            "use one of digit_share, last_number, math_verify, reasoning_gym, string_check, or package.module:function",
        ),
        ("rewards.py:f", ConfigError, "there is no module rewards.py"),
        ("a/b.py:f", ConfigError, "there is no reward function 'a/b.py:f'"),
        (
            "no_such_module_x:f",
            ConfigError,
            "there is no module no_such_module_x, neither installed nor in the current",
        ),
        ("my_rewards_b:scor", ConfigError, "my_rewards_b has no scor: did you mean score?"),
        ("my_rewards_b:value", ConfigError, "value is no function: name one"),
        ("my_rewards_c:f", RewardError, "importing my_rewards_c raised ValueError: not today: correct the module"),
        ("my_rewards_d:f", RewardError, "importing my_rewards_d failed, it needs no_such_module_y: install it"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(folder: Path, use: str, error: type[Exception], complaint: str) -> None:
    (folder / "my_rewards_b.py").write_text("value = 3\ndef score(completions): return []\n")
    (folder / "my_rewards_c.py").write_text("raise ValueError('not\\ntoday')\n")
    (folder / "my_rewards_d.py").write_text("import no_such_module_y\n")

    with pytest.raises(error) as caught:
        load_reward([RewardConfig(use=use)])

    assert complaint in str(caught.value)


def test_functions_that_cannot_be_called_by_name_are_refused() -> None:
    def positional(completions: Sequence[str], /) -> list[float]:
        return []

    with pytest.raises(RewardError, match="cannot be given by name: write it as def positional"):
        load_reward([positional])
    with pytest.raises(ConfigError, match="named twice"):
        load_reward([RewardConfig(use="last_number"), RewardConfig(use="last_number")])
    with pytest.raises(ConfigError, match="at least one"):
        load_reward([])


def test_importing_rewards_loads_nothing_heavy() -> None:
    program = (
        "import sys, asyncflow.rewards\n"
        "heavy = 'torch', 'transformers', 'reasoning_gym', 'math_verify', 'sympy'\n"
        "print([name for name in heavy if name in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
