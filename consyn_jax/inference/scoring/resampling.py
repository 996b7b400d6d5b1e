"""Bootstrap confidence intervals of means and ratios, by the percentile method (Efron, 1979)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

AT_ONCE = 1 << 22  # draws held in memory at once
LEAST = 2  # smallest number of units; a single unit has no spread


class Interval(NamedTuple):
    """The 2.5th and the 97.5th percentile."""

    low: float
    high: float


def ratio_interval(
    over: np.ndarray, under: np.ndarray, resamples: int, seed: int
) -> Interval | None:
    """Compute the 95 % interval of sum(over) / sum(under) from units drawn with replacement.

    The draws depend only on the seed and the number of units, so that models are compared on the
    same resamples.

    Args:
        over, under: [n], one value per unit; `under` is all ones for a mean.

    Returns:
        The interval; None if `resamples` is 0 or there are fewer than two units.

    >>> ratio_interval(np.array([0.0, 1.0] * 50), np.ones(100), 1000, 0)
    Interval(low=0.4, high=0.6)
    """
    n = len(over)
    if not resamples or n < LEAST:
        return None
    draws = np.random.default_rng(seed)
    each, found = max(1, AT_ONCE // n), list[np.ndarray]()
    for start in range(0, resamples, each):
        chosen = draws.integers(0, n, (min(each, resamples - start), n))
        below = under[chosen].sum(1)
        found.append(over[chosen].sum(1)[below > 0] / below[below > 0])
    ratios = np.concatenate(found)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Interval(float(low), float(high))
