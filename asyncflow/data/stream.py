"""The endless, repeatable order in which a run draws its training prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from asyncflow.errors import DataError
from asyncflow.types import Int64s, Prompt


@dataclass(frozen=True, kw_only=True, order=True)
class Cursor:
    """The place of the next prompt in a stream: all that a checkpoint has to keep of it."""

    epoch: int = 0
    """Passes over the prompts that are complete."""
    position: int = 0
    """Prompts of this pass that were drawn already, less than `items`."""
    items: int
    """How many prompts one pass has; a cursor fits no other number of them."""


class PromptStream:
    """Draws prompts for ever: each epoch every item once, in an order that follows from the seed and the epoch.

    The order of an epoch needs nothing from the epochs before it, so a stream that is restored from a cursor goes on
    exactly where the other one stopped. Not thread-safe: one feeder owns it.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool = True) -> None:
        """Start at the first prompt of epoch 0. Raises DataError when there are no prompts."""
        if not prompts:
            raise DataError("there are no training prompts: give data.train at least one problem")
        self._prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0
        self._position = 0
        self._order = self._permutation(0)

    @property
    def cursor(self) -> Cursor:
        """The place of the prompt that `next` will return."""
        return Cursor(epoch=self._epoch, position=self._position, items=len(self._prompts))

    def next(self) -> Prompt:
        """The next prompt; never ends."""
        prompt = self._prompts[int(self._order[self._position])]
        self._position += 1
        if self._position == len(self._prompts):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._permutation(self._epoch)
        return prompt

    def skip(self, drawn: int) -> None:
        """Go to where a stream is after it has drawn so many prompts since its beginning."""
        self._epoch, self._position = divmod(drawn, len(self._prompts))
        self._order = self._permutation(self._epoch)

    def seek(self, cursor: Cursor) -> None:
        """Go to a place that `cursor` returned earlier. Raises DataError when it belongs to other data."""
        if cursor.items != len(self._prompts):
            raise DataError(
                f"the data have {len(self._prompts)} training prompts now and had {cursor.items} when this place "
                f"in them was saved: go on with the same data, or start a new run"
            )
        if cursor.epoch < 0 or not 0 <= cursor.position < cursor.items:
            raise DataError(f"there is no place {cursor.position} in epoch {cursor.epoch} of {cursor.items} prompts")
        self._epoch, self._position = cursor.epoch, cursor.position
        self._order = self._permutation(cursor.epoch)

    def _permutation(self, epoch: int) -> Int64s:
        if not self._shuffle:
            return np.arange(len(self._prompts), dtype=np.int64)
        return np.random.default_rng((self._seed, epoch)).permutation(len(self._prompts))
