"""Arrow streams from those who speak HTTP: they are read as they were meant and a run can use them, or are refused."""

from __future__ import annotations

import json
import random
import struct
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pytest
from asyncflow_api import exchange
from asyncflow_api.exchange import Room

from asyncflow.errors import StoreError
from asyncflow.store.columns import one_of_each
from asyncflow.store.frames import field_of, header_of
from asyncflow.store.ipc import MAX_ROWS, read_stream, write_stream
from asyncflow.store.schema import COLUMNS, Schema, Stage

ROUNDS: Final = 4000
"""Bodies of the seeded loop; a second or two."""
SCHEMA = Schema(
    [
        Stage(name="rollout", role="generate", needs=("prompt_ids",),
              writes=("response_ids", "rollout_logprobs", "token_versions", "response", "finish_reason")),
        Stage(name="reward", role="score", needs=("response",), writes=("reward", "reward_parts")),
        Stage(name="train", role="train", needs=("reward",)),
    ],
    columns={name: kind for name, kind in COLUMNS.items() if name != "ref_logprobs"},
)  # fmt: skip
ROOM = Room(vocabulary=100, prompt=3, response=2)
IDS = pa.RecordBatch.from_pydict({"sample_id": pa.array([1, 2])})


def of_type(kind: pa.DataType, value: int = 1) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([value], kind)], names=["sample_id"])


def without_bytes(kind: pa.DataType, *children: pa.Array) -> pa.RecordBatch:
    """A billion rows, none of which takes any."""
    buffers = [None, pa.py_buffer(b"")][: kind.num_buffers]
    rows = pa.Array.from_buffers(kind, 1 << 30, buffers, children=list(children))
    return pa.RecordBatch.from_arrays([rows], names=["sample_id"])


def big_endian() -> bytes:
    """A stream that says that its numbers are so, in a field that Arrow itself leaves out where they are not."""
    body = bytearray(write_stream(IDS))
    message = pa.ipc.MessageReader.open_stream(pa.py_buffer(bytes(body))).read_next_message()
    metadata = message.metadata.to_pybytes()
    begin = bytes(body).index(metadata)
    table = header_of(memoryview(metadata))
    entries = table - struct.unpack_from("<i", metadata, table)[0]
    one = next(at for at in range(table + 4, len(metadata), 2) if struct.unpack_from("<H", metadata, at)[0] == 1)
    struct.pack_into("<H", body, begin + entries + 4, one - table)
    assert field_of(memoryview(bytes(body))[begin:], table, 0) == one
    return bytes(body)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (write_stream(IDS) + write_stream(IDS), "behind its end"),
        (write_stream(IDS) + b"\0" * 8, "behind its end"),
        (write_stream(IDS.replace_schema_metadata({"a": "x" * (1 << 22)})), "its schema has"),
        (write_stream(without_bytes(pa.binary(0))), "no length"),
        (write_stream(without_bytes(pa.list_(pa.int32(), 0), pa.array([], pa.int32()))), "no length"),
        (write_stream(pa.RecordBatch.from_pydict({"sample_id": np.zeros(MAX_ROWS + 1, bool)})), "more than"),
        (big_endian(), "big-endian"),
    ],
    ids=["two", "bytes behind it", "metadata", "no bytes", "empty lists", "rows", "big-endian"],
)
def test_a_stream_that_would_be_misread_is_refused(body: bytes, says: str) -> None:
    with pytest.raises(StoreError, match=says):
        read_stream(body)


