"""What the tracks of a run did lately: kept in memory, for those who look on while it goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

KEPT: Final = 120.0
"""Seconds for which it is remembered what somebody did."""
MOST: Final = 20_000
"""Pieces of time that are remembered, whatever their age."""


class Piece(NamedTuple):
    """One piece of time of one track, on the timeline's clock. A tuple, since one is made for every event."""

    track: str
    name: str
    """The activity, or what was done."""
    category: str
    began: float
    ended: float
    args: Mapping[str, Any]


class Recent:
    """Not thread-safe: who owns it has a lock."""

    def __init__(self, began: float) -> None:
        """`began`: when somebody began to say what he does."""
        self._began = began
        self._pieces: deque[Piece] = deque(maxlen=MOST)
        self._added: deque[tuple[float, str, float]] = deque(maxlen=MOST)

    def keep(self, piece: Piece) -> None:
        """A piece that has ended."""
        self._pieces.append(piece)
        while self._pieces[0].ended < piece.ended - KEPT:
            self._pieces.popleft()

    def add(self, at: float, key: str, seconds: float) -> None:
        """Time that counts for the shares as `<track>/<name>`, and is no piece."""
        self._added.append((at, key, seconds))
        while self._added[0][0] < at - KEPT:
            self._added.popleft()

    def since(self, began: float) -> list[Piece]:
        """Those that ended after this time."""
        return [piece for piece in self._pieces if piece.ended > began]

    def shares(self, now: float, seconds: float, under_way: Iterable[Piece], *, activity: str) -> dict[str, float]:
        """Shares of the last `seconds`, or of the time since the beginning where that is shorter, 0 to 1.

        `<track>/<name>` of every piece, and `<track>/wait_for/<cause>` of those of the category `activity` that have a
        cause: the names of `asyncflow.report.bottleneck`. Lanes, of which each completion has a piece, are left out.
        `under_way`: what has not ended, up to now.
        """
        began = max(self._began, now - seconds)
        length = now - began
        if length <= 0:
            return {}
        total: dict[str, float] = {}
        for piece in (*self.since(began), *under_way):
            if "/" in piece.track:
                continue
            part = max(0.0, min(piece.ended, now) - max(piece.began, began))
            keys = [f"{piece.track}/{piece.name}"]
            if piece.category == activity and (cause := piece.args.get("cause")):
                keys.append(f"{piece.track}/wait_for/{cause}")
            for key in keys:
                total[key] = total.get(key, 0.0) + part
        for at, key, more in self._added:
            if at > began:
                total[key] = total.get(key, 0.0) + more
        return {key: part / length for key, part in total.items()}
