"""Pallas kernels for Triton: SwiGLU and its backward pass, with 8-bit outputs in both layouts."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

from consyn_jax.distributed.mesh import mesh_sizes, on_each_device, split_axes
from consyn_jax.model.fp8.quantisation import FORWARD, GRADIENT, Quantised, Scale, narrowed
from consyn_jax.model.kernels.branched_norm import load, store

# Tokens and columns of a tile: 16 elements per thread. Both layouts are written 64 bytes at a time,
# and the registers allow at least 28 warps per multiprocessor. This follows from the compiled code;
# no other choice was measured.
TILE, NUM_WARPS = 64, 8

Activation = Float[Array, "B T F"]
Written = tuple[Quantised, Float[Array, ""]]


def eight_bit_swiglu(gate_BTF: Activation, up_BTF: Activation, scale: Scale) -> Written:
    """Return silu(gate) * up in e4m3, and its largest magnitude.

    The reference is `swiglu_in_8_bits`. The kernel runs on the current mesh, if one is set.
    """
    (written,) = _on_the_mesh(_forward, (scale,), (gate_BTF, up_BTF), FORWARD)
    return written


def eight_bit_swiglu_gradients(
    gate_BTF: Activation, up_BTF: Activation, dhidden_BTF: Activation, scales: tuple[Scale, Scale]
) -> tuple[Written, Written]:
    """Return the gradients of `gate` and of `up` in e5m2, each with its largest magnitude.

    The reference is `swiglu_gradients_in_8_bits`.
    """
    dgate, dup = _on_the_mesh(_backward, scales, (gate_BTF, up_BTF, dhidden_BTF), GRADIENT)
    return dgate, dup


def _on_the_mesh(
    kernel: Any, scales: tuple[Any, ...], arrays: tuple[jax.Array, ...], dtype: Any
) -> list[Written]:
    """Run a kernel with one output for each scale."""
    axes = split_axes(mesh_sizes(), "batch", "sequence", "mlp")

    def local(scales: Any, *arrays: Any) -> Any:
        values, values_T, largest = _call(kernel, scales, arrays, dtype)
        return values, values_T, [jax.lax.pmax(jnp.max(a), axes) for a in largest]

    tokens, transposed = ("batch", "sequence", "mlp"), ("mlp", "batch", "sequence")
    count = len(scales)
    run = on_each_device(
        local,
        ([()] * count, *[tokens] * len(arrays)),
        ([tokens] * count, [transposed] * count, [()] * count),
    )
    written = zip(*run(list(scales), *arrays), scales, strict=True)
    return [(Quantised(a, a_T, scale), largest) for a, a_T, largest, scale in written]


def _call(kernel: Any, scales: Any, arrays: tuple[jax.Array, ...], dtype: Any) -> Any:
    """Return three lists with one array per scale: values, transposed values, tile maxima."""
    B, T, F = arrays[0].shape
    assert B * T * F < 2**31, "kernels count elements in 32 bits"
    rows, columns, count = pl.cdiv(B * T, TILE), pl.cdiv(F, TILE), len(scales)
    here = pl.BlockSpec((TILE, TILE), lambda i, j: (i, j))
    found = pl.pallas_call(
        partial(_kernel, kernel, num_rows=B * T, dim=F, count=count),
        grid=(rows, columns),
        in_specs=[*[pl.BlockSpec((1,), lambda i, j: (0,))] * count, *[here] * len(arrays)],
        out_specs=[
            *[here] * count,
            *[pl.BlockSpec((TILE, TILE), lambda i, j: (j, i))] * count,
            *[pl.BlockSpec((1,), lambda i, j: (i * columns + j,))] * count,
        ],
        out_shape=[
            *[jax.ShapeDtypeStruct((B * T, F), dtype)] * count,
            *[jax.ShapeDtypeStruct((F, B * T), dtype)] * count,
            *[jax.ShapeDtypeStruct((rows * columns,), jnp.float32)] * count,
        ],
        compiler_params=pltriton.CompilerParams(num_warps=NUM_WARPS),
        name=f"eight_bit_swiglu{kernel.__name__}",
    )(*(s.reshape(1) for s in scales), *(a.reshape(B * T, F) for a in arrays))
    values, transposed = found[:count], found[count : 2 * count]
    return (
        [a.reshape(B, T, F) for a in values],
        [a.reshape(F, B, T) for a in transposed],
        found[2 * count :],
    )


def _kernel(compute, *refs, num_rows, dim, count):
    scale_refs, in_refs, out_refs = refs[:count], refs[count : -3 * count], refs[-3 * count :]
    at = jnp.arange(TILE)
    exists_row = pl.program_id(0) * TILE + at < num_rows
    exists_column = pl.program_id(1) * TILE + at < dim
    exists = exists_row[:, None] & exists_column[None, :]
    computed = compute(*(load(ref, exists) for ref in in_refs))
    for i, y in enumerate(computed):
        values_ref, transposed_ref, largest_ref = out_refs[i::count]
        y8 = narrowed(y, 1 / scale_refs[i][0], values_ref.dtype)
        store(values_ref, y8, exists)
        store(transposed_ref, y8.T, exists.T)
        largest_ref[0] = jnp.max(jnp.abs(y))


def _forward(gate, up):
    return (gate * jax.nn.sigmoid(gate) * up,)


def _backward(gate, up, dhidden):
    share = jax.nn.sigmoid(gate)
    silu = gate * share
    return dhidden * up * (share + silu * (1 - share)), dhidden * silu
