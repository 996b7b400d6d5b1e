"""RMS norm, and the reference implementations of the two fused norm kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from consyn_jax.model.rope import Rope, apply_rope


@partial(jax.checkpoint, static_argnums=2)
@jax.named_scope("norm")
def rms_norm(
    x: Float[Array, "*B D"], scale_D: Float[Array, " D"], eps: float
) -> Float[Array, "*B D"]:
    """RMS norm, x / sqrt(mean(x^2) + eps) * scale, in float32 (Zhang and Sennrich, 2019).

    The backward pass recomputes the norm from `x`, because saved float32 intermediates would take
    more memory than everything else in a block.
    """
    x32 = x.astype(jnp.float32)
    return (
        x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps) * scale_D
    ).astype(x.dtype)


def norm_then_branch(
    x_BTD: Float[Array, "B T D"],
    scale_D: Float[Array, " D"],
    eps: float,
    uses: int,
    added_BTD: Float[Array, "B T D"] | None = None,
) -> tuple[Float[Array, "B T D"], ...]:
    """Return y = x + added, and `uses` copies of norm(y), one for each matmul that reads it.

    This is the reference for the kernel `branched_norm`.
    """
    if added_BTD is not None:
        x_BTD = x_BTD + added_BTD
    return x_BTD, *[rms_norm(x_BTD, scale_D, eps)] * uses


def norm_then_rope(
    x_BTNH: Float[Array, "B T N H"],
    scale_H: Float[Array, " H"],
    rope: Rope,
    eps: float,
    heads: str = "heads",
) -> Float[Array, "B T N H"]:
    """Apply RMS norm, then the rotary embedding, to queries or keys.

    This is the reference for the kernel `norm_rope`.

    Args:
        heads: Logical name of the axis N, which only the kernel needs.
    """
    return apply_rope(rms_norm(x_BTNH, scale_H, eps), rope)


Rotate = Callable[[jax.Array, jax.Array, Rope, float, str], jax.Array]


def rotated(
    x_BTNH: Float[Array, "B T N H"],
    scale_H: Float[Array, " H"] | None,
    rope: Rope,
    eps: float,
    heads: str,
    rotate: Rotate,
) -> Float[Array, "B T N H"]:
    """Return queries or keys after norm and rotary embedding, or after the latter alone.

    Args:
        scale_H: Scale of the norm; None if the model does not norm its queries and keys.
        heads: Logical name of the axis N.
        rotate: Norms and rotates, from `Norms`.
    """
    return (
        apply_rope(x_BTNH, rope) if scale_H is None else rotate(x_BTNH, scale_H, rope, eps, heads)
    )


class Norms(NamedTuple):
    """The norm functions of a block.

    Attributes:
        branch: Normalises the residual stream; has the signature of `norm_then_branch`.
        rotate: Normalises and rotates queries or keys; has the signature of `norm_then_rope`.
        merges: Whether it is faster to compute two matmuls of the same normalised input as one.
    """

    branch: Callable[..., tuple[jax.Array, ...]] = norm_then_branch
    rotate: Rotate = norm_then_rope
    merges: bool = False


NORMS = Norms()
