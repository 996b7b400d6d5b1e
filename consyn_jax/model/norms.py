"""RMS norm, and the two uses of it in a block that kernels can replace."""

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

    The backward pass recomputes from `x`: saving the float32 intermediates would cost more memory
    than everything else in a block.
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
    """Return x + added, and `uses` copies of its norm, one for each matmul that reads it.

    The readable reference for the kernel `branched_norm`.
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
    """Norm and rotate queries or keys.

    The readable reference for the kernel `norm_rope`. Only the kernel needs `heads`, the logical
    name of the axis N.
    """
    return apply_rope(rms_norm(x_BTNH, scale_H, eps), rope)


class Norms(NamedTuple):
    """The norms of a block: `branch` for the residual stream, `rotate` for queries and keys.

    `merges` says whether matmuls that read the same norm are faster as one.
    """

    branch: Callable[..., tuple[jax.Array, ...]] = norm_then_branch
    rotate: Callable[[jax.Array, jax.Array, Rope, float, str], jax.Array] = norm_then_rope
    merges: bool = False


NORMS = Norms()
