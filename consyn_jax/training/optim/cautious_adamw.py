"""Cautious AdamW: Adam that drops elements of its update whose sign differs from the gradient's."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from consyn_jax.model.parameters import Params, map_axes
from consyn_jax.optimizer_config import OptimizerOptions
from consyn_jax.training.optim.adam import adam
from consyn_jax.training.optim.groups import Axes


def cautious_adamw(options: OptimizerOptions, logical_axes: Params) -> optax.GradientTransformation:
    """Optax transformation from gradients to masked update directions of Adam.

    Source: Liang et al. (2024), algorithm 2. An element of the direction becomes 0 if its sign
    differs from the sign of the gradient. If n of d elements remain, they are multiplied by
    d / (n + 1).
    Although layers are stacked in one array, each layer is masked and scaled separately.
    """
    rule = optax.with_extra_args_support(adam(options))

    def update(
        gradients: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        directions, state = rule.update(gradients, state, params, **extra_args)
        return map_axes(_mask, logical_axes, directions, gradients), state

    return optax.GradientTransformationExtraArgs(rule.init, update)


def _mask(axes: Axes, direction: jax.Array, gradient: jax.Array) -> jax.Array:
    dims = tuple(range("layers" in axes, direction.ndim))
    agrees = (direction * gradient > 0).astype(jnp.float32)
    number, size = jnp.sum(agrees, dims, keepdims=True), math.prod(direction.shape[i] for i in dims)
    return direction * agrees * (size / (number + 1))
