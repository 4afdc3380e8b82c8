"""A queue in lists of this process: what the smallest queue looks like, and what tests measure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.queues.base import KINDS, Got, Kind, MissingFeature, Place, Queue, Side
from benchmarks.queues.samples import Ragged, Samples, rows_of


class Lists(Queue):
    def __init__(self, place: MemoryPlace) -> None:
        self._place = place

    def prepare(self, samples: Samples) -> list[dict[str, Any]]:
        whole = {
            name: [column.rows(row, row + 1).values for row in range(rows_of(samples))]
            if isinstance(column, Ragged)
            else column
            for name, column in samples.items()
        }
        return [{name: values[row] for name, values in whole.items()} for row in range(rows_of(samples))]

    def put(self, batch: list[dict[str, Any]]) -> None:
        self._place.rows += batch

    def take(
        self, rows: int, *, reader: str = "reader", timeout: float = 0.0, interval: float = 0.0, hold: float = 600.0
    ) -> Any | None:
        first = self._place.read[reader]
        found = self._place.rows[first : first + rows]
        if len(found) < rows:
            return None
        self._place.read[reader] += rows
        return [{name: row[name] for name in self._place.kind.readers[reader]} for row in found]

    def read(self, taken: Any) -> Mapping[str, Tensor]:
        return {name: _tensor([row[name] for row in taken]) for name in taken[0]}

    def done(self, got: Got) -> None:
        """What was given out is forgotten."""

    def clear(self) -> None:
        self._place.rows.clear()
        self._place.read.clear()

    def close(self) -> None:
        """There is nothing to leave."""


def _tensor(values: list[Any]) -> Tensor:
    if values[0].ndim == 0:
        return torch.tensor(values)
    return torch.nested.nested_tensor([torch.from_numpy(value) for value in values], layout=torch.jagged)


class MemoryPlace(Place):
    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.rows: list[Mapping[str, Any]] = []
        self.read: dict[str, int] = defaultdict(int)

    @property
    def address(self) -> Any:
        raise MissingFeature("no other process can reach it")

    def client(self, *, remote: bool = False) -> Lists:
        if remote:
            raise MissingFeature("no other host can reach it")
        return Lists(self)

    def servers(self) -> list[int]:
        return []


class MemorySide(Side):
    name = "memory"

    @contextmanager
    def open(self, kind: str, **terms: Any) -> Iterator[MemoryPlace]:
        if terms.get("durability") or terms.get("embedded"):
            raise MissingFeature("it keeps samples in memory only")
        yield MemoryPlace(KINDS[kind])

    def about(self) -> dict[str, Any]:
        return {"medium": "memory", "durability": "none", "transport": "none", "processes": "one", "checksums": False}

    def close(self) -> None:
        """There is nothing to stop."""


def side(folder: Path, **settings: Any) -> MemorySide:
    return MemorySide()
