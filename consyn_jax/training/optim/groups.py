"""Groups of parameters, which can differ in weight decay and learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from consyn_jax.errors import UserError
from consyn_jax.model.parameters import MupFactors, Params, map_axes, mup_factors
from consyn_jax.model_config import ModelConfig
from consyn_jax.optimizer_config import OptimizerOptions
from consyn_jax.training.program_arguments import Number
from consyn_jax.validation import parse_multipliers

Axes = tuple[str | None, ...]


def is_matrix(axes: Axes) -> bool:
    """Whether a parameter is a matrix, rather than the scale of a norm or a bias.

    A matrix has an axis for the residual stream or for the rank of an adapter, and at least one
    more.
    """
    dims = [axis for axis in axes if axis != "layers"]
    return ("embed" in dims or "rank" in dims) and len(dims) > 1


def is_block_matrix(axes: Axes) -> bool:
    """Whether a parameter is a stack of matrices, one per block."""
    return "layers" in axes and is_matrix(axes)


def matrix_sides(axes: Axes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the indices of a matrix's input dimensions, and of its output dimensions.

    In a matrix of an adapter, one side is the rank. In other matrices, one side is the residual
    stream.

    >>> matrix_sides(("layers", "embed", "heads", "head_dim"))
    ((1,), (2, 3))
    >>> matrix_sides(("layers", "heads", "head_dim", "embed"))
    ((1, 2), (3,))
    """
    side = "rank" if "rank" in axes else "embed"
    stream = axes.index(side)
    others = tuple(i for i, axis in enumerate(axes) if axis not in (side, "layers"))
    return ((stream,), others) if stream < others[0] else (others, (stream,))


def decay_mask(logical_axes: Params) -> Any:
    """Return a tree like `logical_axes`: True for matrices, which decay, False for the rest.

    Norms and biases do not decay. Embeddings decay, as in nanoGPT (after Brown et al., 2020). In
    OLMo 2 (2025), embeddings do not decay; here they do, because a tied embedding is also the
    output matrix.
    """
    return map_axes(is_matrix, logical_axes)


def parameter_groups(logical_axes: Params) -> Any:
    """Return a tree like `logical_axes` with the name of each parameter's group.

    The names are those of `--lr_multipliers`, in `optimizer_config.PARAMETER_GROUPS`.
    """

    def group(path: Any, axes: Axes) -> str:
        if not is_matrix(axes):
            return "norms"
        if "layers" in axes:
            names = {key.key for key in path}
            return "mlp" if names & {"gate", "up", "down"} else "attention"
        return "head" if path[-1].key == "output" else "embedding"

    return jax.tree_util.tree_map_with_path(
        group, logical_axes, is_leaf=lambda axes: isinstance(axes, tuple)
    )


def rate_multipliers(multipliers: Mapping[str, Number], logical_axes: Params) -> Any:
    """Return a tree like `logical_axes` with the learning-rate multiplier of each parameter.

    Raises:
        UserError: There is a multiplier for a group that the model does not have.
    """
    groups = parameter_groups(logical_axes)
    present = set(jax.tree.leaves(groups))
    for name in multipliers:
        if name not in present:
            why = ": its output embedding is the input embedding" if name == "head" else ""
            raise UserError(
                f"--lr_multipliers has {name}, but the model has no such parameters{why}. Its "
                f"groups are {', '.join(sorted(present))}."
            )
    return jax.tree.map(lambda name: multipliers.get(name, 1.0), groups)


def mup_rates(config: ModelConfig, options: OptimizerOptions, logical_axes: Params) -> Any:
    """Return a tree like `logical_axes` with muP's learning-rate factors; None without muP."""
    if options.base is None:
        return None
    # The factors are for Adam, whose update is large in a few directions. An orthogonal update is
    # equally large in all directions, so its largest singular value grows only with the square root
    # of the width (Yang, Simon and Bernstein, 2023).
    orthogonal = (config.hidden_dim / options.base.hidden_dim) ** 0.5

    def rate(axes: Axes, factors: MupFactors) -> float:
        is_orthogonal = options.rule.block_matrices_only and is_block_matrix(axes)
        return factors.rate * (orthogonal if is_orthogonal else 1.0)

    return map_axes(rate, logical_axes, mup_factors(config, options.base, logical_axes))


def describe_groups(options: OptimizerOptions, shapes: Params, logical_axes: Params) -> str:
    """Describe the groups of parameters, with their counts and how the optimizer treats them.

    Args:
        shapes: The parameters, or their shapes.
    """

    def count(mask: Any) -> str:
        members = zip(jax.tree.leaves(shapes), jax.tree.leaves(mask), strict=True)
        sizes = [leaf.size for leaf, is_member in members if is_member]
        return f"{len(sizes)} tensor{'' if len(sizes) == 1 else 's'}, {sum(sizes):,} parameters"

    decays = decay_mask(logical_axes)
    parts = [
        f"decayed: {count(decays)}",
        f"not decayed: {count(jax.tree.map(lambda d: not d, decays))}",
    ]
    if options.rule.block_matrices_only:
        parts.append(f"by {options.optimizer}: {count(map_axes(is_block_matrix, logical_axes))}")
    groups = parameter_groups(logical_axes)
    if options.base is not None:
        base = options.base
        small = f"{base.num_layers} layers of width {base.hidden_dim}"
        parts.append(f"rates scaled by muP from a model with {small}")
    for name, factor in parse_multipliers(options.lr_multipliers).items():
        members = jax.tree.map(lambda group, name=name: group == name, groups)
        parts.append(f"{name} at {factor:g} x the rate: {count(members)}")
    return "; ".join(parts)
