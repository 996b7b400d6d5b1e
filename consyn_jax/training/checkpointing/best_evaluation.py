"""The best evaluation of a run, and early stopping."""

from __future__ import annotations

import math
from dataclasses import dataclass

from consyn_jax.evaluation_metrics import is_greater_better


@dataclass
class Selection:
    """The best evaluation so far, and the number of evaluations without improvement.

    All of it is in every checkpoint, so that a resumed run takes the same decisions.

    Attributes:
        best_value, best_step: None before the first evaluation.
        stale: consecutive evaluations that did not improve on `reference` by more than the minimum.
        reference: the value that early stopping compares with. A best model that is better by less
            than the minimum does not change it.
    """

    best_value: float | None = None
    best_step: int | None = None
    stale: int = 0
    reference: float | None = None

    def update(self, metric: str, value: float, step: int, min_delta: float = 0.0) -> bool:
        """Take in an evaluation, and return whether it is the best; NaN never is.

        Args:
            min_delta: early stopping counts an improvement above this, in units of the metric.
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
            patience: consecutive evaluations without improvement; None never stops.
            min_steps: the first step at which it may stop.
        """
        return patience is not None and self.stale >= patience and step >= min_steps
