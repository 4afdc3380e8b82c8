"""Who gets what next: rows for a stage, whole groups for the training stage. Decides, and changes nothing.

Staleness is bounded by construction (`docs/staleness.md` has the proof): the learner consumes in admission order, B
places a step. What the construction cannot see (an engine that serves less than it says) is caught here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from asyncflow.store.events import Awaited, Dropped, Event, Requeued
from asyncflow.store.lifecycle import LATE, SHORT_GROUP
from asyncflow.store.needs import Needs
from asyncflow.store.rows import Flags, Ids
from asyncflow.store.samplers import group_order
from asyncflow.store.state import REWARDED


@dataclass(frozen=True, slots=True)
class Window:
    """The groups that the step under way may have, in admission order: G of them, with n samples each."""

    groups: Ids
    """(G,)"""
    rest: Flags
    """(G, n) Open, and young enough to be trained."""
    late: Flags
    """(G, n) Open, and too old: they are dropped, or generated again."""
    short: Flags
    """(G,) So many are late that what is left is too little to train: its place goes to a later group."""


class Choice(Needs):
    """What may be leased now."""

    def _choose_rows(self, stage: str, max_rows: int, max_tokens: int | None) -> tuple[list[int], bool]:
        """Rows, and whether the limits allow no more."""
        before = None
        if stage == self.schema.generate.name and (last := self._last_group_to_generate()) is not None:
            before = (last + 1) * self.group_size
        chosen = self._ready[stage].first(max_rows, before=before)
        full = False
        if max_tokens is not None and len(chosen):
            total = self.rows.tokens[chosen - self.rows.base].cumsum()
            full = bool(total[-1] >= max_tokens)
            chosen = chosen[: max(1, int(np.searchsorted(total, max_tokens, side="right")))]
        ids: list[int] = chosen.tolist()
        return ids, full

    def _last_group_to_generate(self) -> int | None:
        """Id of the last group that may be generated now; None when all may."""
        groups = self.most_generated // self.group_size
        if self.groups.count <= groups:
            return None
        return int(self.groups.first(groups)[-1]) if groups else -1

    def _choose_groups(self, max_rows: int, max_tokens: int | None) -> tuple[list[Event], list[int], bool]:
        """Ends of late rows; rows of the chosen groups; whether the limits or the step allow no more."""
        window = self._window()
        rows = self._members(window.groups)
        waits = self.rows.narrow(window.rest, rows, lambda index: self.rows.state[index] != REWARDED)
        if self.terms.late_samples == "requeue":
            waits |= window.late
        ready = ~(window.short | self.taken.has(window.groups) | waits.any(axis=1))
        rows, rest = rows[ready], window.rest[ready]
        if self.schema.train.sampler != "fifo":
            order = group_order(self.schema.train, self.rows, rows, rest)
            rows, rest = rows[order], rest[order]
        room = self.groups_per_step - self.taken.count
        rows, rest = rows[:room], rest[:room]
        tokens = np.where(rest, self.rows.tokens[np.where(rest, rows - self.rows.base, 0)], 0)
        fits = rest.sum(axis=1).cumsum() <= max_rows
        if max_tokens is not None:
            fits &= tokens.sum(axis=1).cumsum() <= max_tokens
        fits[:1] = True  # one group is always given
        count = len(fits) if fits.all() else int(fits.argmin())
        chosen: list[int] = rows[:count][rest[:count]].tolist()
        full = count < len(fits) or count == room or (max_tokens is not None and tokens[:count].sum() >= max_tokens)
        return self._ends_of_late(window), chosen, bool(full)

    def _window(self) -> Window:
        """The groups that the step may have."""
        return self._first_places() if self.terms.late_samples == "wait" else self._all_places()

    def _all_places(self) -> Window:
        """All that are open, where the step need not wait for who is slow: what that makes too old is dropped,
        generated again or masked."""
        return self._judge(self.groups.first(self.groups.count))

    def _first_places(self) -> Window:
        """The first B places that are open, after those whose groups end because they are too late."""
        short = 0
        while True:
            window = self._judge(self.groups.first(self.groups_per_step + short))
            ends = int(window.short.sum())
            if ends == short or len(window.groups) < self.groups_per_step + short:
                return window
            short = ends

    def _judge(self, groups: Ids) -> Window:
        """Who is too old among these groups, and what that means for their others."""
        rows = self._members(groups)
        there = self.rows.is_open(rows)
        free = there & ~self.taken.has(groups)[:, None]
        late = self.rows.narrow(free, rows, lambda index: self.too_old(index + self.rows.base))
        rest = there & ~late
        short = late.any(axis=1) & (rest.sum(axis=1) < self.terms.min_group)
        if self.terms.late_samples == "requeue":
            short[:] = False  # they stay in their group
        return Window(groups, rest, late, short)

    def _ends_of_late(self, window: Window) -> list[Event]:
        """What becomes of the rows that are too old."""
        rows = self._members(window.groups)
        if self.terms.late_samples == "requeue":
            late = tuple(rows[window.late].tolist())
            return [Requeued(rows=late)] if late else []
        events: list[Event] = []
        for place in np.flatnonzero(window.late.any(axis=1)):
            events.append(Dropped(rows=tuple(rows[place, window.late[place]].tolist()), reason=LATE))
            if window.short[place] and window.rest[place].any():
                events.append(Dropped(rows=tuple(rows[place, window.rest[place]].tolist()), reason=SHORT_GROUP))
        return events

    def _wait_for_groups(self, leased: Sequence[int], ends: Sequence[Event], deadline: float) -> list[Event]:
        """From now on the training stage waits for those groups of its step that lack rows, when these have ended or
        are generated again."""
        groups = self.groups.first(self.groups_per_step)
        groups = groups[~self.taken.has(groups) & ~np.isin(groups, np.array(leased, np.int64) // self.group_size)]
        rows, lacking = self._members(groups), self._lacking(groups)
        for event in ends:
            if isinstance(event, Dropped | Requeued):
                lacking[np.isin(rows, np.array(event.rows, np.int64))] = isinstance(event, Requeued)
        new = [group for group in groups[lacking.any(axis=1)].tolist() if group not in self.awaiting]
        return [Awaited(groups=tuple(new), deadline=deadline)] if new else []
