"""Muon: orthogonalised updates for the matrices inside the blocks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from consyn_jax.model.parameters import Params, map_axes
from consyn_jax.optimizer_config import OptimizerOptions
from consyn_jax.training.optim.adam import adam
from consyn_jax.training.optim.groups import is_block_matrix, matrix_sides

# The root mean square of AdamW's updates, so that one rate and one decay suit both (Liu et al.,
# 2025, section 2.2).
UPDATE_RMS = 0.2


def muon(options: OptimizerOptions, logical_axes: Params) -> optax.GradientTransformation:
    """Optax transformation with Muon for the matrices inside the blocks, and Adam for the rest.

    Source: Jordan et al. (2024). Each layer's matrix is reshaped to [inputs, outputs].
    """
    labels = map_axes(lambda axes: "muon" if is_block_matrix(axes) else "adamw", logical_axes)
    numbers = map_axes(
        lambda axes: (
            MuonDimensionNumbers(*matrix_sides(axes))
            if is_block_matrix(axes)
            else optax.MaskedNode()
        ),
        logical_axes,
    )

    def resize(updates: Any, params: Any) -> Any:
        def scaled(x: jax.Array, number: MuonDimensionNumbers) -> jax.Array:
            longest = max(np.prod([x.shape[axis] for axis in side]) for side in number)
            return x * (UPDATE_RMS * float(longest) ** 0.5)

        return jax.tree.map(scaled, updates, numbers)

    directions = optax.chain(
        scale_by_muon(
            beta=options.momentum_decay,
            mu_dtype=jnp.dtype(options.moment_dtype),
            weight_dimension_numbers=numbers,
        ),
        optax.stateless(resize),
    )
    return optax.partition({"muon": directions, "adamw": adam(options)}, labels)
