"""Embedding lookup, with a backward pass written by hand for sharded tables."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from consyn_jax.distributed.mesh import constrain, mesh_sizes, on_each_device, split_axes


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(
    table_VD: Float[Array, "V D"], ids: Int[Array, "*B"], dtype: Any
) -> Float[Array, "*B D"]:
    """Look up rows of a float32 table, and return them in `dtype`.

    On a mesh, devices exchange the rows in `dtype`. The table's gradient is summed in float32.
    """
    return constrain(table_VD.astype(dtype), "vocab", None)[ids]


def _forward(table: jax.Array, ids: jax.Array, dtype: Any) -> Any:
    return lookup(table, ids, dtype), (ids, jax.ShapeDtypeStruct(table.shape, jnp.float32))


def _backward(dtype: Any, saved: Any, dx: jax.Array) -> tuple[jax.Array, None]:
    ids, table = saved
    # By hand: the compiler would sum the full gradient over all devices before it shards it.
    local = on_each_device(
        partial(_sum_rows, shape=table.shape, sizes=mesh_sizes()),
        (("batch", "sequence", None), ("batch", "sequence")),
        ("vocab", "embed"),
    )
    return local(dx, ids), None


lookup.defvjp(_forward, _backward)


def _sum_rows(
    dx: jax.Array, ids: jax.Array, *, shape: tuple[int, int], sizes: dict[str, int]
) -> jax.Array:
    """This device's shard of the table's gradient, summed over the tokens of all devices."""
    vocab_axes = split_axes(sizes, "vocab")
    rows = shape[0] // sizes["tensor"]
    at = ids - (jax.lax.axis_index(vocab_axes) * rows if vocab_axes else 0)
    dtable = (
        jnp.zeros((rows, shape[1]))
        .at[jnp.where((at >= 0) & (at < rows), at, rows)]
        .add(dx.astype(jnp.float32), mode="drop")
    )
    return sum_over_tokens(dtable, sizes)


def sum_over_tokens(dtable_VD: jax.Array, sizes: dict[str, int]) -> jax.Array:
    """Sum a [V, D] gradient over the devices that hold different tokens, inside `shard_map`.

    If the logical axis `embed` is sharded, each device receives only its columns of the sum.

    Args:
        sizes: Number of devices along each mesh axis.
    """
    embed_axes = split_axes(sizes, "embed")
    if embed_axes:
        dtable_VD = jax.lax.psum_scatter(dtable_VD, embed_axes, scatter_dimension=1, tiled=True)
    rest = tuple(axis for axis in split_axes(sizes, "batch", "sequence") if axis not in embed_axes)
    return jax.lax.psum(dtable_VD, rest) if rest else dtable_VD
