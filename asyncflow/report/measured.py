"""The measurements of a run as series over its steps, read while `metrics.jsonl` grows."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from asyncflow.rundir import METRICS

KINDS: Final = ("step", "eval")
"""Lines that have a step and numbers."""
NOT_SERIES: Final = ("step", "at", "kind")


@dataclass(slots=True)
class Series:
    """One measurement: its value, at which step, and when (Unix time, seconds)."""

    step: list[int] = field(default_factory=list)
    time: list[float] = field(default_factory=list)
    value: list[float] = field(default_factory=list)

    def since(self, step: int) -> Series:
        places = [place for place, at in enumerate(self.step) if at > step]
        return Series([self.step[p] for p in places], [self.time[p] for p in places], [self.value[p] for p in places])

    def thinned(self, points: int) -> Series:
        """At most about so many, evenly taken, with the last, the lowest and the highest one: the mean stays what it
        is, and nothing that stands out is lost."""
        every = -(-len(self.value) // points)
        if every <= 1:
            return self
        known = [place for place, value in enumerate(self.value) if math.isfinite(value)]
        kept = {*range(0, len(self.value), every), len(self.value) - 1}
        if known:
            kept |= {min(known, key=self.value.__getitem__), max(known, key=self.value.__getitem__)}
        places = sorted(kept)
        return Series([self.step[p] for p in places], [self.time[p] for p in places], [self.value[p] for p in places])

    def go_back(self, step: int) -> None:
        """Forget what came after a step that the run has gone back to: it made these steps again."""
        keep = [place for place, at in enumerate(self.step) if at <= step]
        self.step, self.time, self.value = (
            [self.step[p] for p in keep],
            [self.time[p] for p in keep],
            [self.value[p] for p in keep],
        )


class Measured:
    """Thread-safe."""

    def __init__(self, run_dir: Path) -> None:
        """Reads nothing yet."""
        self._path = run_dir / METRICS
        self._lock = threading.Lock()
        self._read = 0
        """Bytes of the file."""
        self._series: dict[str, Series] = {}

    def series(
        self, names: Sequence[str] | None = None, *, since_step: int = -1, points: int | None = None
    ) -> dict[str, Series]:
        """Those of these names that there are (None: all), each with its points after a step, thinned to so many."""
        with self._lock:
            self._catch_up()
            wanted = self._series if names is None else {n: self._series[n] for n in names if n in self._series}
            later = {name: series.since(since_step) for name, series in wanted.items()}
        return later if points is None else {name: series.thinned(points) for name, series in later.items()}

    def names(self) -> list[str]:
        with self._lock:
            self._catch_up()
            return sorted(self._series)

    def _catch_up(self) -> None:
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # it is just being written, or was torn by a kill
                self._read += len(line)
                try:
                    self._enter(json.loads(line))
                except (ValueError, TypeError, LookupError):
                    continue

    def _enter(self, line: Mapping[str, Any]) -> None:
        if line["kind"] == "resumed":
            for series in self._series.values():
                series.go_back(int(line["step"]))
        if line["kind"] not in KINDS:
            return
        step, at = int(line["step"]), float(line["at"])
        for name, value in line.items():
            if name not in NOT_SERIES and isinstance(value, int | float) and not isinstance(value, bool):
                series = self._series.setdefault(name, Series())
                series.step.append(step)
                series.time.append(at)
                series.value.append(float(value))
