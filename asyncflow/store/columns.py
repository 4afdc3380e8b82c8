"""Columns on their way into the store: in their types, complete, and as long as each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from asyncflow.errors import StoreError
from asyncflow.store.frames import is_list

PROMPT_IDS, RESPONSE_IDS, TOKEN_VERSIONS = "prompt_ids", "response_ids", "token_versions"
"""Columns with a meaning: their lengths are counted as tokens, and the versions bound the staleness. A schema may do
without them."""


def conform(batch: pa.RecordBatch, types: Mapping[str, pa.DataType], expected: Sequence[str]) -> pa.RecordBatch:
    """The batch with exactly the expected columns, in their types. Raises StoreError naming what does not fit."""
    names = batch.schema.names
    if names == list(expected) and all(_is_right(batch.column(i), types.get(name)) for i, name in enumerate(names)):
        return batch
    missing = [name for name in expected if name not in names]
    unknown = [name for name in names if name not in types or name not in expected]
    twice = sorted({name for name in names if names.count(name) > 1})
    if missing or unknown or twice:
        wrong = {"missing": missing, "not expected": unknown, "there twice": twice}
        found = "; ".join(f"{', '.join(names)} {what}" for what, names in wrong.items() if names)
        raise StoreError(f"columns do not fit: {found}")
    arrays = [_conform_array(name, batch.column(name), types[name]) for name in expected]
    return pa.RecordBatch.from_arrays(arrays, names=list(expected))


def _is_right(array: pa.Array, wanted: pa.DataType | None) -> bool:
    """Whether there is nothing to do, as far as can be seen at a glance."""
    return array.type == wanted and not _empty_values(array)


def _conform_array(name: str, array: pa.Array, wanted: pa.DataType) -> pa.Array:
    if array.type != wanted:
        try:
            array = array.cast(wanted)
        except pa.ArrowException as error:
            raise StoreError(f"column {name} must be {wanted}, not {array.type}: {error}") from None
    if empty := _empty_values(array):
        raise StoreError(f"column {name} has {empty} empty values: every sample and token needs one")
    return array


def _empty_values(array: pa.Array) -> int:
    """How many of the values are empty, or of the values in its lists."""
    kind = array.type
    if array.null_count or not is_list(kind):
        return int(array.null_count)
    if not array.values.null_count and not is_list(kind.value_type):
        return 0  # nor in the part that is in these lists, which takes longer to cut out
    return _empty_values(array.flatten())


def lengths(lists: pa.ListArray) -> NDArray[np.int64]:
    """How many values each list has."""
    found: NDArray[np.int64] = np.diff(lists.offsets.to_numpy()).astype(np.int64)
    return found


def same_lengths(batch: pa.RecordBatch, token_columns: Sequence[str]) -> None:
    """Columns with a value for each response token must agree on how many there are. Raises StoreError."""
    found = {name: lengths(batch.column(name)) for name in token_columns if name in batch.schema.names}
    for name, counts in found.items():
        first = next(iter(found))
        if not np.array_equal(counts, found[first]):
            raise StoreError(f"columns {first} and {name} do not have the same number of tokens in each sample")


def prompt_tokens(prompts: pa.RecordBatch) -> list[int]:
    """Of each prompt; 0 where the schema does not say."""
    if PROMPT_IDS not in prompts.schema.names:
        return [0] * len(prompts)
    return _counts(prompts.column(PROMPT_IDS))


def about_tokens(columns: pa.RecordBatch) -> dict[str, Any]:
    """What the broker has to know of new responses: `tokens`, and the `oldest` and `newest` version of each."""
    about: dict[str, Any] = {}
    if RESPONSE_IDS in columns.schema.names:
        about["tokens"] = _counts(columns.column(RESPONSE_IDS))
    if TOKEN_VERSIONS in columns.schema.names:
        about["oldest"], about["newest"] = _version_span(columns.column(TOKEN_VERSIONS))
    return about


def _counts(lists: pa.ListArray) -> list[int]:
    counts: list[int] = lengths(lists).tolist()
    return counts


def _version_span(versions: pa.ListArray) -> tuple[list[int | None], list[int | None]]:
    """Oldest and newest packed version in each row."""
    offsets, values = versions.offsets.to_numpy(), versions.values.to_numpy()
    spans = [values[begin:end] for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    return (
        [int(span.min()) if len(span) else None for span in spans],
        [int(span.max()) if len(span) else None for span in spans],
    )


def one_of_each(prompts: pa.RecordBatch, size: int) -> pa.RecordBatch:
    """The prompt of each group of rows. Raises StoreError where they differ within a group."""
    if len(prompts) % size:
        raise StoreError(f"{len(prompts)} rows are not whole groups of {size} samples")
    first = np.arange(0, len(prompts), size)
    found = prompts.take(pa.array(first))
    # Place by place: all at once, a long prompt with short ones behind it would be copied for each of them.
    if not all(prompts.take(pa.array(first + place)).equals(found) for place in range(1, size)):
        raise StoreError(f"the prompts of each {size} rows in a row are to be the same: they are one group")
    return found
