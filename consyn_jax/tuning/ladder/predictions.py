"""Predictions of the fitted curve: losses of larger models, and the best size for a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from consyn_jax.tuning.ladder.critical_batch import BatchPoint, CriticalBatch, fit_batch
from consyn_jax.tuning.ladder.ladder_options import Budget
from consyn_jax.tuning.ladder.model_family import TARGETS, Target, scaled_target, target
from consyn_jax.tuning.ladder.scaling_law import LossPoint, ScalingLaw, bootstrap, fit, interval

SIZES = np.geomspace(1e4, 1e13, 181)  # candidates for the best size


@dataclass(frozen=True)
class Prediction:
    """The predicted loss of a model after training on a number of tokens.

    Attributes:
        interval: 90 % bootstrap interval of the loss.
        sizes: 90 % bootstrap interval of the best size for a budget; None if the size was given.
        batch: critical batch size, in tokens; None if the noise was not measured.
    """

    target: Target
    tokens: float
    loss: float
    interval: tuple[float, float]
    batch: float | None
    sizes: tuple[float, float] | None = None

    @property
    def flops(self) -> float:
        """Total training FLOPs."""
        return self.tokens * self.target.flops


@dataclass(frozen=True)
class Forecast:
    """A fitted ladder, and the predictions from it.

    Args:
        points: losses at the ends of runs.
        batches: measured noise scales.
        vocab_size: vocabulary size of the data.
        length: length of the data's sequences, in tokens.
        draws: number of bootstrap resamples.
    """

    points: Sequence[LossPoint]
    batches: Sequence[BatchPoint]
    vocab_size: int
    length: int
    draws: int

    @cached_property
    def law(self) -> ScalingLaw:
        """The scaling law fitted to all points."""
        return fit(self.points)

    @cached_property
    def laws(self) -> list[ScalingLaw]:
        """Scaling laws fitted to bootstrap resamples."""
        return bootstrap(self.points, self.draws)

    @cached_property
    def batch(self) -> CriticalBatch | None:
        """The law of the critical batch size; None if there are too few measurements."""
        return fit_batch(self.batches)

    @cached_property
    def error(self) -> float:
        """The law's median relative error at the fitted points."""
        errors = [self.law.loss(p.parameters, p.tokens) / p.loss - 1 for p in self.points]
        return float(np.median(np.abs(errors)))

    def predicted(
        self, model: Target, tokens: float, sizes: tuple[float, float] | None = None
    ) -> Prediction:
        """Predict the loss of a model after training on this many tokens."""
        losses = [law.loss(model.parameters, tokens) for law in self.laws]
        loss = self.law.loss(model.parameters, tokens)
        batch = None if self.batch is None else self.batch.tokens(tokens)
        return Prediction(model, tokens, loss, interval(losses), batch, sizes)

    def targets(self, budget: Budget | None, tokens_per_parameter: float) -> list[Prediction]:
        """Predict the loss of each preset in `TARGETS`, when trained with a budget.

        Args:
            budget: FLOPs or tokens for each model; None to train each model on
                `tokens_per_parameter` times as many tokens as it has parameters.
        """
        found = []
        for name in TARGETS:
            model = target(name, None, self.vocab_size, self.length)
            if budget is None:
                tokens = tokens_per_parameter * model.parameters
            else:
                tokens = budget.amount / (model.flops if budget.kind == "flops" else 1.0)
            found.append(self.predicted(model, tokens))
        return found

    def best(self, flops: float) -> Prediction:
        """Predict the size with the lowest loss for these FLOPs, and its number of tokens."""
        sizes = [self._best_size(law, flops) for law in self.laws]
        model = scaled_target(self._best_size(self.law, flops), self.vocab_size, self.length)
        return self.predicted(model, flops / model.flops, interval(sizes))

    def lowest(self, flops: float) -> float:
        """The lowest loss of any size with these FLOPs."""
        parameters, cost = self._family
        return float(np.min(self.law.loss(parameters, flops / cost)))

    def _best_size(self, law: ScalingLaw, flops: float) -> float:
        parameters, cost = self._family
        return float(parameters[np.argmin(law.loss(parameters, flops / cost))])

    @cached_property
    def _family(self) -> tuple[np.ndarray, np.ndarray]:
        """For models of the sizes `SIZES`: number of parameters, and training FLOPs per token."""
        models = [scaled_target(size, self.vocab_size, self.length) for size in SIZES]
        return np.array([m.parameters for m in models]), np.array([m.flops for m in models])
