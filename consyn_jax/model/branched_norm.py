"""RMS norm where the residual stream branches into it, in Pallas for Triton: backward, what all branches bring back is summed in the same kernel.

XLA adds the gradients of the products that read the normed stream in one pass, reduces in a second and adds the residual's gradient in a third.
Here what each brings is read once, and the stream's gradient written once. The backward pass starts from the stream again.
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

from consyn_jax.distributed.mesh import mesh_sizes, partition_spec, split_axes

ROWS = 32  # that a program has, one after another: 2,000 programs for verse's tokens, and as few partial sums of the scale's gradient. No other was tried.
ELEMENTS = 8  # of a row that a thread has, 16 bytes of bf16, if `MAX_WARPS` suffice. No other was tried.
MAX_WARPS = 16


def branched_norm(x_BTD: Float[Array, "B T D"], scale_D: Float[Array, " D"], eps: float, uses: int) -> tuple[Float[Array, "B T D"], ...]:
    """x, and `uses` times `rms_norm(x, scale, eps)`, one for each that reads it; on the mesh in context if there is one.

    What the readers bring back is summed in float32 in the kernel; but where a mesh axis splits the readers themselves, and so each brings back only a
    part of its gradient, XLA sums the parts first: else it would sum over devices for each reader, not once for all.

    Args:
        eps: above zero.
    """
    sizes = mesh_sizes()
    if math.prod(sizes.values()) > math.prod(sizes[axis] for axis in split_axes(sizes, "batch", "sequence")):
        x, normed = _branched_norm(x_BTD, scale_D, eps, 1)
        return x, *[normed] * uses
    return _branched_norm(x_BTD, scale_D, eps, uses)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _branched_norm(x: Any, scale: Any, eps: float, uses: int) -> Any:
    return _forward(x, scale, eps, uses)[0]


def _forward(x: Any, scale: Any, eps: float, uses: int) -> Any:
    (normed,) = _on_the_mesh(_branched_norm_forward, scale, (x,), eps, sums=0)
    return (x, *[normed] * uses), (x, scale)


def _backward(eps: float, uses: int, kept: Any, given: tuple[jax.Array, ...]) -> Any:
    x, scale = kept
    dx, dscale = _on_the_mesh(_branched_norm_backward, scale, (x, *given), eps, sums=1)
    return dx, dscale.astype(scale.dtype)


_branched_norm.defvjp(_forward, _backward)


def _on_the_mesh(kernel: Any, scale: Any, arrays: tuple[jax.Array, ...], eps: float, sums: int) -> Any:
    """Each device its own tokens. Inside of the custom derivative: that of `shard_map` would sum whole arrays over `tensor`, which splits nothing here."""
    axes = split_axes(mesh_sizes(), "batch", "sequence")

    def local(scale: Any, *arrays: Any) -> Any:
        out, *partial_sums = _call(kernel, scale, arrays, eps, sums)
        return out, *(jax.lax.psum(jnp.sum(a, axis=0), axes) for a in partial_sums)

    if jax.sharding.get_abstract_mesh().empty:
        return local(scale, *arrays)
    tokens, whole = partition_spec(("batch", "sequence", None)), partition_spec((None,))
    # check_vma off: the kernel's custom call does not say over which axes its result varies
    specs: dict[str, Any] = {"in_specs": (whole, *[tokens] * len(arrays)), "out_specs": (tokens, *[whole] * sums)}
    return jax.shard_map(local, **specs, check_vma=False)(scale, *arrays)


def _call(kernel: Any, scale: Any, arrays: tuple[jax.Array, ...], eps: float, sums: int) -> Any:
    """What a kernel gives: an array like `arrays`, and `sums` arrays [programs, D], float32."""
    B, T, D = arrays[0].shape
    assert B * T * D < 2**31, "kernels count elements in 32 bits"
    width, programs = pl.next_power_of_2(D), pl.cdiv(B * T, ROWS)
    rows = pl.BlockSpec((ROWS, width), lambda i: (i, 0))  # wider than the array where D is no power of two: kernels mask the rest
    out, *summed = pl.pallas_call(
        partial(kernel, num_rows=B * T, dim=D, eps=eps),
        grid=(programs,),
        in_specs=[pl.BlockSpec((width,), lambda i: (0,)), *[rows] * len(arrays)],
        out_specs=[rows, *[pl.BlockSpec((None, width), lambda i: (i, 0))] * sums],
        out_shape=[jax.ShapeDtypeStruct((B * T, D), arrays[0].dtype), *[jax.ShapeDtypeStruct((programs, D), jnp.float32)] * sums],
        compiler_params=pltriton.CompilerParams(num_warps=max(1, min(MAX_WARPS, width // (32 * ELEMENTS)))),
        name=kernel.__name__.strip("_"),
    )(scale, *(a.reshape(B * T, D) for a in arrays))
    return out.reshape(B, T, D), *summed


# ------------------------------------------------------------------------------------------------------------------------- kernels


def _setting(scale_ref: Any, num_rows: int, dim: int) -> Any:
    """Which columns there are, where not all; how many rows the program has; scale."""
    (width,) = scale_ref.shape
    there = None if width == dim else jnp.arange(width) < dim
    return there, jnp.minimum(ROWS, num_rows - pl.program_id(0) * ROWS), load(scale_ref, there)


def load(ref: Any, there: Any) -> jax.Array:
    """As float32, with zeros for what there is not, which add nothing to sums; None: all is there."""
    return pltriton.load(ref, mask=there, other=None if there is None else 0.0).astype(jnp.float32)


def store(ref: Any, value: jax.Array, there: Any) -> None:
    """What there is, in the dtype of `ref`."""
    pltriton.store(ref, value.astype(ref.dtype), mask=there)


def _branched_norm_forward(scale_ref, x_ref, out_ref, *, num_rows, dim, eps):
    there, rows, scale = _setting(scale_ref, num_rows, dim)

    def of_row(row, carry):
        x = load(x_ref.at[row], there)
        store(out_ref.at[row], x * jax.lax.rsqrt(jnp.sum(x * x) / dim + eps) * scale, there)
        return carry

    jax.lax.fori_loop(0, rows, of_row, 0)


def _branched_norm_backward(scale_ref, x_ref, dresidual_ref, *refs, num_rows, dim, eps):
    *dnormed_refs, dx_ref, dscale_ref = refs
    there, rows, scale = _setting(scale_ref, num_rows, dim)

    def of_row(row, dscale):
        x, dresidual = load(x_ref.at[row], there), load(dresidual_ref.at[row], there)
        dy = sum(load(ref.at[row], there) for ref in dnormed_refs)
        g = dy * scale
        squares, along = jnp.sum(x * x), jnp.sum(g * x)  # neither waits for the other
        inverse = jax.lax.rsqrt(squares / dim + eps)
        x *= inverse  # normed
        store(dx_ref.at[row], dresidual + inverse * (g - x * (along * inverse / dim)), there)
        return dscale + dy * x

    store(dscale_ref, jax.lax.fori_loop(0, rows, of_row, jnp.zeros(scale.shape, jnp.float32)), there)
