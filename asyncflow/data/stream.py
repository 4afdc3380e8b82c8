"""The endless, repeatable order in which a run draws its training prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from asyncflow.errors import DataError
from asyncflow.types import Int64s, Prompt


class PromptStream:
    """Draws prompts for ever: each epoch every item once, in an order that follows from the seed and the epoch.

    The order of an epoch needs nothing from the epochs before it, so a stream that skips what another one has drawn
    goes on exactly where that one stopped. Not thread-safe: one feeder owns it.
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

    def _permutation(self, epoch: int) -> Int64s:
        if not self._shuffle:
            return np.arange(len(self._prompts), dtype=np.int64)
        return np.random.default_rng((self._seed, epoch)).permutation(len(self._prompts))
