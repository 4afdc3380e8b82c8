"""The folder of the segments as the broker has it: which there are, which are in use, and removing them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from asyncflow.errors import LedgerError
from asyncflow.store.frames import HEADER_BYTES, OFFSET_BITS, Header
from asyncflow.store.segments import (
    FREE,
    FREE_BYTES,
    SUFFIX,
    UNFINISHED,
    free_files,
    has_writer,
    segment_of,
    segment_path,
    sync_file,
)


class Shelf(Protocol):
    """Where the segments of an account are."""

    @abstractmethod
    def present(self) -> dict[int, int]:
        """Numbers of the segments that are there already → how many bytes each takes."""

    @abstractmethod
    def end_of(self, frame: int) -> int:
        """Bytes of its segment up to the end of a frame; what is behind it may be room that nobody has used."""

    @abstractmethod
    def name(self, number: int) -> str:
        """Of a segment, in a sentence."""

    @abstractmethod
    def in_use(self, number: int) -> bool:
        """Whether a writer may still append to the segment, or name a frame of it for the first time."""

    @abstractmethod
    def remove(self, number: int) -> None:
        """Remove a segment, if it is there."""

    @abstractmethod
    def sync(self, numbers: Iterable[int]) -> None:
        """Make these segments survive a power cut. Raises OSError."""

    @abstractmethod
    def close(self) -> None:
        """Give back what was kept for segments to come. May be called twice."""


class SegmentFolder(Shelf):
    """Segments in files."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder. Raises LedgerError when it cannot be made or read, or holds another format."""
        self.folder = folder
        self.on_removed: Callable[[int], None] = lambda _: None
        """Is told of every segment that goes, so that this process can let go of it."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob(f"*{UNFINISHED}"):
                if not has_writer(path):
                    path.unlink(missing_ok=True)
            self.close()
            for number in self.present():
                _check_format(segment_path(folder, number))
        except OSError as error:
            raise LedgerError(f"the data of the samples in {folder} cannot be opened: {error}") from error

    def present(self) -> dict[int, int]:
        paths = (path for path in self.folder.glob(f"*{SUFFIX}") if path.stem.isdigit())
        return {int(path.stem): path.stat().st_blocks * 512 for path in paths}

    def end_of(self, frame: int) -> int:
        path, offset = segment_path(self.folder, segment_of(frame)), frame & ((1 << OFFSET_BITS) - 1)
        with path.open("rb") as file:
            file.seek(offset)
            header = Header.unpack(file.read(HEADER_BYTES))
        return path.stat().st_size if header is None else header.end

    def name(self, number: int) -> str:
        return str(segment_path(self.folder, number))

    def in_use(self, number: int) -> bool:
        path = segment_path(self.folder, number)
        # One that is not there is still to be made, with the lock on it.
        return has_writer(path) if path.exists() else True

    def remove(self, number: int) -> None:
        """Remove a segment, if it is there; a few files are kept for those to come."""
        path = segment_path(self.folder, number)
        with suppress(FileNotFoundError):
            path.rename(path.with_suffix(FREE))
        self.on_removed(number)
        # The oldest go first: somebody may have mapped them, and never let go.
        room = FREE_BYTES
        for free in reversed(free_files(self.folder)):
            with suppress(FileNotFoundError):  # somebody has taken it meanwhile
                room -= free.stat().st_size
                if room < 0:
                    free.unlink()

    def close(self) -> None:
        for path in free_files(self.folder):
            path.unlink(missing_ok=True)

    def sync(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            with suppress(FileNotFoundError):
                sync_file(segment_path(self.folder, number))
        sync_file(self.folder)


def _check_format(path: Path) -> None:
    with path.open("rb") as file:
        try:
            Header.unpack(file.read(HEADER_BYTES))
        except ValueError as error:
            raise LedgerError(f"{path}: {error}") from None
