"""Samples between the store and those who speak HTTP: rows in JSON, or columns in Arrow.

In JSON a value looks as people write it: prompts and their columns are text, lists and objects, policy versions are
`"0.12"`. In Arrow the columns are those of the store (`asyncflow.store.schema`).

Both end as columns whose values are looked at here, one by one: the workers of a run read them as they read their own,
and what they could not read would end it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
from asyncflow_api.limits import check_json
from asyncflow_api.problems import Problem

from asyncflow.errors import StoreError
from asyncflow.store.client import Lease
from asyncflow.store.columns import PROMPT_IDS, RESPONSE_IDS, conform, one_of_each
from asyncflow.store.frames import is_list
from asyncflow.store.schema import Schema
from asyncflow.types import PolicyVersion

Rows = Sequence[Mapping[str, Any]]
ABOUT = ("sample_id", "group_id", "attempt")
"""What a leased row says about itself."""
LONGEST_TEXT: Final = 80
"""Characters of a value that a refusal quotes."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a run can read. None: it does not say."""

    vocabulary: int | None = None
    """Token ids are below it."""
    prompt: int | None = None
    """Tokens of the longest prompt."""
    response: int | None = None
    """Tokens of the longest response."""


def columns_of(rows: Rows, names: Sequence[str], types: Mapping[str, pa.DataType], *, what: str) -> pa.RecordBatch:
    """Rows as columns of these names. Raises StoreError naming the row and what is wrong with it."""
    for place, row in enumerate(rows):
        if missing := [name for name in names if name not in row]:
            raise StoreError(f"{what} {place} lacks {', '.join(missing)}: each one has {', '.join(names)}")
        if unknown := [name for name in row if name not in names]:
            raise StoreError(f"{what} {place} has {unknown[0]!r}, which is not expected: write {', '.join(names)}")
    return pa.RecordBatch.from_arrays([_array(name, rows, types[name], what) for name in names], names=list(names))


def _array(name: str, rows: Rows, kind: pa.DataType, what: str) -> pa.Array:
    make = _IN.get(name, lambda value: value)
    values = []
    for place, row in enumerate(rows):
        try:
            value = make(row[name])
            # One by one, so that the refusal says which; a value that is left out would be a null.
            if value is None or (isinstance(value, list) and None in value):
                raise ValueError("it has no value")
            pa.array([value], kind)
        except (ValueError, TypeError, OverflowError, AttributeError, pa.ArrowException) as error:
            raise StoreError(f"{name} of {what} {place} is no {kind}: {error}") from None
        values.append(value)
    return pa.array(values, kind)


def prompts_of(rows: Rows, schema: Schema, tokenise: Callable[[list[Any]], Sequence[Sequence[int]]]) -> pa.RecordBatch:
    """Prompts in JSON; those without `prompt_ids` are made into tokens by `tokenise`. Raises StoreError."""
    whole = [{"prompt_columns": {}, **row} for row in rows]
    bare = [row for row in whole if "prompt_ids" not in row]
    for place, row in enumerate(whole):
        _check_prompt(row.get("prompt"), place)
    for row, ids in zip(bare, tokenise([row["prompt"] for row in bare]) if bare else (), strict=True):
        row["prompt_ids"] = ids
    return columns_of(whole, schema.prompt_columns, schema.columns, what="prompt")


def _check_prompt(prompt: Any, place: int) -> None:
    if not _is_prompt(prompt):
        raise StoreError(f"prompt {place} is neither text nor chat messages: write `prompt` as one of the two")


def _is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return bool(prompt)
    if not isinstance(prompt, list) or not prompt:
        return False
    fields = [set(message) for message in prompt if isinstance(message, dict)]
    texts = [value for message in prompt if isinstance(message, dict) for value in message.values()]
    return fields == [{"role", "content"}] * len(prompt) and all(isinstance(text, str) for text in texts)


