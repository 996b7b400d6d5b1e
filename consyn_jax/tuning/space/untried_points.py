"""Draw points of a finite search space that no trial has tried, as long as there are any."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from consyn_jax.tuning.search_space import Dimension

MOST_DRAWS = 20  # by the sampler, before any untried point is taken
Point = tuple[Any, ...]


def num_points(space: Sequence[Dimension]) -> int | None:
    """Number of points of a search space; None if it has a range of real numbers.

    >>> num_points([Dimension("num_layers", 2, 6), Dimension("optimizer", choices=("a", "b"))])
    10
    """
    if not all(dimension.choices or dimension.is_whole for dimension in space):
        return None
    return math.prod(len(_values(dimension)) for dimension in space)


def _values(dimension: Dimension) -> Sequence[Any]:
    return dimension.choices or range(int(dimension.low), int(dimension.high) + 1)


class UntriedPoints:
    """A sampler of Optuna that repeats the draws of another sampler until a point is new.

    It has the methods of `optuna.samplers.BaseSampler`, which cannot be its base class, because
    Optuna is imported only where it is used.

    Args:
        sampler: the other sampler.
        space: a search space with a finite number of points.
        distributions: Optuna's distribution of each flag.
        trials: function that returns all trials of the study. The study that Optuna passes to a
            sampler has only part of them with `--pruner hyperband`.
        seed: seed of the draw among untried points, used if the other sampler draws none of them.
    """

    def __init__(
        self,
        sampler: Any,
        space: Sequence[Dimension],
        distributions: Mapping[str, Any],
        trials: Callable[[], Sequence[Any]],
        seed: int,
    ) -> None:
        self._sampler, self._space, self._seed = sampler, space, seed
        self._distributions, self._trials = dict(distributions), trials

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        """All flags, because a point must be new as a whole."""
        return self._distributions

    def sample_relative(self, study: Any, trial: Any, space: Any) -> dict[str, Any]:
        """Draw a point that no other trial has tried; if all are tried, draw any point."""
        names = list(self._distributions)
        tried = {
            tuple(other.params.get(name) for name in names)
            for other in self._trials()
            if other.number != trial.number
        }
        for _ in range(MOST_DRAWS):
            drawn = self._draw(study, trial)
            if tuple(drawn[name] for name in names) not in tried:
                return drawn
        new = self._any_untried(tried)
        return drawn if new is None else dict(zip(names, new, strict=True))

    def _any_untried(self, tried: set[Point]) -> Point | None:
        draw, values = random.Random(self._seed), [_values(dimension) for dimension in self._space]
        size = math.prod(map(len, values))
        while len(tried) < size / 2:  # the space may be too large to list
            point = tuple(draw.choice(each) for each in values)
            if point not in tried:
                return point
        points = [point for point in itertools.product(*values) if point not in tried]
        return draw.choice(points) if points else None

    def _draw(self, study: Any, trial: Any) -> dict[str, Any]:
        sampler = self._sampler
        space = sampler.infer_relative_search_space(study, trial)
        drawn = sampler.sample_relative(study, trial, space)
        return {
            name: drawn[name]
            if name in drawn
            else sampler.sample_independent(study, trial, name, distribution)
            for name, distribution in self._distributions.items()
        }

    def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
        """Draw a value of a flag with the other sampler."""
        return self._sampler.sample_independent(study, trial, name, distribution)

    def before_trial(self, study: Any, trial: Any) -> None:
        """Tell the sampler that a trial begins."""
        self._sampler.before_trial(study, trial)

    def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
        """Tell the sampler that a trial has ended."""
        self._sampler.after_trial(study, trial, state, values)
