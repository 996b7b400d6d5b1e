"""The simple noise scale of McCandlish et al. (2018): how many tokens a step can average usefully.

A batch below it has a gradient that is mostly noise, so doubling the batch nearly halves the steps;
above it, more tokens in a step hardly help. It is tr(S) / |G|^2, with the true gradient G and the
covariance S of the gradient of a token. Both are estimated from micro-batches without bias
(appendix A.1 there).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from consyn_jax.config import RunConfig
from consyn_jax.data.loader import prefetch
from consyn_jax.distributed.mesh import local_rows, placer
from consyn_jax.model.parameters import Params
from consyn_jax.training.inputs.batch_source import BatchSource
from consyn_jax.training.program import TRAIN_AXES, Program
from consyn_jax.training.step import Batch, Objective

MICRO_BATCHES = 32  # in one measurement


@dataclass(frozen=True)
class GradientNoise:
    """The gradient's signal and noise at one place in training.

    Attributes:
        signal: estimate of |G|^2, which noise can make negative.
        noise: estimate of tr(S), of the gradient of a single token.
    """

    signal: float
    noise: float

    @property
    def scale(self) -> float | None:
        """The noise scale in tokens; None if the signal is lost in the noise, or there is none.

        Micro-batches that all have the whole of a tiny text differ by rounding alone.
        """
        return self.noise / self.signal if min(self.signal, self.noise) > 0 else None


def gradient_noise(
    mean_square: float, square_of_mean: float, micro_batches: int, tokens: float
) -> GradientNoise:
    """Estimate signal and noise from the gradients of micro-batches.

    A gradient over b tokens has the expected squared norm |G|^2 + tr(S) / b; two values of b give
    both. Tokens that depend on each other, as those of a sequence do, count as the fewer tokens
    that would have as much noise.

    Args:
        mean_square: mean of the squared norms.
        square_of_mean: squared norm of the mean.
        tokens: in a micro-batch.

    >>> gradient_noise(3.0, 2.0, 2, 10.0)
    GradientNoise(signal=1.0, noise=20.0)
    """
    m = micro_batches
    signal = (m * square_of_mean - mean_square) / (m - 1)
    return GradientNoise(signal, tokens * (mean_square - square_of_mean) * m / (m - 1))


def measured_noise(
    program: Program,
    params: Params,
    source: BatchSource,
    run: RunConfig,
    step: int,
    micro_batches: int = MICRO_BATCHES,
) -> GradientNoise:
    """Measure the noise on the micro-batches that a run reads after `step`, without dropout.

    Args:
        program: of the run; its parameters are not changed.
    """
    budget, mesh = run.budget, program.mesh
    calm = replace(program, regularisation=replace(program.regularisation, dropout=0.0))
    shape = micro_batches, budget.batch_size, run.row_length
    compiled = calm.lower_forward(
        lambda p, batch: squared_norms(calm.objective, p, batch),
        calm.batch_like(shape, TRAIN_AXES),
    ).compile()
    first = -(-step * budget.gradient_accumulation_steps // micro_batches)  # nothing seen before
    rows = local_rows(mesh, budget.batch_size)
    batches = source.training(first, budget.batch_size, micro_batches, rows)
    with prefetch(batches, depth=1, transform=placer(mesh, TRAIN_AXES)) as ready:
        squares = jax.device_get(compiled(params, next(ready)))
    mean_square, square_of_mean, tokens = map(float, squares)
    return gradient_noise(mean_square, square_of_mean, micro_batches, tokens)


def squared_norms(
    objective: Objective, params: Params, batch: Batch
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Gradients of the mean loss of each micro-batch of [A, B, T], one at a time.

    Returns:
        The mean of their squared norms, the squared norm of their mean, and the mean tokens of a
        micro-batch.
    """

    def add(total: Params, part: Batch) -> tuple[Params, tuple[jax.Array, jax.Array]]:
        (_, sums), gradients = jax.value_and_grad(objective, has_aux=True)(params, part)
        terms = jnp.maximum(sums.terms, 1.0)
        gradients = jax.tree.map(lambda g: g / terms, gradients)
        square = optax.tree.norm(gradients, squared=True)
        return jax.tree.map(jnp.add, total, gradients), (square, terms)

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, (squares, tokens) = jax.lax.scan(add, zeros, batch)
    mean = jax.tree.map(lambda g: g / len(squares), total)
    return squares.mean(), optax.tree.norm(mean, squared=True), tokens.mean()
