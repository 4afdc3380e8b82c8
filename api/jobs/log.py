"""Reading a job's log in pieces, without the secrets of its configuration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from asyncflow_api.jobs.redaction import Redactor

LONGEST_LINE = 1 << 16
"""Bytes; a longer line is cut, and the cut hidden."""


class LogReader:
    """One log. Pieces end where lines end, so that a secret is never cut in two and then not recognised."""

    def __init__(self, path: Path, hide: Redactor) -> None:
        self._path = path
        self._hide = hide

    def size(self) -> int:
        try:
            return self._path.stat().st_size
        except OSError:
            return 0

    def read(self, offset: int, most: int, *, ended: bool) -> tuple[str, int]:
        """Whole lines from the first that begins at `offset` or after it, at most `most` bytes, and where it goes on.

        A last line without an end is taken when the job has `ended`, or when it is too long to wait for.
        """
        try:
            with self._path.open("rb") as file:
                if offset := min(offset, os.fstat(file.fileno()).st_size):
                    offset = _line_start(file, offset)
                data = file.read(most)
        except FileNotFoundError:
            return "", offset
        end = data.rfind(b"\n") + 1
        if ended and len(data) < most:
            end = len(data)
        elif not end and len(data) >= min(most, LONGEST_LINE):
            end = len(data)
            return "(a line too long to show)\n", offset + end
        return self._hide.text(data[:end].decode("utf-8", "replace")), offset + end

    def last_lines(self, count: int) -> int:
        """The offset at which the last lines begin; those at most that are in the last mebibyte."""
        size = self.size()
        if not size or not count:
            return size
        start = max(0, size - (1 << 20))
        with self._path.open("rb") as file:
            file.seek(start)
            data = file.read(size - start)
        at = len(data) - 1 if data.endswith(b"\n") else len(data)
        for _ in range(count):
            at = data.rfind(b"\n", 0, at)
            if at < 0:
                return start
        return start + at + 1


def _line_start(file: BinaryIO, offset: int) -> int:
    """Where the first line begins that does so at `offset` or after it; the file is there then."""
    file.seek(offset - 1)
    at = offset - 1
    while piece := file.readline(LONGEST_LINE):
        at += len(piece)
        if piece.endswith(b"\n"):
            break
    return at
