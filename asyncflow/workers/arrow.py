"""Arrow columns as numpy arrays."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def ragged(column: pa.ListArray) -> list[NDArray[Any]]:
    """The lists of a column, one array each; views of the column's memory, not to be written to."""
    offsets = column.offsets.to_numpy()
    values = column.values.to_numpy()
    return [values[start:end] for start, end in pairwise(offsets)]


def strings(column: pa.StringArray) -> list[str]:
    return list(column.to_pylist())


def floats(column: pa.FloatArray) -> NDArray[np.float32]:
    return np.asarray(column.to_numpy())
