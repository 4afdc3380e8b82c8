"""Columns of the store as torch tensors, without a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


def tensors(batch: pa.RecordBatch) -> dict[str, Tensor]:
    """Each column as a tensor of its values: lists as a nested one (B, ragged), others as (B,).

    Columns whose lists are equally long have one ragged dimension, so that torch combines them: `ratio * advantage`.
    The memory is that of the store's files: write to a copy. Raises ValueError for columns with empty values.
    """
    # The public constructor comes to this at last, after three times as long in looking up what it was called with.
    from torch.nested._internal.nested_tensor import NestedTensor
    from torch.utils.dlpack import from_dlpack  # `torch.from_numpy` warns about memory that may not be written to

    ragged: list[tuple[NDArray[np.int64], Tensor]] = []
    found = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        is_list = pa.types.is_list(column.type)
        values = column.flatten() if is_list else column
        if column.null_count or values.null_count:
            raise ValueError(f"column {name} has empty values, for which there is no tensor: fill them first")
        tensor = from_dlpack(values)
        found[name] = NestedTensor(tensor, _offsets(column, ragged)) if is_list else tensor
    return found


def _offsets(column: pa.ListArray, ragged: list[tuple[NDArray[np.int64], Tensor]]) -> Tensor:
    """Where each list begins, and where the last one ends. Torch knows lists of the same lengths by its being the same
    tensor."""
    import torch

    offsets = column.offsets.to_numpy().astype(np.int64)
    offsets -= offsets[0]
    for others, tensor in ragged:
        if np.array_equal(offsets, others):
            return tensor
    tensor = torch.from_numpy(offsets)
    ragged.append((offsets, tensor))
    return tensor
