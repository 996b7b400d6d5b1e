"""The critical batch by tokens trained on: a power law through the measured noise scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LARGEST_EXPONENT = 1.0  # a batch that grows faster than the data is noise in the measurements
FEWEST = 3  # measurements


@dataclass(frozen=True)
class BatchPoint:
    """A measured noise scale.

    Attributes:
        parameters: of the model, without embeddings.
        tokens: that it had been trained on.
        scale: in tokens.
        run_tokens: of the run whose rate begins to decay there.
    """

    parameters: float
    tokens: float
    scale: float
    run_tokens: float = 0.0


@dataclass(frozen=True)
class CriticalBatch:
    """Tokens of the critical batch after training on D: factor x D^exponent.

    It grows with the data and hardly depends on the size of the model (Zhang et al., 2024).
    """

    factor: float
    exponent: float

    def tokens(self, trained: float) -> float:
        """The critical batch, in tokens."""
        return float(self.factor * trained**self.exponent)


def fit_batch(points: Sequence[BatchPoint]) -> CriticalBatch | None:
    """Fit the law to the logarithms; None with too few points.

    >>> fit_batch([BatchPoint(1e6, t, 3 * t**0.5) for t in (1e6, 4e6, 9e6)])
    CriticalBatch(factor=3.0, exponent=0.5)
    """
    if len(points) < FEWEST:
        return None
    tokens = np.log([point.tokens for point in points])
    scales = np.log([point.scale for point in points])
    spread = float(np.var(tokens))
    slope = float(np.mean((tokens - tokens.mean()) * scales)) / spread if spread else 0.0
    exponent = min(max(slope, 0.0), LARGEST_EXPONENT)
    factor = math.exp(float(scales.mean() - exponent * tokens.mean()))
    return CriticalBatch(float(f"{factor:.6g}"), round(exponent, 6))
