"""Which stages and columns fit together."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from asyncflow.errors import ConfigError, StoreError
from asyncflow.store.columns import conform
from asyncflow.store.schema import PROMPT_COLUMNS, Schema, Stage

ROLLOUT = Stage(name="rollout", role="generate", needs=PROMPT_COLUMNS, writes=("response_ids", "response"))
TRAIN = Stage(name="train", role="train", needs=("response_ids", "reward"))


def score(name: str, needs: tuple[str, ...], writes: tuple[str, ...] = ()) -> Stage:
    return Stage(name=name, role="score", needs=needs, writes=writes)


@pytest.mark.parametrize(
    ("others", "sentence"),
    [
        (
            [score("reward", ("reward_parts",), ("reward",)), score("parts", ("reward",), ("reward_parts",))],
            "in a circle: reward for reward_parts; parts for reward; train for reward",
        ),
        ([score("reward", ("response", "reward"), ("reward",))], "stage reward needs reward, which it writes itself"),
    ],
)
def test_stages_that_could_never_begin_are_refused(others: list[Stage], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Schema([ROLLOUT, *others, TRAIN])


def test_stages_may_be_named_in_any_order() -> None:
    reward = score("reward", ("reward_parts",), ("reward",))
    parts = score("parts", ("response",), ("reward_parts",))

    assert Schema([TRAIN, reward, parts, ROLLOUT]).needed == {"train", "reward", "parts", "rollout"}


def test_who_looks_on_is_not_needed_and_what_generating_needs_is() -> None:
    hint = score("hint", ("prompt",), ("reward_parts",))
    rollout = Stage(name="rollout", role="generate", needs=("prompt", "reward_parts"), writes=ROLLOUT.writes)
    reward, judge = score("reward", ("response",), ("reward",)), score("judge", ("response",), ("finish_reason",))

    schema = Schema([hint, rollout, reward, judge, score("look", ("response",)), TRAIN])

    assert schema.needed == {"hint", "rollout", "reward", "train"}


@pytest.mark.parametrize("name", ["prompt_ids", "response_ids", "token_versions"])
@pytest.mark.parametrize(
    "kind", [pa.int64(), pa.list_(pa.float32()), pa.large_list(pa.int32()), pa.list_(pa.int32(), 4)]
)
def test_a_column_with_a_meaning_is_a_list_of_integers(name: str, kind: pa.DataType) -> None:
    columns = {"question": pa.string(), "answer": pa.string(), "grade": pa.float32(), name: kind}
    stages = (
        Stage(name="make", role="generate", needs=("question",), writes=("answer",)),
        Stage(name="grade", role="score", needs=("answer",), writes=("grade",)),
        Stage(name="learn", role="train", needs=("answer", "grade")),
    )
    fitting: dict[str, Any] = {"prompt_columns": ("question", name), "token_columns": ()}

    with pytest.raises(ConfigError, match=f"column {name} is .*: make it a list of integers, or give it another name"):
        Schema(stages, columns=columns, **fitting)

    assert (
        Schema(stages, columns=columns | {name: pa.list_(pa.int64())}, **fitting).columns[name].value_type == pa.int64()
    )


@pytest.mark.parametrize("kind", [pa.large_list(pa.int32()), pa.list_(pa.int32(), 2), pa.list_(pa.list_(pa.int32()))])
def test_an_empty_value_in_any_list_is_refused(kind: pa.DataType) -> None:
    values: list[Any] = [[1, None], [2, 3]]
    if pa.types.is_list(kind):
        values = [values, [[4]]]
    batch = pa.RecordBatch.from_arrays([pa.array(values, kind)], names=["odds"])

    with pytest.raises(StoreError, match="column odds has 1 empty values"):
        conform(batch, {"odds": kind}, ["odds"])


def test_two_schemas_are_the_same_when_their_bits_are() -> None:
    stages = [ROLLOUT, score("reward", ("response",), ("reward",)), TRAIN]
    schema = Schema(stages)

    assert schema.is_as(Schema.from_json(schema.to_json()))
    assert not schema.is_as(Schema([*stages, score("look", ("response",))]))
    assert not schema.is_as(Schema(stages, columns=dict(reversed(schema.columns.items()))))
    assert not schema.is_as(Schema(stages, token_columns=()))
