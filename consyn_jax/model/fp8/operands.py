"""Norm, SwiGLU, rotation and their backward passes, which write 8-bit operands of matmuls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from consyn_jax.model.fp8.quantisation import FORWARD, GRADIENT, Quantised, Scale, quantise
from consyn_jax.model.fp8.slots import Slot, filled
from consyn_jax.model.norms import norm_then_rope, rms_norm, rotated
from consyn_jax.model.rope import Rope

Largest = Float[Array, ""]


def norm_in_8_bits(
    x_BTD: Float[Array, "B T D"],
    scale_D: Float[Array, " D"],
    eps: float,
    scale: Scale | None,
    added_BTD: Float[Array, "B T D"] | None = None,
) -> tuple[Float[Array, "B T D"], Quantised, Largest]:
    """Return x + added, its RMS norm in e4m3, and the largest magnitude in the norm.

    The norm is rounded once.
    """
    if added_BTD is not None:
        x_BTD = x_BTD + added_BTD
    return x_BTD, *quantise(rms_norm(x_BTD.astype(jnp.float32), scale_D, eps), FORWARD, scale)


def norm_gradients(
    x_BTD: Float[Array, "B T D"],
    scale_D: Float[Array, " D"],
    eps: float,
    dx_BTD: Float[Array, "B T D"],
    dnormed: tuple[Float[Array, "B T D"], ...],
    slot: Slot | None,
) -> tuple[Float[Array, "B T D"], Float[Array, " D"], Slot | None]:
    """Gradients of `x_BTD`, of `scale_D` and of the slot, which gets the gradient of `x_BTD`.

    Args:
        dx_BTD: Gradient of `x_BTD` without the part that comes through the norm.
        dnormed: Gradients of the norm's output, one from each matmul that reads this output.
        slot: Slot of the matmul whose output was added to the stream last; None for none.
    """
    dy_BTD = sum(dy.astype(jnp.float32) for dy in dnormed)
    pull = jax.vjp(lambda x, s: rms_norm(x, s, eps), x_BTD.astype(jnp.float32), scale_D)[1]
    own_BTD, dscale_D = pull(dy_BTD)
    dx_BTD = (dx_BTD.astype(jnp.float32) + own_BTD).astype(x_BTD.dtype)
    if slot is None:
        return dx_BTD, dscale_D, None
    return dx_BTD, dscale_D, filled(slot, quantise(dx_BTD, GRADIENT, slot.scale))


def rotation_gradients(
    x_BTNH: Float[Array, "B T N H"],
    scale_H: Float[Array, " H"] | None,
    rope: Rope,
    eps: float,
    dout_BTNH: Float[Array, "B T N H"],
) -> tuple[Float[Array, "B T N H"], Float[Array, " H"] | None]:
    """Gradients of `rotated` with respect to heads and to the norm's scale, in float32."""

    def turn(x: jax.Array, scale_H: Any) -> jax.Array:
        return rotated(x, scale_H, rope, eps, "heads", norm_then_rope)

    pull = jax.vjp(turn, x_BTNH.astype(jnp.float32), scale_H)[1]
    dx_BTNH, dscale_H = pull(dout_BTNH.astype(jnp.float32))
    return dx_BTNH, dscale_H


def rotation_gradients_in_8_bits(
    x_BTNH: Float[Array, "B T N H"],
    scale_H: Float[Array, " H"] | None,
    rope: Rope,
    eps: float,
    heads: str,
    dout_BTNH: Float[Array, "B T N H"],
    scale: Scale | None,
) -> tuple[tuple[Quantised, Largest], Float[Array, " H"] | None]:
    """Return the gradients of queries or keys before norm and rotation, and of the norm's scale.

    The former is [B, T, N * H], in e5m2, with its largest magnitude. The latter is in float32.

    Args:
        heads: Logical name of the axis N, which only the kernel needs.
    """
    dx_BTNH, dscale_H = rotation_gradients(x_BTNH, scale_H, rope, eps, dout_BTNH)
    return quantise(dx_BTNH.reshape(*dx_BTNH.shape[:2], -1), GRADIENT, scale), dscale_H


def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    return jax.nn.silu(gate) * up


def swiglu_in_8_bits(
    gate_BTF: Float[Array, "B T F"], up_BTF: Float[Array, "B T F"], scale: Scale | None
) -> tuple[Quantised, Largest]:
    """Return silu(gate) * up, rounded once to e4m3, and the largest magnitude of the product."""
    return quantise(_swiglu(gate_BTF, up_BTF), FORWARD, scale)


def swiglu_gradients(
    gate_BTF: Float[Array, "B T F"],
    up_BTF: Float[Array, "B T F"],
    dhidden_BTF: Float[Array, "B T F"],
) -> tuple[Float[Array, "B T F"], Float[Array, "B T F"]]:
    """Gradients of `gate` and `up` in float32."""
    pull = jax.vjp(_swiglu, gate_BTF.astype(jnp.float32), up_BTF.astype(jnp.float32))[1]
    dgate_BTF, dup_BTF = pull(dhidden_BTF.astype(jnp.float32))
    return dgate_BTF, dup_BTF


def swiglu_gradients_in_8_bits(
    gate_BTF: Float[Array, "B T F"],
    up_BTF: Float[Array, "B T F"],
    dhidden_BTF: Float[Array, "B T F"],
    scales: tuple[Scale | None, Scale | None],
) -> tuple[tuple[Quantised, Largest], tuple[Quantised, Largest]]:
    """Return the gradients of `gate` and of `up` in e5m2, each with its largest magnitude."""
    dgate_BTF, dup_BTF = swiglu_gradients(gate_BTF, up_BTF, dhidden_BTF)
    return quantise(dgate_BTF, GRADIENT, scales[0]), quantise(dup_BTF, GRADIENT, scales[1])


class Writers(NamedTuple):
    """The functions that write 8-bit operands; by default, the reference implementations.

    Attributes:
        in_attention: Whether attention writes its output and the gradient of the values in 8 bits.
    """

    norm: Callable[..., tuple[jax.Array, Quantised, jax.Array]] = norm_in_8_bits
    norm_gradients: Callable[..., tuple[jax.Array, jax.Array, Slot | None]] = norm_gradients
    rotation_gradients: Callable[..., Any] = rotation_gradients_in_8_bits
    swiglu: Callable[..., tuple[Quantised, jax.Array]] = swiglu_in_8_bits
    swiglu_gradients: Callable[..., Any] = swiglu_gradients_in_8_bits
    in_attention: bool = False


REFERENCE = Writers()