def finished_of(
    rows: Rows, schema: Schema, group_size: int, tokenise: Callable[[list[Any]], Sequence[Sequence[int]]]
) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """Finished samples in JSON, as the prompts of their groups and their own columns. Raises StoreError."""
    about = [{name: value for name, value in row.items() if name in schema.prompt_columns} for row in rows]
    made = [{name: value for name, value in row.items() if name not in schema.prompt_columns} for row in rows]
    names = [name for name in schema.columns if made and name in made[0]]
    if not names:
        raise StoreError("finished samples have the columns of the stages that made them, such as response_ids")
    samples = columns_of(made, names, schema.columns, what="sample")
    return one_of_each(prompts_of(about, schema, tokenise), group_size), samples


def split(batch: pa.RecordBatch, schema: Schema, group_size: int) -> tuple[pa.RecordBatch, pa.RecordBatch | None]:
    """Columns in Arrow: prompts alone, a row each, or with what was made of them, a row a sample. Raises StoreError."""
    check_names(batch, schema)
    names = batch.schema.names
    prompts = batch.select([name for name in schema.prompt_columns if name in names])
    samples = batch.select([name for name in names if name not in schema.prompt_columns])
    if not samples.num_columns:
        return prompts, None
    return (one_of_each(prompts, group_size) if group_size > 1 else prompts), samples


def check_names(batch: pa.RecordBatch, schema: Schema, *more: str) -> None:
    """Raises StoreError for columns that the store does not have, and for one that comes twice."""
    names = batch.schema.names
    if unknown := [name for name in names if name not in (*schema.columns, *more)]:
        raise StoreError(
            f"there is no column {unknown[0][:64]!r}; the columns are {', '.join((*more, *schema.columns))}"
        )
    if len(set(names)) < len(names):
        raise StoreError("a column comes twice: send each once")


def checked(batch: pa.RecordBatch, schema: Schema, room: Room) -> pa.RecordBatch:
    """Columns of the store in their types, whose values a run can use. Raises StoreError naming the first row that it
    cannot."""
    for field in batch.schema:
        if pa.types.is_boolean(_inmost(field.type)) != pa.types.is_boolean(_inmost(schema.columns[field.name])):
            raise StoreError(f"column {field.name} must be {schema.columns[field.name]}, not {field.type}")
    batch = conform(batch, schema.columns, batch.schema.names)
    for name in batch.schema.names:
        column = batch.column(name)
        if name in (PROMPT_IDS, RESPONSE_IDS):
            _check_tokens(name, column, room.vocabulary, room.prompt if name == PROMPT_IDS else room.response)
        elif pa.types.is_floating(_inmost(column.type)):
            # Also one that was finite in JSON, and is too large for the store.
            _check_rows(name, column, pc.is_finite, "a number that is not finite")
        elif (meant := _MEANT.get(name)) is not None:
            _check_json_texts(name, column, meant)
    return batch


def _inmost(kind: pa.DataType) -> pa.DataType:
    return _inmost(kind.value_type) if is_list(kind) else kind


def _check_tokens(name: str, column: pa.ListArray, vocabulary: int | None, longest: int | None) -> None:
    lengths = pc.list_value_length(column)
    for row, length in enumerate(lengths.to_pylist()):
        if not length:
            raise StoreError(f"{name} of row {row} is empty: send at least one token")
        if longest is not None and length > longest:
            raise StoreError(f"{name} of row {row} has {length} tokens: this run takes at most {longest}")
    _check_rows(name, column, lambda values: pc.greater_equal(values, 0), "a number below 0, which is no token")
    if vocabulary is not None:
        text = f"a token that there is not: they are below {vocabulary}"
        _check_rows(name, column, lambda values: pc.less(values, vocabulary), text)


def _check_rows(name: str, column: pa.Array, good: Callable[[pa.Array], pa.Array], says: str) -> None:
    """Whether every value is good, of numbers or lists of them. Raises StoreError."""
    nested = is_list(column.type)
    place = pc.index(good(column.flatten() if nested else column), False).as_py()
    if place >= 0:
        row = pc.list_parent_indices(column)[place].as_py() if nested else place
        raise StoreError(f"{name} of row {row} has {says}")


