"""The backward pass of `norm_rope`, which writes only 8 bits, in both layouts."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

from consyn_jax.distributed.mesh import mesh_sizes, on_each_device, split_axes
from consyn_jax.model.fp8.quantisation import GRADIENT, Quantised, Scale, narrowed
from consyn_jax.model.kernels.branched_norm import store
from consyn_jax.model.kernels.norm_rope import (
    fits,
    gradients_of_head,
    load_common,
    tokens_that_exist,
)
from consyn_jax.model.rope import Rope

# Tokens of a program, which processes all heads of these tokens. A column of the transposed output
# is written 32 bytes at a time, the smallest unit of a GPU's memory. Each thread has 8 elements of
# each half of a head, if heads have 128. This was derived from the compiled code, and not measured.
TOKENS, ELEMENTS = 32, 8


def eight_bit_rotation_gradients(
    x_BTNH: Float[Array, "B T N H"],
    scale_H: Float[Array, " H"],
    rope: Rope,
    eps: float,
    heads: str,
    dout_BTNH: Float[Array, "B T N H"],
    scale: Scale,
) -> tuple[tuple[Quantised, Float[Array, ""]], Float[Array, " H"]]:
    """Return the gradients of queries or keys before norm and rotation, and of the norm's scale.

    The reference is `rotation_gradients_in_8_bits`. The kernel runs on the current mesh, if one is
    set.
    """
    axes = split_axes(mesh_sizes(), "batch", "sequence", heads)

    def local(x: Any, dout: Any, *others: Any) -> Any:
        values, values_T, largest, dscale = _call(x, dout, *others, eps=eps)
        largest = jax.lax.pmax(jnp.max(largest), axes)
        return values, values_T, largest, jax.lax.psum(jnp.sum(dscale, axis=0), axes)

    tokens, angles = ("batch", "sequence", heads, None), ("batch", "sequence", None, None)
    run = on_each_device(
        local,
        (tokens, tokens, (None,), angles, angles, ()),
        (("batch", "sequence", heads), (heads, "batch", "sequence"), (), (None,)),
    )
    values, values_T, largest, dscale = run(x_BTNH, dout_BTNH, scale_H, *rope, scale)
    return (Quantised(values, values_T, scale), largest), dscale.astype(scale_H.dtype)


def _call(x: Any, dout: Any, scale_H: Any, cos: Any, sin: Any, scale: Any, *, eps: float) -> Any:
    """Run the kernel.

    Returns:
        The gradient [B, T, N * H], its transpose, the largest magnitude that each program found,
        and the gradient of the norm's scale for each program.
    """
    B, T, N, H = x.shape
    assert fits(H)
    assert B * T * N * H < 2**31, "kernels count elements in 32 bits"
    programs = pl.cdiv(B * T, TOKENS)
    heads = pl.BlockSpec((TOKENS, N, H), lambda i: (i, 0, 0))
    angles = pl.BlockSpec((TOKENS, H // 2), lambda i: (i, 0))
    values, values_T, largest, dscale = pl.pallas_call(
        partial(_kernel, num_tokens=B * T, eps=eps),
        grid=(programs,),
        in_specs=[
            *[heads] * 2,
            pl.BlockSpec((H,), lambda i: (0,)),
            *[angles] * 2,
            pl.BlockSpec((1,), lambda i: (0,)),
        ],
        out_specs=[
            heads,
            pl.BlockSpec((N, H, TOKENS), lambda i: (0, 0, i)),
            pl.BlockSpec((1,), lambda i: (i,)),
            pl.BlockSpec((None, H), lambda i: (i, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((B * T, N, H), GRADIENT),
            jax.ShapeDtypeStruct((N, H, B * T), GRADIENT),
            jax.ShapeDtypeStruct((programs,), jnp.float32),
            jax.ShapeDtypeStruct((programs, H), jnp.float32),
        ],
        compiler_params=pltriton.CompilerParams(
            num_warps=max(1, TOKENS * H // 2 // (32 * ELEMENTS))
        ),
        name="eight_bit_norm_rope_backward",
    )(
        *(a.reshape(B * T, N, H) for a in (x, dout)),
        scale_H,
        *(a.reshape(B * T, H // 2) for a in (cos, sin)),
        scale.reshape(1),
    )
    return values.reshape(B, T, N * H), values_T.reshape(N * H, B, T), largest, dscale


def _kernel(
    x_ref,
    dout_ref,
    norm_ref,
    cos_ref,
    sin_ref,
    scale_ref,
    values_ref,
    transposed_ref,
    largest_ref,
    dscale_ref,
    *,
    num_tokens,
    eps,
):
    inverse, exists = 1 / scale_ref[0], tokens_that_exist(cos_ref, num_tokens)

    def head_step(n, carry):
        # Angles in registers for all heads would let only one program run per multiprocessor.
        common = load_common(norm_ref, cos_ref, sin_ref, exists)
        a, b, *_ = common
        gradients, found = gradients_of_head(x_ref, dout_ref, n, common, eps)
        largest, *dscale = carry
        for half, dx in zip((a, b), gradients, strict=True):
            largest = jnp.maximum(largest, jnp.max(jnp.abs(dx), axis=1))
            dx8 = narrowed(dx, inverse, values_ref.dtype)
            store(values_ref.at[:, n, half], dx8, exists)
            store(transposed_ref.at[n, half, :], dx8.T, exists.T)
        return largest, dscale[0] + found[0], dscale[1] + found[1]

    own, h = cos_ref.shape
    nothing = jnp.zeros((own, h), jnp.float32)
    start = jnp.zeros((own,), jnp.float32), nothing, nothing
    largest, *dscale = jax.lax.fori_loop(0, x_ref.shape[1], head_step, start)
    largest_ref[0] = jnp.max(largest)
    dscale_ref[:h], dscale_ref[h:] = (jnp.sum(found, axis=0) for found in dscale)
