"""Advantages: how much better a sample was than what was expected of it.

Left out, and why: whitening over the whole batch (it would make a step wait for its last group before the first one
can be trained), the other estimators of the field (one is enough for one algorithm), and rewards per token (a
verifier gives one number a completion).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

EPSILON = 1e-4
"""Keeps the division finite, and damps groups whose rewards barely differ. TRL's value."""


def is_zero_variance(rewards: ArrayLike) -> bool:
    """True when all rewards of a group (n,) are the same number, so that every advantage, and the gradient, is 0."""
    values = np.asarray(rewards, dtype=np.float64)
    return bool((values == values.flat[0]).all())


def group_advantages(rewards: ArrayLike) -> NDArray[np.float64]:
    """GRPO: A_i = (R_i − mean(R)) / (std(R) + ε), mean and standard deviation over the samples of one prompt.

    `rewards` (n,) are those of one group; returns (n,), in float64. DeepSeekMath (arXiv:2402.03300, §4.1.2) does not
    say which standard deviation it takes: here it divides by n − 1, and ε is 1e-4, as in TRL's GRPOTrainer. A group
    that has shrunk to one sample, or whose rewards are all equal, has advantage 0. Raises ValueError when a reward is
    not finite.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"rewards must be finite numbers, not {values.tolist()}")
    if is_zero_variance(values):
        # Not left to the formula: the mean of equal numbers can be off by a rounding error.
        return np.zeros_like(values)
    centred = values - values.mean()
    advantages: NDArray[np.float64] = centred / (values.std(ddof=1) + EPSILON)
    return advantages
