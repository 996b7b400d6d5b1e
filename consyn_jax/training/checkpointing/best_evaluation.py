"""The best evaluation of a run, and early stopping."""

from __future__ import annotations

import math
from dataclasses import dataclass

from consyn_jax.evaluation_metrics import is_greater_better


@dataclass
class Selection:
    """The best evaluation so far, and the number of evaluations without improvement.

    Every checkpoint has these values, so that a resumed run makes the same decisions.

    Attributes:
        best_value, best_step: Value and step of the best evaluation; None before the first.
        stale: Number of evaluations since `reference` last changed.
        reference: Value of the last evaluation that early stopping counted as an improvement. The
            next improvement must be better than this by more than `min_delta`. A smaller difference
            gives a new best model, but does not change `reference`.
    """

    best_value: float | None = None
    best_step: int | None = None
    stale: int = 0
    reference: float | None = None

    def update(self, metric: str, value: float, step: int, min_delta: float = 0.0) -> bool:
        """Record an evaluation; return whether it is the best so far (never for NaN).

        Args:
            min_delta: Smallest improvement that resets early stopping, in units of the metric.
        """
        sign = 1.0 if is_greater_better(metric) else -1.0
        improved = not math.isnan(value) and (
            self.reference is None or sign * (value - self.reference) > min_delta
        )
        if improved:
            self.reference, self.stale = value, 0
        else:
            self.stale += 1
        best = not math.isnan(value) and (
            self.best_value is None or sign * (value - self.best_value) > 0
        )
        if best:
            self.best_value, self.best_step = value, step
        return best

    def should_stop(self, patience: int | None, step: int, min_steps: int = 0) -> bool:
        """Whether early stopping ends the run at `step`.

        Args:
            patience: Number of consecutive evaluations without improvement that ends the run; None
                if early stopping is off.
            min_steps: First step at which the run may end.
        """
        return patience is not None and self.stale >= patience and step >= min_steps
