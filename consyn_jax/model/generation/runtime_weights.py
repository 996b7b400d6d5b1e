"""Weights in the layout for generation: one dict per layer, in the compute dtype.

Training stacks the layers of a parameter in one array. With that layout, generation would copy each
layer out of the stack for every token.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from consyn_jax.distributed.mesh import sharding
from consyn_jax.model.linear import linear
from consyn_jax.model.matrices.frozen_matrix import INPUTS, FrozenMatrix
from consyn_jax.model.matrices.quantised_matrix import Int8Matrix, quantised
from consyn_jax.model.parameters import Params, layout
from consyn_jax.model_config import ModelConfig

Weights = dict[str, Any]  # "embedding", "norm", "output" if untied, "layers": a tuple of dicts


def product(x: jax.Array, w: Any) -> jax.Array:
    """Compute `x @ w`, where `w` is an array, an int8 matrix or a matrix with an adapter.

    For an int8 matrix, the product is scaled, not the weights.
    """
    if isinstance(w, FrozenMatrix):
        return w.times(x)
    if not isinstance(w, Int8Matrix):
        return linear(x, w)
    # The barrier makes the weights depend on x. Without it, the compiler would dequantise all
    # layers before the loop, and keep the dequantised weights in memory.
    values, x = jax.lax.optimization_barrier((w.values, x))
    y = jnp.matmul(
        x, values.reshape(x.shape[-1], -1).astype(x.dtype), preferred_element_type=jnp.float32
    )
    return (y * w.scale.reshape(-1)).astype(x.dtype)


def mesh_of(params: Params) -> Mesh | None:
    """The mesh over which parameters are sharded; None if they are on one device."""
    found = getattr(jax.tree.leaves(params)[0], "sharding", None)
    spread = isinstance(found, NamedSharding) and found.mesh.size > 1
    return found.mesh if spread else None  # type: ignore[union-attr]


def runtime_weights(
    config: ModelConfig, params: Params, dtype: Any, int8: bool = False, consume: bool = False
) -> Weights:
    """Convert the parameters of a model to the weights that generation uses.

    Args:
        params: Parameters in the structure of `layout(config)`, on one device or on a mesh; their
            sharding is kept.
        dtype: Compute dtype, and the dtype of all weights that are not in int8.
        int8: Quantise the matrices of the blocks to int8. Embeddings and norms stay in `dtype`,
            because they are sensitive or small.
        consume: Remove each parameter from `params` when it is converted, so that at most one is in
            memory twice.
    """
    mesh, axes = mesh_of(params), layout(config).logical_axes
    layers: list[dict[str, Any]] = [{} for _ in range(config.num_layers)]
    stacked = params["layers"]
    for name in list(stacked):
        value = stacked.pop(name) if consume else stacked[name]
        inputs = INPUTS.get(name) if int8 else None
        for layer, part in zip(
            layers, _unstacked(value, axes["layers"][name], mesh, dtype, inputs), strict=True
        ):
            layer[name] = part
        del value
    outside = {name: params[name] for name in params if name != "layers"}
    if consume:
        params.clear()
    return {name: value.astype(dtype) for name, value in outside.items()} | {
        "layers": tuple(layers)
    }


def _unstacked(
    value: Any, axes: tuple[str | None, ...], mesh: Mesh | None, dtype: Any, inputs: int | None
) -> tuple[Any, ...]:
    """Split a stacked parameter into its layers, and convert them to `dtype` or to int8.

    A matrix with an adapter is split, but not converted.

    Args:
        axes: Logical axes of the stacked parameter.
        inputs: For int8, the number of input dimensions of a matrix (see `quantised`); else None.
    """
    if isinstance(value, FrozenMatrix):
        layers = range(jax.tree.leaves(value)[0].shape[0])
        return tuple(jax.tree.map(lambda x, i=i: x[i], value) for i in layers)
    where: Any = None
    if mesh is not None:
        one: Any = sharding(mesh, axes[1:])
        if inputs is not None:
            one = Int8Matrix(one, sharding(mesh, axes[1 + inputs :]))
        where = (one,) * value.shape[0]
    return _split(where, jnp.dtype(dtype), inputs)(jnp.asarray(value))


@cache
def _split(where: Any, dtype: Any, inputs: int | None) -> Any:
    """The jitted function that splits and converts a parameter for `_unstacked`.

    Args:
        where: Shardings of the layers.
    """

    def split(value: jax.Array) -> tuple[Any, ...]:
        layers = (value[i] for i in range(value.shape[0]))
        if inputs is None:
            return tuple(layer.astype(dtype) for layer in layers)
        return tuple(map(partial(quantised, inputs=inputs), layers))

    return jax.jit(split, out_shardings=where)
