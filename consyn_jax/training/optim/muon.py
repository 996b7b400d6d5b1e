"""Muon: orthogonalised updates for the matrices inside the blocks."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from consyn_jax.distributed.mesh import mesh_sizes
from consyn_jax.model.parameters import Params, map_axes
from consyn_jax.optimizer_config import OptimizerOptions
from consyn_jax.training.optim.adam import adam
from consyn_jax.training.optim.groups import is_block_matrix, matrix_sides

# Updates get the root mean square of AdamW's updates, so that one learning rate and one weight
# decay suit both optimizers (Liu et al., 2025, section 2.2).
UPDATE_RMS = 0.2
ITERATIONS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)  # Jordan et al. (2024)


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
    directions = optax.chain(
        scale_by_muon(  # momentum, normalised; `_orthogonal` then does the Newton-Schulz iterations
            ns_steps=0,
            beta=options.momentum_decay,
            mu_dtype=jnp.dtype(options.moment_dtype),
            weight_dimension_numbers=numbers,
        ),
        optax.stateless(lambda updates, _: _orthogonal(updates, numbers)),
    )
    return optax.partition({"muon": directions, "adamw": adam(options)}, labels)


def _orthogonal(updates: Any, numbers: Any) -> Any:
    """Orthogonalise matrices of norm 1.

    GPUs compute in bfloat16, with one batch for all matrices of the same shape. CPUs compute in
    float32, one array at a time: they multiply float32 faster than bfloat16, and larger batches
    gain nothing.

    Args:
        updates: Normalised momenta; each array has all layers of a parameter.
        numbers: The input axes and the output axes of each array (`MuonDimensionNumbers`).
    """
    leaves, tree = jax.tree.flatten(updates)
    of_leaves = jax.tree.leaves(numbers, is_leaf=lambda n: isinstance(n, MuonDimensionNumbers))
    sides = [
        tuple(math.prod(x.shape[axis] for axis in side) for side in number)
        for x, number in zip(leaves, of_leaves, strict=True)
    ]
    found = jax.lax.platform_dependent(
        [_wide(x.reshape(-1, *side)) for x, side in zip(leaves, sides, strict=True)],
        cuda=_together,
        default=lambda matrices: [_newton_schulz(x) for x in matrices],
    )
    scaled = [
        (UPDATE_RMS * math.sqrt(max(side)) * (y if side[0] <= side[1] else y.mT)).reshape(x.shape)
        for x, y, side in zip(leaves, found, sides, strict=True)
    ]
    return jax.tree.unflatten(tree, scaled)


def _wide(x: Float[Array, "n r c"]) -> Float[Array, "n R C"]:
    """Transpose matrices with more rows than columns, so that x @ x.T is smaller."""
    return x if x.shape[1] <= x.shape[2] else x.mT


def _together(matrices: list[jax.Array]) -> list[jax.Array]:
    """Orthogonalise arrays [n, r, c] in bfloat16, with one batch per matrix shape."""
    found = list(matrices)
    for shape in dict.fromkeys(x.shape[1:] for x in matrices if x.size):
        members = [i for i, x in enumerate(matrices) if x.shape[1:] == shape]
        stacked = jnp.concatenate([matrices[i].astype(jnp.bfloat16) for i in members])
        ends = list(itertools.accumulate(matrices[i].shape[0] for i in members))
        parts = jnp.split(_newton_schulz(stacked), ends[:-1])
        for i, part in zip(members, parts, strict=True):
            found[i] = part.astype(matrices[i].dtype)
    return found


def _newton_schulz(x_nrc: Float[Array, "n r c"]) -> Float[Array, "n r c"]:
    """Apply the Newton-Schulz iterations to n matrices of norm 1, divided among the devices."""
    n, sizes = x_nrc.shape[0], mesh_sizes()
    if x_nrc.size == 0:
        return x_nrc
    if axes := tuple(axis for axis in sizes if sizes[axis] > 1):
        devices = math.prod(sizes.values())
        x_nrc = jnp.pad(x_nrc, ((0, -n % devices), (0, 0), (0, 0)))
        x_nrc = jax.lax.with_sharding_constraint(x_nrc, PartitionSpec(axes, None, None))
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram_nrr = x_nrc @ x_nrc.mT
        x_nrc = a * x_nrc + (b * gram_nrr + (c * gram_nrr) @ gram_nrr) @ x_nrc
    return x_nrc[:n]
