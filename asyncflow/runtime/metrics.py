"""The measurements of a run: one JSON object a line in `metrics.jsonl`, and to whoever listens."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from asyncflow.clock import Clock, SystemClock

logger = logging.getLogger(__name__)

Listener = Callable[[Mapping[str, Any]], None]


class Metrics:
    """Implements `Recorder`; thread-safe. Each line is flushed, so that a killed run keeps what it measured."""

    def __init__(self, path: Path, *, clock: Clock | None = None) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._listeners: list[Listener] = []

    def listen(self, listener: Listener) -> None:
        """Call `listener` with every line from now on, in the thread that records it."""
        self._listeners.append(listener)

    def log(self, kind: str, values: Mapping[str, Any]) -> None:
        line = {"kind": kind, "at": self._clock.wall(), **values}
        with self._lock:
            if self._file.closed:
                return
            self._file.write(json.dumps(line, default=float) + "\n")
            self._file.flush()
        for listener in list(self._listeners):
            try:
                listener(line)
            except Exception as error:  # who only looks on (a closed terminal) must not end the run
                logger.warning("a listener is not told any more: %s", error)
                self._listeners.remove(listener)

    def close(self) -> None:
        """May be called twice."""
        with self._lock:
            self._file.close()


def read_metrics(path: Path, kind: str) -> list[dict[str, Any]]:
    """All lines of one kind, in order; a torn last line of a killed run is left out.

    What a run measured after a checkpoint that it was later resumed from is left out too: it made these steps again.
    """
    lines: list[dict[str, Any]] = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if not isinstance(line, dict):
                continue
            if line.get("kind") == "resumed":
                lines = [kept for kept in lines if kept.get("step", 0) <= line["step"]]
            if line.get("kind") == kind:
                lines.append(line)
    return lines
