"""Columns as torch tensors."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
import torch

from asyncflow.algorithms.jagged import tensors


def batch_of(**columns: pa.Array) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))


@pytest.mark.parametrize("dtype", [pa.int64(), pa.int32(), pa.float32()], ids=str)
def test_lists_are_a_nested_tensor_of_the_same_memory(dtype: pa.DataType) -> None:
    column = pa.array([[1, 2, 3], [], [4, 5]], pa.list_(dtype))

    tensor = tensors(batch_of(ids=column))["ids"]

    assert [row.tolist() for row in tensor.unbind()] == [[1, 2, 3], [], [4, 5]]
    assert tensor.values().data_ptr() == column.values.buffers()[1].address


def test_numbers_are_a_tensor_of_the_same_memory() -> None:
    column = pa.array([1.0, 2.0, 3.0], pa.float32())

    tensor = tensors(batch_of(reward=column).slice(1))["reward"]

    assert tensor.tolist() == [2.0, 3.0]
    assert tensor.data_ptr() == column.buffers()[1].address + 4


def test_rows_out_of_the_middle() -> None:
    columns = batch_of(ids=pa.array([[1], [2, 3], [4], [5, 6]], pa.list_(pa.int64())))

    assert [row.tolist() for row in tensors(columns.slice(1, 2))["ids"].unbind()] == [[2, 3], [4]]


def test_lists_of_the_same_lengths_can_be_combined() -> None:
    found = tensors(
        batch_of(
            ids=pa.array([[1, 2], [3]], pa.list_(pa.int64())),
            logprobs=pa.array([[0.5, 0.25], [2.0]], pa.list_(pa.float32())),
            prompt=pa.array([[1], [2, 3]], pa.list_(pa.int64())),
        )
    )

    assert [row.tolist() for row in (found["ids"] * found["logprobs"]).unbind()] == [[0.5, 0.5], [6.0]]
    with pytest.raises(RuntimeError, match="shapes"):
        found["ids"] * found["prompt"]


def test_a_nested_tensor_is_what_the_public_constructor_makes() -> None:
    column = pa.array([[1.0, 2.0], [], [3.0]], pa.list_(pa.float32()))
    expected: Any = torch.nested.nested_tensor_from_jagged(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 2, 2, 3]))

    tensor: Any = tensors(batch_of(x=column))["x"]

    assert type(tensor) is type(expected)
    assert (tensor.layout, tensor.dtype, tensor.requires_grad) == (torch.jagged, torch.float32, False)
    assert tensor.offsets().tolist() == expected.offsets().tolist()
    assert tensor.sum().item() == expected.sum().item() == 6.0
    padded = [torch.nested.to_padded_tensor(one, 0.0) for one in (tensor, expected)]
    assert torch.equal(*padded)
    assert torch.equal((tensor * 2).values(), (expected * 2).values())


def test_a_column_without_rows_is_a_tensor_without_rows() -> None:
    assert tensors(batch_of(x=pa.array([], pa.list_(pa.float32()))))["x"].shape[0] == 0


@pytest.mark.parametrize(
    "column",
    [pa.array([[1], None], pa.list_(pa.int64())), pa.array([[1, None]], pa.list_(pa.int64())), pa.array([1, None])],
    ids=["no list", "no value in a list", "no value"],
)
def test_a_column_with_empty_values_is_no_tensor(column: Any) -> None:
    with pytest.raises(ValueError, match="column x has empty values"):
        tensors(batch_of(x=column))
