"""RMS norm of queries or keys and their rotary embedding as one kernel forward and one backward, in Pallas for Triton.

XLA makes several passes of the two, with float32 arrays between them, and moves three times the bytes. Here what is read and written is the
heads alone, and cosines and sines once for all heads of a token. The backward pass starts from the input again.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

from consyn_jax.distributed.mesh import partition_spec
from consyn_jax.model.branched_norm import load, store
from consyn_jax.model.transformer import Rope

ELEMENTS = 1024  # of each half of a head that a program has at once: 32 tokens of heads of 64, 16 bytes of bf16 a thread; of seven within 4 % of an H200's best
NUM_WARPS = 4


def norm_rope(x_BTNH: Float[Array, "B T N H"], scale_H: Float[Array, " H"], rope: Rope, eps: float, heads: str = "heads") -> Float[Array, "B T N H"]:
    """`apply_rope(rms_norm(x, scale, eps), rope)`, but rounded only once, at the end; on the mesh in context if there is one.

    Args:
        rope: of `rope_table`; it gets no gradient.
        eps: above zero.
        heads: the logical name of the axis N.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _norm_rope(x_BTNH, scale_H, *rope, eps)
    spec, angles = partition_spec(("batch", "sequence", heads, None)), partition_spec(("batch", "sequence", None, None))
    # check_vma off: the kernel's custom call does not say over which axes its result varies
    local = jax.shard_map(lambda *given: _norm_rope(*given, eps), in_specs=(spec, partition_spec((None,)), angles, angles), out_specs=spec, check_vma=False)
    return local(x_BTNH, scale_H, *rope)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _norm_rope(x: Any, scale: Any, cos: Any, sin: Any, eps: float) -> jax.Array:
    return _forward(x, scale, cos, sin, eps)[0]


def _forward(x: Any, scale: Any, cos: Any, sin: Any, eps: float) -> Any:
    return _call(_norm_rope_forward, (x,), scale, cos, sin, eps, sums=0)[0], (x, scale, cos, sin)


def _backward(eps: float, kept: Any, dout: jax.Array) -> Any:
    x, scale, cos, sin = kept
    dx, dscale = _call(_norm_rope_backward, (x, dout), scale, cos, sin, eps, sums=1)
    return dx, jnp.sum(dscale, axis=0).astype(scale.dtype), None, None


_norm_rope.defvjp(_forward, _backward)


def _call(kernel: Any, arrays: tuple[jax.Array, ...], scale: Any, cos: Any, sin: Any, eps: float, sums: int) -> Any:
    """A program has all heads of a few tokens. What it gives: an array like `arrays`, and `sums` arrays [programs, H], float32."""
    B, T, N, H = arrays[0].shape
    assert pl.next_power_of_2(H) == H >= 16, "tiles are powers of two"
    assert B * T * N * H < 2**31, "kernels count elements in 32 bits"
    own = ELEMENTS // (H // 2)
    programs = pl.cdiv(B * T, own)
    heads, angles = pl.BlockSpec((own, N, H), lambda i: (i, 0, 0)), pl.BlockSpec((own, H // 2), lambda i: (i, 0))
    out, *summed = pl.pallas_call(
        partial(kernel, num_tokens=B * T, eps=eps),
        grid=(programs,),
        in_specs=[*[heads] * len(arrays), pl.BlockSpec((H,), lambda i: (0,)), angles, angles],
        out_specs=[heads, *[pl.BlockSpec((None, H), lambda i: (i, 0))] * sums],
        out_shape=[jax.ShapeDtypeStruct((B * T, N, H), arrays[0].dtype), *[jax.ShapeDtypeStruct((programs, H), jnp.float32)] * sums],
        compiler_params=pltriton.CompilerParams(num_warps=NUM_WARPS),
        name=kernel.__name__.strip("_"),
    )(*(a.reshape(B * T, N, H) for a in arrays), scale, *(a.reshape(B * T, H // 2) for a in (cos, sin)))
    return out.reshape(B, T, N, H), *summed


# ------------------------------------------------------------------------------------------------------------------------- kernels


def _setting(scale_ref: Any, cos_ref: Any, sin_ref: Any, num_tokens: int) -> Any:
    """Both halves of a head, as Triton joins no arrays; which tokens there are; scale, cosines and sines."""
    own, h = cos_ref.shape
    a, b = pl.ds(0, h), pl.ds(h, h)
    there = jnp.broadcast_to((pl.program_id(0) * own + jnp.arange(own) < num_tokens)[:, None], (own, h))
    return a, b, there, scale_ref[a][None, :], scale_ref[b][None, :], load(cos_ref, there), load(sin_ref, there)


def _mean(a: jax.Array, b: jax.Array) -> jax.Array:
    return (jnp.sum(a, axis=1) + jnp.sum(b, axis=1))[:, None] / (2 * a.shape[1])


def _norm_rope_forward(x_ref, scale_ref, cos_ref, sin_ref, out_ref, *, num_tokens, eps):
    a, b, there, scale_a, scale_b, cos, sin = _setting(scale_ref, cos_ref, sin_ref, num_tokens)

    def of_head(n, carry):
        xa, xb = load(x_ref.at[:, n, a], there), load(x_ref.at[:, n, b], there)
        inverse = jax.lax.rsqrt(_mean(xa * xa, xb * xb) + eps)
        ya, yb = xa * inverse * scale_a, xb * inverse * scale_b
        store(out_ref.at[:, n, a], ya * cos - yb * sin, there)
        store(out_ref.at[:, n, b], yb * cos + ya * sin, there)
        return carry

    jax.lax.fori_loop(0, x_ref.shape[1], of_head, 0)


def _norm_rope_backward(x_ref, dout_ref, scale_ref, cos_ref, sin_ref, dx_ref, dscale_ref, *, num_tokens, eps):
    a, b, there, scale_a, scale_b, cos, sin = _setting(scale_ref, cos_ref, sin_ref, num_tokens)

    def of_head(n, dscale):
        xa, xb = load(x_ref.at[:, n, a], there), load(x_ref.at[:, n, b], there)
        da, db = load(dout_ref.at[:, n, a], there), load(dout_ref.at[:, n, b], there)
        inverse = jax.lax.rsqrt(_mean(xa * xa, xb * xb) + eps)
        xa, xb = xa * inverse, xb * inverse  # normed
        dya, dyb = da * cos + db * sin, db * cos - da * sin
        ga, gb = dya * scale_a, dyb * scale_b
        along = _mean(ga * xa, gb * xb)
        store(dx_ref.at[:, n, a], inverse * (ga - xa * along), there)
        store(dx_ref.at[:, n, b], inverse * (gb - xb * along), there)
        return dscale[0] + dya * xa, dscale[1] + dyb * xb

    nothing = jnp.zeros(cos_ref.shape, jnp.float32)
    dscale_a, dscale_b = jax.lax.fori_loop(0, x_ref.shape[1], of_head, (nothing, nothing))
    dscale_ref[a], dscale_ref[b] = jnp.sum(dscale_a, axis=0), jnp.sum(dscale_b, axis=0)
