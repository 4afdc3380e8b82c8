"""`metrics.jsonl` of a run as a list of lines that grows."""

from __future__ import annotations

import json
import threading
from array import array
from pathlib import Path
from typing import Any, Final

CHUNK: Final = 1 << 20


class Tail:
    """Finds lines by number, and reads only what has come since the last look. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ends = array("Q")
        """Where each complete line ends, in bytes."""
        self._read = 0
        """Bytes that were looked at."""
        self._lock = threading.Lock()

    def size(self) -> int:
        """Bytes of the file now."""
        try:
            return self._path.stat().st_size
        except OSError:
            return 0

    def count(self) -> int:
        """Complete lines now."""
        self.lines(1 << 60, 0)
        return len(self._ends)

    def lines(self, after: int, limit: int) -> list[dict[str, Any] | None]:
        """At most `limit` lines from number `after` on; None for one that is no JSON object.

        A last line without its end is still being written, and not there yet.
        """
        with self._lock:
            try:
                with self._path.open("rb") as file:
                    file.seek(self._read)
                    while chunk := file.read(CHUNK):
                        at = -1
                        while (at := chunk.find(b"\n", at + 1)) >= 0:
                            self._ends.append(self._read + at + 1)
                        self._read += len(chunk)
                    last = min(after + limit, len(self._ends))
                    if after >= last:
                        return []
                    begin = self._ends[after - 1] if after else 0
                    file.seek(begin)
                    data = file.read(self._ends[last - 1] - begin)
            except FileNotFoundError:
                return []
        return [_object(line) for line in data.split(b"\n")[: last - after]]


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