@pytest.mark.parametrize(
    "kind",
    [pa.timestamp("s", tz="Nowhere/Town"), pa.timestamp("s"), pa.duration("s"), pa.bool_(), pa.float64(), pa.string()],
    ids=str,
)
def test_ids_that_are_no_whole_numbers_are_refused_before_python_makes_values_of_them(kind: pa.DataType) -> None:
    whole = pa.RecordBatch.from_pydict({"reward": [0.5], "reward_parts": ["{}"]})
    if pa.types.is_string(kind) or pa.types.is_boolean(kind):
        ids = pa.array([1]).cast(kind)
    elif pa.types.is_floating(kind):
        ids = pa.array([1.0])
    else:
        ids = pa.array([1 << 62], pa.int64()).view(kind)
    batch = pa.RecordBatch.from_arrays([ids, *whole.columns], names=["sample_id", *whole.schema.names])

    with pytest.raises(StoreError, match="whole numbers"):
        exchange.acked_in(read_stream(write_stream(batch)), SCHEMA, "reward")


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("prompt", "x", "text or chat messages"),
        ("prompt", "5", "text or chat messages"),
        ("prompt", '""', "text or chat messages"),
        ("prompt", '[{"role": "user"}]', "text or chat messages"),
        ("prompt_columns", "[]", "an object"),
        ("prompt_columns", '{"a": NaN}', "an object"),
        ("prompt_columns", '{"a": 1e999}', "an object"),
        ("prompt_columns", '{"a": ' * 5000 + "1" + "}" * 5000, "an object"),
        ("reward_parts", '{"a": "b"}', "an object of numbers"),
        ("reward", float("nan"), "not finite"),
        ("reward", 1e39, "not finite"),
        ("rollout_logprobs", [-1.0, float("-inf")], "not finite"),
        ("prompt_ids", [], "empty"),
        ("prompt_ids", [1, -1], "below 0"),
        ("prompt_ids", [1, 100], "below 100"),
        ("prompt_ids", [1, 2, 3, 4], "at most 3"),
        ("prompt_ids", [1, 1 << 40], "must be list"),
        ("prompt_ids", [True, False], "must be list"),
        ("response_ids", [1, 2, 3], "at most 2"),
    ],
)
def test_a_value_that_would_end_the_run_is_refused_with_its_row(column: str, value: Any, says: str) -> None:
    good: dict[str, Any] = {
        "prompt": json.dumps("x"),
        "prompt_columns": "{}",
        "reward_parts": '{"a": 0.5, "b": null}',
        "reward": 1.0,
        "rollout_logprobs": [-1.0],
        "prompt_ids": [99],
        "response_ids": [0, 1],
    }
    assert len(exchange.checked(pa.RecordBatch.from_pydict({column: [good[column]]}), SCHEMA, ROOM)) == 1
    rows = [value] if isinstance(value, list) and value and value[0] is True else [good[column], value]

    with pytest.raises(StoreError, match=f"(of row 1|column {column}).* {says}"):
        exchange.checked(pa.RecordBatch.from_pydict({column: rows}), SCHEMA, ROOM)


def test_a_long_prompt_is_not_copied_for_each_sample_that_should_have_it() -> None:
    batch = pa.RecordBatch.from_pydict({"prompt": ["x" * (1 << 22)] + ["x"] * 63})
    usual, counted = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(counted)
    try:
        with pytest.raises(StoreError, match="to be the same"):
            one_of_each(batch, 64)
    finally:
        pa.set_memory_pool(usual)

    most = counted.max_memory()
    assert most is not None
    assert most < 1 << 24
    same = pa.RecordBatch.from_pydict({"prompt": ["a", "a", "b", "b"]})
    assert one_of_each(same, 2).to_pydict() == {"prompt": ["a", "b"]}


def test_streams_with_bytes_that_were_changed_are_read_or_refused_and_nothing_else() -> None:
    chance = random.Random(7)
    rows = {
        "prompt": ['"x"', '"x"', '"longer"', '"longer"'],
        "prompt_columns": ["{}"] * 4,
        "prompt_ids": [[1, 2], [1, 2], [3], [3]],
        "response_ids": [[4, 5], [6], [], [7]],
        "rollout_logprobs": [[-1.0, -2.0], [-1.0], [], [-0.5]],
        "reward": [1.0, None, 0.0, 0.5],
    }
    ids = {"sample_id": [1, 2, 3, 4], "reward": [1.0, 0.0, 0.5, 1.0], "reward_parts": ["{}"] * 4}
    bodies = [write_stream(pa.RecordBatch.from_pydict(one)) for one in (rows, ids)]
    read = 0
    for _ in range(ROUNDS):
        body = _changed(chance.choice(bodies), chance)
        try:
            batch = read_stream(body)
            if "sample_id" in batch.schema.names:
                exchange.acked_in(batch, SCHEMA, "reward")
                continue
            prompts, samples = exchange.split(batch, SCHEMA, 2)
            for part in (prompts, samples):
                if part is not None:
                    exchange.checked(part, SCHEMA, ROOM)
            read += 1
        except StoreError:
            continue
    assert read < ROUNDS


def _changed(body: bytes, chance: random.Random) -> bytes:
    """Flipped, cut, doubled, or with a number that somebody has forged."""
    found = bytearray(body)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(found))
        match chance.randrange(6):
            case 0 | 1:
                found[at] ^= 1 << chance.randrange(8)
            case 2:
                found[at] = chance.randrange(256)
            case 3:
                number = chance.choice((-1, 0, 1, 1 << 31, (1 << 31) - 1, (1 << 63) - 1, -(1 << 63), 1 << 40))
                at -= at % 8
                found[at : at + 8] = struct.pack("<q", number)[: len(found) - at]
            case 4:
                del found[at : at + chance.randrange(64)]
            case 5:
                found[at:at] = found[at : at + chance.randrange(64)]
        if not found:
            return b""
    return bytes(found)
