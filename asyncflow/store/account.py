"""Which segments there are, and how much of each is still needed. Knows no data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from asyncflow.errors import LedgerError
from asyncflow.store.segments import segment_of
from asyncflow.store.shelf import Shelf


@dataclass(slots=True)
class _Use:
    needed: int = 0
    """Rows that need some frame of it."""
    ever: int = 0
    """Rows that ever did."""
    size: int = 0
    """Bytes of all of its frames that rows ever needed."""

    @property
    def needed_bytes(self) -> int:
        return self.size * self.needed // self.ever if self.ever else 0


class Account:
    """Counts rows by segment. The caller has a lock around every call but `remove`."""

    def __init__(self, shelf: Shelf, frames: Mapping[int, int] | None = None, *, after: int = 0) -> None:
        """`frames`: the frames that are needed → by how many rows. `after`: the last frame that there ever was.

        Raises LedgerError when a segment with some of them is missing.
        """
        self._shelf = shelf
        sizes = shelf.present()
        self._uses = {number: _Use(size=size) for number, size in sizes.items()}
        needed = {segment_of(frame) for frame in frames or {}}
        if missing := sorted(needed - sizes.keys()):
            raise LedgerError(
                f"{shelf.name(missing[0])} is missing, so the run cannot go on with its samples: restore the file, or "
                "start a new run from the last checkpoint's weights"
            )
        ends: dict[int, int] = {}
        for frame, rows in (frames or {}).items():
            use = self._uses[segment_of(frame)]
            use.needed += rows
            use.ever += rows
            ends[segment_of(frame)] = max(frame, ends.get(segment_of(frame), 0))
        for number, frame in ends.items():  # a segment that is not full has room that nobody has used
            self._uses[number].size = min(sizes[number], shelf.end_of(frame))
        self._last = max([*sizes, segment_of(after)])
        self._unneeded = sizes.keys() - needed
        self._unsynced = set(needed)  # nobody knows what an earlier process has synced
        self.has_garbage = bool(self._unneeded)
        """Whether `unneeded` is worth a call: a segment is not needed any more, or a writer has gone on to another."""
        self.bytes = sum(use.needed_bytes for use in self._uses.values())
        """Of the data that are needed, as far as the rows of a segment are of the same size."""

    @property
    def segments(self) -> int:
        """How many there are."""
        return len(self._uses)

    def allocate(self) -> int:
        """The number of a segment for whoever asks. It is never given out again."""
        self._last += 1
        self._uses[self._last] = _Use()
        self.has_garbage |= bool(self._unneeded)
        self._unneeded.add(self._last)
        return self._last

    def knows(self, frame: int) -> bool:
        """Whether the frame can be there. False: its number was never given out, or the segment was removed."""
        return segment_of(frame) in self._uses

    def hold(self, frame: int, rows: int, size: int = 0) -> None:
        """So many rows need the frame, which has so many bytes."""
        number = segment_of(frame)
        use = self._uses[number]
        self.bytes -= use.needed_bytes
        use.needed += rows
        use.ever += rows
        use.size += size
        self.bytes += use.needed_bytes
        self._unneeded.discard(number)
        self._unsynced.add(number)

    def release(self, frame: int, rows: int) -> None:
        """So many rows do not need the frame any more."""
        number = segment_of(frame)
        use = self._uses[number]
        self.bytes -= use.needed_bytes
        use.needed -= rows
        self.bytes += use.needed_bytes
        if not use.needed:
            self._unneeded.add(number)
            self.has_garbage = True

    def unsynced(self) -> dict[int, int]:
        """Segments with frames that a power cut can still take → how many rows ever needed them so far."""
        return {number: self._uses[number].ever for number in sorted(self._unsynced)}

    def synced(self, segments: Mapping[int, int]) -> None:
        """What `unsynced` has said of these survives a power cut; frames that were held since then may not."""
        for number, ever in segments.items():
            if number in self._uses and self._uses[number].ever == ever:
                self._unsynced.discard(number)

    def unneeded(self) -> list[int]:
        """Segments that no row needs and no writer uses, to be removed when the ledger is on disk. They are not known
        any more; each is named once."""
        unneeded = sorted(number for number in self._unneeded if not self._shelf.in_use(number))
        self._unneeded.difference_update(unneeded)
        self.has_garbage = False
        self._unsynced.difference_update(unneeded)
        for number in unneeded:
            del self._uses[number]
        return unneeded

    def still_there(self, numbers: Iterable[int]) -> None:
        """What `unneeded` has named could not be removed: it is to be named again."""
        for number in numbers:
            self._uses[number] = _Use()
            self._unneeded.add(number)
            self.has_garbage = True

    def remove(self, numbers: Iterable[int]) -> None:
        """Remove segments that `unneeded` has named. Needs no lock."""
        for number in numbers:
            self._shelf.remove(number)
