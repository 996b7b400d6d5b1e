"""Fit loss as a function of parameters and tokens, with its uncertainty.

L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al., 2022, approach 3). E is the irreducible
loss. The other terms are the excess loss of a model with only N parameters, and the excess loss of
training on only D tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares, nnls

HUBER_DELTA = 1e-3  # for errors in log(loss), as in the paper
EXPONENTS = np.geomspace(0.05, 1.6, 11)  # grid of (alpha, beta) for the starting points
STARTS, STARTS_OF_A_DRAW = 6, 2  # starting points of a fit, and of a fit to a bootstrap draw
LOWEST_EXPONENT, HIGHEST_EXPONENT = 0.01, 2.0
FEWEST_SIZES, FEWEST_POINTS = 3, 6  # a law has five constants
# Losses of shorter runs were far from the curve, and moved its predictions (benchmarks/ladder.py).
FEW_STEPS = 250
# Shorter runs are left out only if this many points remain; draws of fewer points hardly differ.
FEWEST_LEFT = 8
DRAWS = 200
COVERED = (0.05, 0.95)  # quantiles of the bootstrap values at the ends of an interval
Numbers = Any  # a float or an array


@dataclass(frozen=True)
class LossPoint:
    """The evaluation at the end of a run, after the learning rate has decayed.

    Attributes:
        parameters: number of parameters of the model, without embeddings.
        tokens: number of tokens trained on.
        loss: evaluation loss, in nats per token.
    """

    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class ScalingLaw:
    """The constants of L(N, D) = E + A / N^alpha + B / D^beta, named as in the paper."""

    e: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, parameters: Numbers, tokens: Numbers) -> Numbers:
        """The loss of a model of this size after training on this many tokens.

        >>> round(ScalingLaw(1.69, 406.4, 410.7, 0.34, 0.28).loss(70e9, 1.4e12), 3)  # Chinchilla
        1.937
        """
        return self.e + self.a / parameters**self.alpha + self.b / tokens**self.beta

    def text(self) -> str:
        """The law as a formula."""
        return (
            f"loss = {self.e:.3g} + {self.a:.3g} / N^{self.alpha:.2f} "
            f"+ {self.b:.3g} / D^{self.beta:.2f}"
        )


class _Problem:
    """The least-squares problem of the fit: residuals in log(loss), with well-scaled unknowns.

    The unknowns are log E, log(A / N^alpha), log(B / D^beta), alpha and beta, where N and D are the
    geometric means over all points.
    """

    def __init__(self, points: Sequence[LossPoint]) -> None:
        n, d, self.losses = np.array([(p.parameters, p.tokens, p.loss) for p in points]).T
        self.middle = np.array([np.log(n).mean(), np.log(d).mean()])
        self.n, self.d = np.log(n) - self.middle[0], np.log(d) - self.middle[1]
        top = math.log(self.losses.max())
        self.low = np.array([top - 12.0, top - 12.0, top - 12.0, LOWEST_EXPONENT, LOWEST_EXPONENT])
        self.high = np.array(
            [math.log(self.losses.min()), top + 3.0, top + 3.0, HIGHEST_EXPONENT, HIGHEST_EXPONENT]
        )

    def terms(self, x: np.ndarray) -> np.ndarray:
        """The three terms of the loss at each point."""
        e, a, b, alpha, beta = x
        return np.exp([np.full_like(self.n, e), a - alpha * self.n, b - beta * self.d])

    def errors(self, x: np.ndarray) -> np.ndarray:
        """log(predicted loss / measured loss) at each point."""
        found: np.ndarray = np.log(self.terms(x).sum(axis=0) / self.losses)
        return found

    def slopes(self, x: np.ndarray) -> np.ndarray:
        """The derivative of each error with respect to each unknown."""
        shares = self.terms(x)
        e, a, b = shares / shares.sum(axis=0)
        return np.stack([e, a, b, -a * self.n, -b * self.d], axis=1)

    def starts(self, count: int) -> list[np.ndarray]:
        """Find starting points: the best-fitting pairs of exponents on a grid.

        For fixed exponents, the loss is linear in the other constants, so linear least squares
        finds these constants.
        """
        found = []
        one = np.ones_like(self.n)
        for alpha in EXPONENTS:
            for beta in EXPONENTS:
                columns = np.stack([one, np.exp(-alpha * self.n), np.exp(-beta * self.d)], axis=1)
                terms, error = nnls(columns / self.losses[:, None], one)
                start = np.array([*np.log(np.maximum(terms, 1e-9)), alpha, beta])
                found.append((error, start))
        found.sort(key=lambda pair: pair[0])
        return [start for _, start in found[:count]]

    def solved(self, starts: Sequence[np.ndarray]) -> tuple[float, np.ndarray]:
        """Minimise the Huber loss from each start; return the lowest loss and its unknowns."""
        best: tuple[float, np.ndarray] | None = None
        margin = 1e-6
        for start in starts:
            found = least_squares(
                self.errors,
                np.clip(start, self.low + margin, self.high - margin),
                self.slopes,
                bounds=(self.low, self.high),
                loss="huber",
                f_scale=HUBER_DELTA,
                max_nfev=200,
            )
            if best is None or found.cost < best[0]:
                best = float(found.cost), found.x
        assert best is not None
        return best

    def law(self, x: np.ndarray) -> ScalingLaw:
        """The scaling law for these values of the unknowns."""
        e, a, b, alpha, beta = x
        n, d = self.middle
        return ScalingLaw(
            math.exp(e), math.exp(a + alpha * n), math.exp(b + beta * d), float(alpha), float(beta)
        )


def can_fit(points: Sequence[LossPoint]) -> bool:
    """Whether there are enough points, sizes and run lengths to fit the five constants."""
    sizes, lengths = {p.parameters for p in points}, {p.tokens for p in points}
    enough = len(set(points)) >= FEWEST_POINTS
    return enough and min(len(sizes), len(lengths)) >= FEWEST_SIZES


def long_enough(points: Sequence[LossPoint], tokens_per_step: int) -> list[LossPoint]:
    """The points of runs with at least `FEW_STEPS` steps; all points if these are too few to fit.

    The loss of a shorter run depends more on its number of steps than on its tokens.
    """
    found = [point for point in points if point.tokens >= FEW_STEPS * tokens_per_step]
    return found if can_fit(found) and len(found) >= FEWEST_LEFT else list(points)


def fit(points: Sequence[LossPoint]) -> ScalingLaw:
    """Fit a law by minimising the Huber loss of log(loss) errors, from several starting points.

    A least-squares solver with bounds replaces the paper's L-BFGS. It minimises the same sum, which
    is so flat that L-BFGS may stop before the minimum (Besiroglu et al., 2024).
    """
    problem = _Problem(points)
    return problem.law(problem.solved(problem.starts(STARTS))[1])


def bootstrap(points: Sequence[LossPoint], draws: int = DRAWS, seed: int = 0) -> list[ScalingLaw]:
    """Fit laws to points drawn with replacement; the spread of the laws shows the uncertainty.

    A draw with too few sizes or run lengths is replaced by another.
    """
    random, laws = np.random.default_rng(seed), list[ScalingLaw]()
    while len(laws) < draws:
        drawn = [points[i] for i in random.integers(len(points), size=len(points))]
        if can_fit(drawn):
            problem = _Problem(drawn)
            laws.append(problem.law(problem.solved(problem.starts(STARTS_OF_A_DRAW))[1]))
    return laws


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The 90 % interval of the values: from the 5th to the 95th percentile.

    >>> interval(range(101))
    (5.0, 95.0)
    """
    low, high = np.quantile(np.asarray(values, np.float64), COVERED)
    return float(low), float(high)
