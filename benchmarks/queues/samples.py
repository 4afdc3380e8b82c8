"""The samples that queues are measured with: random ragged columns of known sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.queues.base import WIDE


@dataclass(frozen=True, kw_only=True, eq=False)
class Ragged:
    """Values of several samples, one behind the other."""

    values: NDArray[Any]
    offsets: NDArray[np.int64]
    """(n + 1,): sample i has `values[offsets[i]:offsets[i + 1]]`."""

    def rows(self, start: int, end: int) -> Ragged:
        first, last = self.offsets[start], self.offsets[end]
        return Ragged(values=self.values[first:last], offsets=self.offsets[start : end + 1] - first)


Samples = Mapping[str, Ragged | NDArray[Any]]


def ragged(random: np.random.Generator, lengths: NDArray[np.int64], dtype: str) -> Ragged:
    total = int(lengths.sum())
    values: NDArray[Any] = (
        random.integers(0, 150_000, total, dtype=np.int64)
        if dtype == "int64"
        else random.standard_normal(total, dtype=np.float32)
    )
    return Ragged(values=values, offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]))


def finished(rows: int, *, prompt: int = 256, response: int = 512, seed: int = 0) -> Samples:
    """Finished samples: lengths are uniform from half to one and a half of these means. By default 8.2 kB each."""
    random = np.random.default_rng(seed)
    prompts, responses = (random.integers(mean // 2, mean * 3 // 2 + 1, rows) for mean in (prompt, response))
    return {
        "prompt_ids": ragged(random, prompts, "int64"),
        "response_ids": ragged(random, responses, "int64"),
        "logprobs": ragged(random, responses, "float32"),
        "reward": random.standard_normal(rows, dtype=np.float32),
    }


def wide(rows: int, *, length: int = 64, seed: int = 0) -> Samples:
    """32 columns of `length` float32 each, and a prompt of one token."""
    random = np.random.default_rng(seed)
    lengths = np.full(rows, length)
    columns = {name: ragged(random, lengths, "float32") for name in WIDE}
    return {"prompt_ids": ragged(random, np.ones(rows, np.int64), "int64"), **columns}


def rows_of(samples: Samples) -> int:
    first = next(iter(samples.values()))
    return len(first.offsets) - 1 if isinstance(first, Ragged) else len(first)


def size(samples: Samples) -> int:
    """Bytes of values: what a queue needs besides is its own matter."""
    return sum(int((column.values if isinstance(column, Ragged) else column).nbytes) for column in samples.values())


def part(samples: Samples, start: int, end: int) -> Samples:
    """Some consecutive samples."""
    return {
        name: column.rows(start, end) if isinstance(column, Ragged) else column[start:end]
        for name, column in samples.items()
    }
