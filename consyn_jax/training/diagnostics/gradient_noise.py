"""The simple noise scale of McCandlish et al. (2018): the useful batch size, in tokens.

With a batch smaller than the noise scale, the gradient is mostly noise, and doubling the batch
nearly halves the number of steps. With a larger batch, more tokens per step hardly help. The noise
scale is tr(S) / |G|^2, where G is the true gradient and S is the covariance of the gradient of a
single token. Both are estimated from micro-batches without bias (McCandlish et al., appendix A.1).
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

MICRO_BATCHES = 32  # per measurement


@dataclass(frozen=True)
class GradientNoise:
    """Signal and noise of the gradient at one step of training.

    Attributes:
        signal: Estimate of |G|^2, which noise can make negative.
        noise: Estimate of tr(S), for the gradient of a single token.
    """

    signal: float
    noise: float

    @property
    def scale(self) -> float | None:
        """The noise scale in tokens; None if the estimated signal or noise is not positive.

        The noise is 0, except for rounding, if all micro-batches contain the same text.
        """
        return self.noise / self.signal if min(self.signal, self.noise) > 0 else None


def gradient_noise(
    mean_square: float, square_of_mean: float, micro_batches: int, tokens: float
) -> GradientNoise:
    """Estimate signal and noise from the gradients of micro-batches.

    The squared norm of a gradient over b tokens has the expected value |G|^2 + tr(S) / b, so two
    values of b determine |G|^2 and tr(S). This formula is for independent tokens. Tokens of one
    sequence are correlated and have more noise, which the estimate of tr(S) includes.

    Args:
        mean_square: Mean of the micro-batches' squared gradient norms.
        square_of_mean: Squared norm of the mean gradient.
        tokens: Number of tokens per micro-batch.

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
    """Measure the noise on micro-batches that a run reads after `step`. Dropout is turned off.

    Args:
        program: Program of the run.
    """
    budget, mesh = run.budget, program.mesh
    calm = replace(program, regularisation=replace(program.regularisation, dropout=0.0))
    shape = micro_batches, budget.batch_size, run.row_length
    compiled = calm.lower_forward(
        lambda p, batch: squared_norms(calm.objective, p, batch),
        calm.batch_like(shape, TRAIN_AXES),
    ).compile()
    # Rounded up, so that training has not read any of these micro-batches.
    first = -(-step * budget.gradient_accumulation_steps // micro_batches)
    rows = local_rows(mesh, budget.batch_size)
    batches = source.training(first, budget.batch_size, micro_batches, rows)
    with prefetch(batches, depth=1, transform=placer(mesh, TRAIN_AXES)) as ready:
        squares = jax.device_get(compiled(params, next(ready)))
    mean_square, square_of_mean, tokens = map(float, squares)
    return gradient_noise(mean_square, square_of_mean, micro_batches, tokens)


def squared_norms(
    objective: Objective, params: Params, batch: Batch
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Compute squared gradient norms of the mean loss over the micro-batches of a batch.

    Args:
        batch: Arrays [A, B, T] of A micro-batches, each with B sequences of T tokens.

    Returns:
        The mean of the squared norms, the squared norm of the mean gradient, and the mean number of
        tokens per micro-batch.
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