def _check_json_texts(name: str, column: pa.StringArray, meant: tuple[Callable[[Any], bool], str]) -> None:
    is_right, says = meant
    for row, text in enumerate(column.to_pylist()):
        try:
            check_json(text.encode())
            right = is_right(json.loads(text))
        except Problem:
            right = False
        if not right:
            raise StoreError(f"{name} of row {row} is {text[:LONGEST_TEXT]!r}, and must be JSON of {says}")


def acked_of(rows: Rows, schema: Schema, stage: str) -> tuple[list[int], pa.RecordBatch | None]:
    """What a worker brings in JSON. Raises StoreError."""
    ids = _ids([row.get("sample_id") for row in rows])
    writes = schema.stages[stage].writes
    made = [{name: value for name, value in row.items() if name != "sample_id"} for row in rows]
    columns = columns_of(made, writes, schema.columns, what="sample")
    return ids, columns if writes else None


def acked_in(batch: pa.RecordBatch, schema: Schema, stage: str) -> tuple[list[int], pa.RecordBatch | None]:
    """The same in Arrow, with a column `sample_id`. Raises StoreError."""
    check_names(batch, schema, "sample_id")
    writes = schema.stages[stage].writes
    if missing := [name for name in ("sample_id", *writes) if name not in batch.schema.names]:
        raise StoreError(f"the column {missing[0]} is missing: send sample_id, {', '.join(writes)}")
    if not pa.types.is_integer(batch.schema.field("sample_id").type):
        raise StoreError("sample_id must be whole numbers: take them from the lease")
    ids = _ids(batch.column("sample_id").to_pylist())
    return ids, batch.select(list(writes)) if writes else None


def _ids(values: Sequence[Any]) -> list[int]:
    if not all(type(value) is int and 0 <= value < 1 << 63 for value in values):
        raise StoreError("sample_id is the number of a sample: take it from the lease")
    if len(set(values)) < len(values):
        raise StoreError("a sample comes twice: send each once")
    return list(values)


def rows_of(lease: Lease) -> list[dict[str, Any]]:
    """A lease in JSON."""
    rows = lease.data.to_pylist()
    for name in lease.data.schema.names:
        if (show := _OUT.get(name)) is not None:
            for row in rows:
                row[name] = show(row[name])
    return [
        {"sample_id": about.sample_id, "group_id": about.group_id, "attempt": about.attempt, **row}
        for about, row in zip(lease.rows, rows, strict=True)
    ]


def batch_of(lease: Lease) -> pa.RecordBatch:
    """A lease in Arrow."""
    about = [pa.array(lease.sample_ids), pa.array(lease.group_ids), pa.array(lease.attempts)]
    return pa.RecordBatch.from_arrays([*about, *lease.data.columns], names=[*ABOUT, *lease.data.schema.names])


def _object(value: Any) -> str:
    if not isinstance(value, dict):
        raise TypeError("write an object")
    return json.dumps(value)


def _parts(value: Any) -> str:
    if not _is_parts(value):
        raise TypeError("write an object of numbers")
    return json.dumps(value)


def _is_parts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(part, int | float | None) for part in value.values())


def _versions(value: Any) -> list[int]:
    if not isinstance(value, list) or not all(isinstance(version, str) for version in value):
        raise TypeError('write one version for each token, such as "0.12"')
    return [PolicyVersion.parse(version).packed for version in value]


_IN: Mapping[str, Callable[[Any], Any]] = {
    "prompt": json.dumps,
    "prompt_columns": _object,
    "reward_parts": _parts,
    "token_versions": _versions,
}
"""Column → how its value is kept."""
_OUT: Mapping[str, Callable[[Any], Any]] = {
    "prompt": json.loads,
    "prompt_columns": json.loads,
    "reward_parts": json.loads,
    "token_versions": lambda packed: [str(PolicyVersion.unpack(version)) for version in packed],
}
"""Column → how its value is shown."""
_MEANT: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "prompt": (_is_prompt, "text or chat messages"),
    "prompt_columns": (lambda value: isinstance(value, dict), "an object"),
    "reward_parts": (_is_parts, "an object of numbers"),
}
"""Column of texts → whether what one says in JSON is right, and what that would be."""
