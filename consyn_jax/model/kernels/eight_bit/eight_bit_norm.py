"""RMS norm that writes 8-bit floats in both layouts, in Pallas for Triton.

XLA would write the norm in 16 bits, and then read it twice: to cast it and to transpose it. Each
program of this kernel reads a few rows twice. The first pass computes their mean squares, and
writes x + added if there is something to add. In the second pass, the rows are in the GPU's cache.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

from consyn_jax.distributed.mesh import mesh_sizes, on_each_device, split_axes
from consyn_jax.model.fp8.quantisation import FORWARD, Quantised, Scale, narrowed
from consyn_jax.model.kernels.branched_norm import load, store

# Rows per program, and columns that a program processes at once (16 elements per thread). A column
# of the transposed output is written 32 bytes at a time, the smallest unit of a GPU's memory. Each
# multiprocessor runs one program at a time, so that the rows of all programs stay in the cache: 17
# MB for rows of 2,048 elements. This was derived from the compiled code, and not measured.
ROWS, COLUMNS, NUM_WARPS = 32, 256, 16


def eight_bit_norm(
    x_BTD: Float[Array, "B T D"],
    scale_D: Float[Array, " D"],
    eps: float,
    scale: Scale,
    added_BTD: Float[Array, "B T D"] | None = None,
) -> tuple[Float[Array, "B T D"], Quantised, Float[Array, ""]]:
    """Return x + added, its RMS norm in e4m3, and the largest magnitude in the norm.

    The reference is `norm_in_8_bits`. The kernel runs on the current mesh, if one is set.

    Args:
        eps: Added to the mean square; must be above zero.
        scale: Scale of the 8-bit norm.
        added_BTD: A branch to add to x before the norm; the sum is rounded to the dtype of x.
    """
    axes = split_axes(mesh_sizes(), "batch", "sequence")

    def local(scale_D: Any, scale: Any, *arrays: Any) -> Any:
        *found, largest = _call(scale_D, scale, arrays, eps)
        return *found, jax.lax.pmax(jnp.max(largest), axes)

    tokens, transposed = ("batch", "sequence", None), (None, "batch", "sequence")
    arrays = (x_BTD,) if added_BTD is None else (x_BTD, added_BTD)
    sums = () if added_BTD is None else (tokens,)
    run = on_each_device(
        local, ((None,), (), *[tokens] * len(arrays)), (*sums, tokens, transposed, ())
    )
    *stream, values, values_T, largest = run(scale_D, scale, *arrays)
    return stream[0] if stream else x_BTD, Quantised(values, values_T, scale), largest


def _call(scale_D: Any, scale: Any, arrays: tuple[jax.Array, ...], eps: float) -> Any:
    """Run the kernel.

    Returns:
        x + added (only if there are two arrays), the 8-bit norm, its transpose, and the largest
        magnitude that each program found.
    """
    B, T, D = arrays[0].shape
    assert B * T * D < 2**31, "kernels count elements in 32 bits"
    programs, columns = pl.cdiv(B * T, ROWS), min(COLUMNS, pl.next_power_of_2(D))
    width = pl.cdiv(D, columns) * columns
    rows = pl.BlockSpec((ROWS, width), lambda i: (i, 0))
    sums = len(arrays) - 1
    found = pl.pallas_call(
        partial(_kernel, num_rows=B * T, dim=D, columns=columns, eps=eps),
        grid=(programs,),
        in_specs=[
            pl.BlockSpec((width,), lambda i: (0,)),
            pl.BlockSpec((1,), lambda i: (0,)),
            *[rows] * len(arrays),
        ],
        out_specs=[
            *[rows] * (sums + 1),
            pl.BlockSpec((width, ROWS), lambda i: (0, i)),
            pl.BlockSpec((1,), lambda i: (i,)),
        ],
        out_shape=[
            *[jax.ShapeDtypeStruct((B * T, D), arrays[0].dtype)] * sums,
            jax.ShapeDtypeStruct((B * T, D), FORWARD),
            jax.ShapeDtypeStruct((D, B * T), FORWARD),
            jax.ShapeDtypeStruct((programs,), jnp.float32),
        ],
        compiler_params=pltriton.CompilerParams(num_warps=NUM_WARPS),
        name="added_eight_bit_norm" if sums else "eight_bit_norm",
    )(scale_D, scale.reshape(1), *(a.reshape(B * T, D) for a in arrays))
    *stream, values, values_T, largest = found
    stream = [a.reshape(B, T, D) for a in stream]
    return *stream, values.reshape(B, T, D), values_T.reshape(D, B, T), largest


def _kernel(norm_ref, scale_ref, *refs, num_rows, dim, columns, eps):
    *in_refs, values_ref, transposed_ref, largest_ref = refs
    x_ref, *sums = in_refs  # `sums`: what is added to x, and where the sum is written
    exists_row = pl.program_id(0) * ROWS + jnp.arange(ROWS) < num_rows
    steps = norm_ref.shape[0] // columns

    def tile(j):
        """Return the columns of tile j as a slice, and the masks of valid columns and elements."""
        exists_column = j * columns + jnp.arange(columns) < dim
        exists = exists_row[:, None] & exists_column[None, :]
        return pl.ds(j * columns, columns), exists_column, exists

    def add_squares(j, squares):
        at, _, exists = tile(j)
        x = load(x_ref.at[:, at], exists)
        if sums:
            added_ref, sum_ref = sums
            x = x + load(added_ref.at[:, at], exists)
            x = x.astype(sum_ref.dtype).astype(jnp.float32)  # normalise the rounded sum
            store(sum_ref.at[:, at], x, exists)
        return squares + jnp.sum(x * x, axis=1)

    squares = jax.lax.fori_loop(0, steps, add_squares, jnp.zeros((ROWS,), jnp.float32))
    factor = jax.lax.rsqrt(squares / dim + eps)
    inverse = 1 / scale_ref[0]
    if sums:
        pltriton.debug_barrier()  # threads read what other threads of this program have written
        _, x_ref = sums

    def write(j, largest):
        at, exists_column, exists = tile(j)
        normed = load(x_ref.at[:, at], exists) * factor[:, None]
        y = normed * load(norm_ref.at[at], exists_column)[None, :]
        y8 = narrowed(y, inverse, values_ref.dtype)
        store(values_ref.at[:, at], y8, exists)
        store(transposed_ref.at[at, :], y8.T, exists.T)
        return jnp.maximum(largest, jnp.max(jnp.abs(y)))

    largest_ref[0] = jax.lax.fori_loop(0, steps, write, jnp.float32(0))
