"""Adafactor: second moments factored into a row and a column per matrix."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from consyn_jax.model.parameters import Params, map_axes
from consyn_jax.optimizer_config import OptimizerOptions
from consyn_jax.training.optim.groups import Axes, is_matrix, matrix_sides
from consyn_jax.training.program_arguments import is_used

# Matrices with a side shorter than this are not factored, because their second moments take little
# memory (as in big_vision).
SMALLEST_FACTORED = 32


def adafactor(options: OptimizerOptions, logical_axes: Params) -> optax.GradientTransformation:
    """Optax transformation from gradients to Adafactor's update directions.

    Source: Shazeer and Stern, 2018. The relative step size and the scaling by parameter size are
    left out (Zhai et al., 2022, section 3.4), so that learning rates for AdamW also suit Adafactor.
    Although layers are stacked in one array, each layer's matrix [inputs, outputs] is factored and
    clipped separately.
    """

    def as_matrices(tree: Any) -> Any:
        return map_axes(_as_matrix, logical_axes, tree)

    def factored(params: Any) -> optax.GradientTransformation:
        layers = map_axes(
            lambda axes, x: x.shape[0] if "layers" in axes else 0, logical_axes, params
        )
        smallest = max(SMALLEST_FACTORED, max(jax.tree.leaves(layers)) + 1)
        # Larger than the number of layers, so that the axis of layers is never factored.
        return optax.scale_by_factored_rms(min_dim_size_to_factor=smallest)

    def init(params: Any) -> Any:
        return factored(params).init(as_matrices(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        directions, state = factored(params).update(
            as_matrices(updates), state, as_matrices(params)
        )
        directions = map_axes(_clip, logical_axes, directions)
        return jax.tree.map(lambda d, p: d.reshape(p.shape), directions, params), state

    rule = optax.GradientTransformation(init, update)
    momentum, dtype = options.momentum_decay, jnp.dtype(options.moment_dtype)
    if not is_used(momentum):
        return rule
    return optax.chain(rule, optax.ema(momentum, debias=False, accumulator_dtype=dtype))


def _as_matrix(axes: Axes, x: jax.Array) -> jax.Array:
    """Reshape a matrix to [inputs, outputs], or a stack of them to [layers, inputs, outputs]."""
    if not is_matrix(axes):
        return x
    layers = x.shape[:1] if "layers" in axes else ()
    sides = (int(np.prod([x.shape[i] for i in side])) for side in matrix_sides(axes))
    return x.reshape(*layers, *sides)


def _clip(axes: Axes, x: jax.Array) -> jax.Array:
    """Scale each layer's update down to a root mean square of at most 1."""
    own = tuple(range("layers" in axes, x.ndim))
    return x / jnp.maximum(1.0, jnp.sqrt(jnp.mean(jnp.square(x), axis=own, keepdims=True)))
