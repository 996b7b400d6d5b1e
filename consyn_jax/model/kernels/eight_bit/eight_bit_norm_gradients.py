"""The backward pass of the RMS norm, which also writes its result in 8 bits, in Pallas for Triton.

The gradient of the residual stream is read in 16 bits by the norm before, and in 8 bits by the
matmul whose output was added to the stream. Each program computes the gradient of a few rows as
`branched_norm` does, writes it, and reads it again to write 8 bits in both layouts.
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
from consyn_jax.model.fp8.quantisation import GRADIENT, Quantised, narrowed
from consyn_jax.model.fp8.slots import Slot, filled
from consyn_jax.model.kernels.branched_norm import (
    ELEMENTS,
    MAX_WARPS,
    gradients_of_rows,
    load,
    splits_readers,
    store,
)

# Rows per program. The rows that a program reads again should still be in the GPU's cache. With
# 1,024 threads per multiprocessor, all programs that run at a time write 35 MB, of an H200's 50 MB.
# The transposed output is written 16 bytes at a time, half the smallest unit of a GPU's memory; the
# next program writes the other half. This was derived from the compiled code, and not measured.
ROWS = 16
ELEMENTS_OF_TILE = 16  # for each thread, when the rows are read again


def eight_bit_norm_gradients(
    x_BTD: Float[Array, "B T D"],
    scale_D: Float[Array, " D"],
    eps: float,
    dx_BTD: Float[Array, "B T D"],
    dnormed: tuple[Float[Array, "B T D"], ...],
    slot: Slot,
) -> tuple[Float[Array, "B T D"], Float[Array, " D"], Slot]:
    """Gradients of `x_BTD`, of `scale_D` and of the slot.

    The reference is `norm_gradients` (model/fp8/operands.py), which has the same arguments. The
    kernel runs on the current mesh, if one is set.
    """
    if splits_readers():
        dnormed = (sum(dnormed[1:], dnormed[0]),)
    axes = split_axes(mesh_sizes(), "batch", "sequence")

    def local(scale_D: Any, scale: Any, *arrays: Any) -> Any:
        dx, dscale, values, values_T, largest = _call(scale_D, scale, arrays, eps)
        dscale, largest = jax.lax.psum(jnp.sum(dscale, axis=0), axes), jnp.max(largest)
        return dx, dscale, values, values_T, jax.lax.pmax(largest, axes)

    tokens, transposed = ("batch", "sequence", None), (None, "batch", "sequence")
    arrays = x_BTD, dx_BTD, *dnormed
    run = on_each_device(
        local,
        ((None,), (), *[tokens] * len(arrays)),
        (tokens, (None,), tokens, transposed, ()),
    )
    assert slot.scale is not None
    dx, dscale, values, values_T, largest = run(scale_D, slot.scale, *arrays)
    written = Quantised(values, values_T, slot.scale), largest
    return dx, dscale.astype(scale_D.dtype), filled(slot, written)


def _call(scale_D: Any, scale: Any, arrays: tuple[jax.Array, ...], eps: float) -> Any:
    """Run the kernel.

    Returns:
        The gradient of x, that of the norm's scale for each program, the 8-bit gradient, its
        transpose, and the largest magnitude that each program found.
    """
    B, T, D = arrays[0].shape
    assert B * T * D < 2**31, "kernels count elements in 32 bits"
    width, programs = pl.next_power_of_2(D), pl.cdiv(B * T, ROWS)
    num_warps = max(1, min(MAX_WARPS, width // (32 * ELEMENTS)))
    columns = min(width, 32 * num_warps * ELEMENTS_OF_TILE // ROWS)
    rows = pl.BlockSpec((ROWS, width), lambda i: (i, 0))
    dx, dscale, values, values_T, largest = pl.pallas_call(
        partial(_kernel, num_rows=B * T, dim=D, columns=columns, eps=eps),
        grid=(programs,),
        in_specs=[
            pl.BlockSpec((width,), lambda i: (0,)),
            pl.BlockSpec((1,), lambda i: (0,)),
            *[rows] * len(arrays),
        ],
        out_specs=[
            rows,
            pl.BlockSpec((None, width), lambda i: (i, 0)),
            rows,
            pl.BlockSpec((width, ROWS), lambda i: (0, i)),
            pl.BlockSpec((1,), lambda i: (i,)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((B * T, D), arrays[0].dtype),
            jax.ShapeDtypeStruct((programs, D), jnp.float32),
            jax.ShapeDtypeStruct((B * T, D), GRADIENT),
            jax.ShapeDtypeStruct((D, B * T), GRADIENT),
            jax.ShapeDtypeStruct((programs,), jnp.float32),
        ],
        compiler_params=pltriton.CompilerParams(num_warps=num_warps),
        name="eight_bit_norm_backward",
    )(scale_D, scale.reshape(1), *(a.reshape(B * T, D) for a in arrays))
    shape = B, T, D
    return dx.reshape(shape), dscale, values.reshape(shape), values_T.reshape(D, B, T), largest


def _kernel(norm_ref, scale_ref, *refs, num_rows, dim, columns, eps):
    *plain, values_ref, transposed_ref, largest_ref = refs
    dx_ref = plain[-2]
    gradients_of_rows(
        norm_ref, *plain, num_rows=num_rows, dim=dim, eps=eps, eviction_policy="evict_first"
    )
    pltriton.debug_barrier()  # threads read what other threads of this program have written
    inverse = 1 / scale_ref[0]
    exists_row = pl.program_id(0) * ROWS + jnp.arange(ROWS) < num_rows

    def write(j, largest):
        at = pl.ds(j * columns, columns)
        exists_column = j * columns + jnp.arange(columns) < dim
        exists = exists_row[:, None] & exists_column[None, :]
        y = load(dx_ref.at[:, at], exists)
        y8 = narrowed(y, inverse, values_ref.dtype)
        store(values_ref.at[:, at], y8, exists)
        store(transposed_ref.at[at, :], y8.T, exists.T)
        return jnp.maximum(largest, jnp.max(jnp.abs(y)))

    steps = norm_ref.shape[0] // columns
    largest_ref[0] = jax.lax.fori_loop(0, steps, write, jnp.float32(0))
