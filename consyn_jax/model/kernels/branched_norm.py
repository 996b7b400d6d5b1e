"""RMS norm of the residual stream for several matmuls, in Pallas for Triton.

In the backward pass, XLA passes over memory three times: to add up the gradients from all matmuls,
to compute the norm's gradient, and to add the residual's gradient. This kernel reads each of these
gradients once, and writes the sum once. It recomputes the norm from the norm's input.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

from consyn_jax.distributed.mesh import mesh_sizes, on_each_device, split_axes

# Rows that one program processes in turn. For the preset verse this makes 2,000 programs, and as
# many partial sums of the scale's gradient. No other value was tried.
ROWS = 32
# Elements of a row for each thread (16 bytes of bf16), unless a row would then need more than
# `MAX_WARPS` warps. No other value was tried.
ELEMENTS = 8
MAX_WARPS = 16


def branched_norm(
    x_BTD: Float[Array, "B T D"],
    scale_D: Float[Array, " D"],
    eps: float,
    uses: int,
    added_BTD: Float[Array, "B T D"] | None = None,
) -> tuple[Float[Array, "B T D"], ...]:
    """Return x and `uses` copies of `rms_norm(x, scale, eps)`, one for each matmul that reads it.

    The kernel runs on the current mesh, if one is set, and adds up the gradients of the copies in
    float32. With tensor parallelism, a gradient must also be summed over devices. XLA then adds up
    the copies' gradients first, so that it sums over devices once and not once per copy.

    Args:
        eps: Added to the mean square; must be above zero.
        uses: Number of matmuls that read the norm.
        added_BTD: A branch that is added to x first, rounded to the dtype of x.
    """
    is_split = splits_readers()
    kernel_uses = 1 if is_split else uses
    if added_BTD is None:
        x, *normed = _branched_norm(x_BTD, scale_D, eps, kernel_uses)
    else:
        x, *normed = _added_norm(x_BTD, added_BTD, scale_D, eps, kernel_uses)
    return x, *(normed * uses if is_split else normed)


def splits_readers() -> bool:
    """Whether the matmuls that read the norm are split over devices.

    The gradients of the norm must then be summed over these devices.
    """
    sizes = mesh_sizes()
    tokens = (sizes[axis] for axis in split_axes(sizes, "batch", "sequence"))
    return math.prod(sizes.values()) > math.prod(tokens)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _branched_norm(x: Any, scale: Any, eps: float, uses: int) -> Any:
    return _forward(x, scale, eps, uses)[0]


def _forward(x: Any, scale: Any, eps: float, uses: int) -> Any:
    (normed,) = _on_the_mesh(_branched_norm_forward, scale, (x,), eps, sums=0)
    return (x, *[normed] * uses), (x, scale)


def _backward(eps: float, uses: int, saved: Any, gradients: tuple[jax.Array, ...]) -> Any:
    x, scale = saved
    dx, dscale = _on_the_mesh(_branched_norm_backward, scale, (x, *gradients), eps, sums=1)
    return dx, dscale.astype(scale.dtype)


_branched_norm.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _added_norm(x: Any, added: Any, scale: Any, eps: float, uses: int) -> Any:
    return _added_forward(x, added, scale, eps, uses)[0]


def _added_forward(x: Any, added: Any, scale: Any, eps: float, uses: int) -> Any:
    x, normed = _on_the_mesh(_added_norm_forward, scale, (x, added), eps, sums=0, outputs=2)
    return (x, *[normed] * uses), (x, scale)


def _added_backward(eps: float, uses: int, saved: Any, gradients: tuple[jax.Array, ...]) -> Any:
    dx, dscale = _backward(eps, uses, saved, gradients)
    return dx, dx, dscale


_added_norm.defvjp(_added_forward, _added_backward)


def _on_the_mesh(
    kernel: Any,
    scale: Any,
    arrays: tuple[jax.Array, ...],
    eps: float,
    sums: int,
    outputs: int = 1,
) -> Any:
    """Run a forward or backward kernel on each device's tokens, by `shard_map`.

    The `shard_map` is inside the custom derivative. If JAX differentiated it, the gradient would
    also be summed over the mesh axis `tensor`, along which no array is sharded here.
    """
    axes = split_axes(mesh_sizes(), "batch", "sequence")

    def local(scale: Any, *arrays: Any) -> Any:
        found = _call(kernel, scale, arrays, eps, sums, outputs)
        summed = (jax.lax.psum(jnp.sum(a, axis=0), axes) for a in found[outputs:])
        return *found[:outputs], *summed

    tokens, whole = ("batch", "sequence", None), (None,)
    inputs, results = (whole, *[tokens] * len(arrays)), (*[tokens] * outputs, *[whole] * sums)
    return on_each_device(local, inputs, results)(scale, *arrays)


def _call(
    kernel: Any, scale: Any, arrays: tuple[jax.Array, ...], eps: float, sums: int, outputs: int
) -> Any:
    """Run a kernel; return `outputs` arrays [B, T, D] and `sums` float32 arrays [programs, D]."""
    B, T, D = arrays[0].shape
    assert B * T * D < 2**31, "kernels count elements in 32 bits"
    width, programs = pl.next_power_of_2(D), pl.cdiv(B * T, ROWS)
    # Blocks are wider than the array if D is not a power of two; the kernels mask the excess.
    rows = pl.BlockSpec((ROWS, width), lambda i: (i, 0))
    found = pl.pallas_call(
        partial(kernel, num_rows=B * T, dim=D, eps=eps),
        grid=(programs,),
        in_specs=[pl.BlockSpec((width,), lambda i: (0,)), *[rows] * len(arrays)],
        out_specs=[*[rows] * outputs, *[pl.BlockSpec((None, width), lambda i: (i, 0))] * sums],
        out_shape=[
            *[jax.ShapeDtypeStruct((B * T, D), arrays[0].dtype)] * outputs,
            *[jax.ShapeDtypeStruct((programs, D), jnp.float32)] * sums,
        ],
        compiler_params=pltriton.CompilerParams(
            num_warps=max(1, min(MAX_WARPS, width // (32 * ELEMENTS)))
        ),
        name=kernel.__name__.strip("_"),
    )(scale, *(a.reshape(B * T, D) for a in arrays))
    return *(a.reshape(B, T, D) for a in found[:outputs]), *found[outputs:]


# ------------------------------------------------------------------------------------------ kernels


def _load_common(scale_ref: Any, num_rows: int, dim: int, own: int) -> Any:
    """Load the scale of the norm, and find the columns and rows that this program processes.

    Args:
        own: Rows per program.

    Returns:
        A mask of the columns that exist in the array (None if all do), the number of rows, and the
        scale in float32.
    """
    (width,) = scale_ref.shape
    exists = None if width == dim else jnp.arange(width) < dim
    return exists, jnp.minimum(own, num_rows - pl.program_id(0) * own), load(scale_ref, exists)


def load(ref: Any, exists: Any, eviction_policy: str | None = None) -> jax.Array:
    """Load as float32; elements outside the mask `exists` are zero, and so do not change sums."""
    other = None if exists is None else 0.0
    loaded = pltriton.load(ref, mask=exists, other=other, eviction_policy=eviction_policy)
    return loaded.astype(jnp.float32)


def store(ref: Any, value: jax.Array, exists: Any) -> None:
    """Store the elements of `value` for which the mask `exists` is true, in the dtype of `ref`."""
    pltriton.store(ref, value.astype(ref.dtype), mask=exists)


def _branched_norm_forward(scale_ref, x_ref, out_ref, *, num_rows, dim, eps):
    exists, rows, scale = _load_common(scale_ref, num_rows, dim, x_ref.shape[0])

    def row_step(row, carry):
        x = load(x_ref.at[row], exists)
        store(out_ref.at[row], x * jax.lax.rsqrt(jnp.sum(x * x) / dim + eps) * scale, exists)
        return carry

    jax.lax.fori_loop(0, rows, row_step, 0)


def _added_norm_forward(scale_ref, x_ref, added_ref, sum_ref, out_ref, *, num_rows, dim, eps):
    exists, rows, scale = _load_common(scale_ref, num_rows, dim, x_ref.shape[0])

    def row_step(row, carry):
        x = load(x_ref.at[row], exists) + load(added_ref.at[row], exists)
        x = x.astype(sum_ref.dtype).astype(jnp.float32)  # normalise the rounded sum
        store(sum_ref.at[row], x, exists)
        store(out_ref.at[row], x * jax.lax.rsqrt(jnp.sum(x * x) / dim + eps) * scale, exists)
        return carry

    jax.lax.fori_loop(0, rows, row_step, 0)


def _branched_norm_backward(scale_ref, x_ref, dresidual_ref, *refs, num_rows, dim, eps):
    gradients_of_rows(scale_ref, x_ref, dresidual_ref, *refs, num_rows=num_rows, dim=dim, eps=eps)


def gradients_of_rows(
    scale_ref: Any,
    x_ref: Any,
    dresidual_ref: Any,
    *refs: Any,
    num_rows: int,
    dim: int,
    eps: float,
    eviction_policy: str | None = None,
) -> None:
    """Write the gradients of a program's rows, one row after the other, and its part of dscale.

    Args:
        refs: The gradients of the norm's uses, the gradient of x, and that of the scale.
        eviction_policy: For the inputs, which nothing reads again.
    """
    *dnormed_refs, dx_ref, dscale_ref = refs
    exists, rows, scale = _load_common(scale_ref, num_rows, dim, x_ref.shape[0])

    def row_step(row, dscale):
        x, dresidual, *dys = (
            load(ref.at[row], exists, eviction_policy)
            for ref in (x_ref, dresidual_ref, *dnormed_refs)
        )
        dy = sum(dys)
        g = dy * scale
        squares, along = jnp.sum(x * x), jnp.sum(g * x)  # independent sums
        inverse = jax.lax.rsqrt(squares / dim + eps)
        x *= inverse  # normed
        store(dx_ref.at[row], dresidual + inverse * (g - x * (along * inverse / dim)), exists)
        return dscale + dy * x

    nothing = jnp.zeros(scale.shape, jnp.float32)
    store(dscale_ref, jax.lax.fori_loop(0, rows, row_step, nothing), exists)
