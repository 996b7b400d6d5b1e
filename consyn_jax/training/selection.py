"""Which evaluation was the best, and when there have been too many that were not."""

from __future__ import annotations

import math
from dataclasses import dataclass

from consyn_jax.config import EVALUATION_METRICS


@dataclass
class Selection:
    """The best evaluation so far and the row of worse ones since; all of it is in every checkpoint, so a resumed run decides alike.

    Attributes:
        best_value, best_step: None before the first evaluation.
        stale: evaluations in a row that did not improve on `reference` by more than the minimum.
        reference: the value that early stopping compares with. A best model may be better by less than the minimum; this is not moved by it.
    """

    best_value: float | None = None
    best_step: int | None = None
    stale: int = 0
    reference: float | None = None

    def update(self, metric: str, value: float, step: int, min_delta: float = 0.0) -> bool:
        """Take an evaluation in; says whether it is the best. One that is not a number never is.

        Args:
            min_delta: what an improvement must exceed to count for early stopping, in units of the metric.
        """
        sign = 1.0 if EVALUATION_METRICS[metric] else -1.0
        improved = not math.isnan(value) and (self.reference is None or sign * (value - self.reference) > min_delta)
        if improved:
            self.reference, self.stale = value, 0
        else:
            self.stale += 1
        best = not math.isnan(value) and (self.best_value is None or sign * (value - self.best_value) > 0)
        if best:
            self.best_value, self.best_step = value, step
        return best

    def is_over(self, patience: int | None, step: int, min_steps: int = 0) -> bool:
        """Whether early stopping ends the run at `step`.

        Args:
            patience: evaluations in a row without improvement; None never stops.
            min_steps: no stop before this step.
        """
        return patience is not None and self.stale >= patience and step >= min_steps
