"""Embedding lookup, with a backward pass written by hand for sharded tables."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from consyn_jax.distributed.mesh import constrain, mesh_sizes, on_each_device, split_axes

BLOCK = 128  # rows; a tile of a matrix product


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
    # Written by hand, because the compiler would sum the full gradient over all devices first.
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
    """Compute this device's shard of the table's gradient, summed over all devices' tokens."""
    vocab_axes = split_axes(sizes, "vocab")
    rows = shape[0] // sizes["tensor"]
    at = ids - (jax.lax.axis_index(vocab_axes) * rows if vocab_axes else 0)
    dx_nD, at_n = dx.reshape(-1, shape[1]), jnp.where((at >= 0) & (at < rows), at, rows).reshape(-1)
    dtable = jax.lax.platform_dependent(
        *(dx_nD, at_n),
        cuda=partial(sum_rows_in_order, rows=rows),
        default=partial(scatter_rows, rows=rows),
    )
    return sum_over_tokens(dtable, sizes)


def scatter_rows(
    x_nD: Float[Array, "n D"], at_n: Int[Array, " n"], rows: int
) -> Float[Array, "rows D"]:
    """Sum the rows of `x` into a float32 table of zeros, each at its row index in `at`.

    Rows with an index outside the table are dropped. On a GPU, use `sum_rows_in_order` instead,
    because XLA would use atomic operations, which add the rows in a different order each time.
    """
    return jnp.zeros((rows, x_nD.shape[1])).at[at_n].add(x_nD.astype(jnp.float32), mode="drop")


def sum_rows_in_order(
    x_nD: Float[Array, "n D"], at_n: Int[Array, " n"], rows: int
) -> Float[Array, "rows D"]:
    """Add each row of `x` to the row of a float32 table of zeros that `at` gives.

    Unlike `scatter_rows`, this adds in a fixed order, so a GPU gives the same bits each time.
    """
    order_n = jnp.argsort(at_n, stable=True)
    table_VD = jnp.zeros((rows, x_nD.shape[1]))
    return _add_runs(table_VD, x_nD[order_n], at_n[order_n])


def _add_runs(table_VD: jax.Array, x_nD: jax.Array, at_n: jax.Array) -> jax.Array:
    """Add each row of `x` to the table, at its row index in `at`; `at` must be sorted.

    A run is a sequence of rows with the same index. Rows are divided into blocks of `BLOCK`, and a
    matmul with a matrix of zeros and ones sums each run within its block. The sum of a run
    that continues from the previous block is not added here. A recursive call, with one row per
    block, adds it.
    """
    (n, D), rows = x_nD.shape, table_VD.shape[0]
    block = min(BLOCK, 1 << (n - 1).bit_length())
    pad = -n % block
    x_brD = jnp.pad(x_nD, ((0, pad), (0, 0))).reshape(-1, block, D)
    at_br = jnp.pad(at_n, (0, pad), constant_values=rows).reshape(-1, block)
    is_next_br = at_br != jnp.pad(at_br, ((0, 0), (1, 0)), mode="edge")[:, :-1]
    in_run_brk = jnp.cumsum(is_next_br, axis=1)[:, None, :] == jnp.arange(block)[:, None]
    sums_brD = jnp.einsum(
        "brk,bkD->brD",
        in_run_brk.astype(x_nD.dtype),
        x_brD,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    place_br = jnp.min(jnp.where(in_run_brk, at_br[:, None, :], rows), axis=2)
    last_b = jnp.pad(at_br[:-1, -1], (1, 0), constant_values=-1)
    goes_on_b = at_br[:, 0] == last_b
    place_br = place_br.at[:, 0].set(jnp.where(goes_on_b, rows, place_br[:, 0]))
    # All indices differ, so no atomic operations are needed. Indices from `rows` on are dropped.
    place_n = jnp.where(
        place_br < rows, place_br, rows + jnp.arange(at_br.size).reshape(at_br.shape)
    )
    table_VD = table_VD.at[place_n.reshape(-1)].add(
        sums_brD.reshape(-1, D), mode="drop", unique_indices=True
    )
    if at_br.shape[0] == 1:
        return table_VD
    return _add_runs(table_VD, jnp.where(goes_on_b[:, None], sums_brD[:, 0], 0), at_br[:, 0])


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
