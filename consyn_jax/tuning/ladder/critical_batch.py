"""The critical batch size as a function of training tokens: a power law fitted to noise scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LARGEST_EXPONENT = 1.0  # a larger fitted exponent comes from noisy measurements
FEWEST = 3  # measurements


@dataclass(frozen=True)
class BatchPoint:
    """A measured gradient noise scale.

    Attributes:
        parameters: number of parameters of the model, without embeddings.
        tokens: number of tokens trained on at the measurement.
        scale: the noise scale, in tokens.
        run_tokens: number of training tokens of the whole run. The run's learning rate begins to
            decay at the measurement.
    """

    parameters: float
    tokens: float
    scale: float
    run_tokens: float = 0.0


@dataclass(frozen=True)
class CriticalBatch:
    """The critical batch size after training on D tokens: factor x D^exponent, in tokens.

    It grows with the data and hardly depends on the model size (Zhang et al., 2024).
    """

    factor: float
    exponent: float

    def tokens(self, trained: float) -> float:
        """The critical batch size, in tokens, after training on this many tokens."""
        return float(self.factor * trained**self.exponent)


def fit_batch(points: Sequence[BatchPoint]) -> CriticalBatch | None:
    """Fit the power law to logarithms of the points; None if there are too few points.

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
