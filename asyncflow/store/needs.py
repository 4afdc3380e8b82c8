"""Which data the samples need, and which they do not need any more after an event."""

from __future__ import annotations

from collections import Counter

import numpy as np

from asyncflow.store.events import (
    Acked,
    Admitted,
    Checkpointed,
    Committed,
    Dropped,
    Event,
    Quarantined,
    Requeued,
    Resumed,
)
from asyncflow.store.rows import NONE, Ids
from asyncflow.store.views import Views
from asyncflow.types import PolicyVersion


class Needs(Views):
    """Frames, and by how many rows each is needed."""

    def needed_by(self, event: Event) -> Counter[int]:
        """Frames that so many rows begin to need with this event; a row that needs several columns counts for each
        stage that has written one."""
        match event:
            case Admitted():
                rows = len(event.prompt_tokens) * self.group_size
                frames = Counter({event.frame: rows})
                if event.samples is not None:
                    writers = sum(1 for _ in self._writers(event.samples.columns))
                    frames[event.samples.frame] += rows * writers
                return frames
            case Acked() if event.frame != NONE:
                return Counter({event.frame: len(event.rows)})
            case _:
                return Counter()

    def released_by(self, event: Event) -> Counter[int]:
        """Frames whose data so many rows do not need any more when this event has been applied."""
        match event:
            case Committed() | Dropped() | Quarantined():
                return self._frames(self._gone_with(event))
            case Requeued():
                return self._frames(np.array(event.rows, np.int64), but_prompt=True)
            case Checkpointed():
                steps = [self.consumed[n].rows for n in self._passed(event)]
                return self._frames(np.concatenate(steps)) if steps else Counter()
            case Resumed():
                number, rows = PolicyVersion.unpack(event.version).n, self.rows.alive()
                return self._frames(rows[self._newest(rows) > number], but_prompt=True)
            case _:
                return Counter()

    def frames(self) -> Counter[int]:
        """Every frame that is needed → by how many rows."""
        return self._frames(self.rows.alive())

    def _frames(self, rows: Ids, *, but_prompt: bool = False) -> Counter[int]:
        frames = self.rows.frame[int(but_prompt) :, rows - self.rows.base]
        found, counts = np.unique(frames[frames != NONE], return_counts=True)
        return Counter(dict(zip(found.tolist(), counts.tolist(), strict=True)))

    def _gone_with(self, event: Committed | Dropped | Quarantined) -> Ids:
        """Rows that nobody can have back when this event has happened: a group that ends takes those in quarantine
        with it."""
        ids = np.array(event.trained + event.skipped if isinstance(event, Committed) else event.rows, np.int64)
        over = self._over_without(ids)
        if isinstance(event, Quarantined):
            ids = ids[np.isin(ids // self.group_size, over)]
        elif isinstance(event, Committed) and self.terms.resumable:
            ids = ids[:0]
        return np.concatenate([ids, self._quarantined_of(over)])
