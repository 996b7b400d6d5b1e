"""Empty arrays through which a backward pass returns gradients in 8 bits.

A block adds the outputs of its matmuls o and down to the residual stream, so their gradients are
the gradient of the stream. The backward pass of the next norm computes this gradient, and can write
it in 8 bits, too. Attention does the same for the gradient of the values. But JAX passes only
gradients from one backward pass to another, and the gradient of an array has the dtype of the
array. So the two matmuls also return a slot, which holds arrays of 8-bit zeros. The norm takes the
slot, and returns the 8-bit gradient as the "gradient" of the slot. Nothing reads the zeros, so
compiled programs do not have them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from consyn_jax.model.fp8.quantisation import GRADIENT, Quantised, Scale, quantise, scale_for


class Slot(NamedTuple):
    """The place for the 8-bit gradient of an array.

    Attributes:
        values: Zeros in e5m2, in the shape of the array, [*rows, D].
        transposed: Zeros, [D, *rows].
        largest: A zero, for the largest magnitude in the gradient, or zeros for those in its parts.
        scale: Scale of the gradient; None to compute it from the largest magnitude.
    """

    values: jax.Array
    transposed: jax.Array
    largest: Float[Array, "*parts"]
    scale: Scale | None


class AttentionCasts(NamedTuple):
    """The places and scales of what attention writes in 8 bits.

    Attributes:
        out_scale: Scale of its output.
        v_slot: Slot for the gradient of the values, with the largest magnitude [B, K] of each head.
    """

    out_scale: Scale
    v_slot: Slot


def slot_for(like: jax.Array, scale: Scale | None) -> Slot:
    """Return an empty slot for the gradient of an array in the shape of `like`."""
    values = jnp.zeros(like.shape, GRADIENT)
    return Slot(values, jnp.moveaxis(values, -1, 0), jnp.zeros((), jnp.float32), scale)


def filled(slot: Slot, written: tuple[Quantised, Float[Array, ""]]) -> Slot:
    """Return the gradient of `slot` that passes on an 8-bit gradient and its largest magnitude."""
    gradient, largest = written
    return Slot(
        gradient.values, gradient.transposed, largest, jax.tree.map(jnp.zeros_like, slot.scale)
    )


def content(gradient: Slot, scale: Scale | None) -> tuple[Quantised, Float[Array, ""]]:
    """Return the 8-bit gradient and its largest magnitude from the gradient of a slot.

    Args:
        scale: The scale that the slot had.
    """
    values, transposed, largest, _ = gradient
    largest = jnp.max(largest)
    scale = scale_for(largest, GRADIENT) if scale is None else scale
    return Quantised(values, transposed, scale), largest


@jax.custom_vjp
def cast_here(y: Float[Array, "*rows D"], slot: Slot) -> Float[Array, "*rows D"]:
    """Return `y`; in the backward pass, cast its gradient and put it into the slot.

    This is for outputs of which no kernel writes the gradient in 8 bits.
    """
    return y


def _cast_forward(y: jax.Array, slot: Slot) -> Any:
    return y, slot


def _cast_backward(slot: Slot, dy: jax.Array) -> Any:
    return dy, filled(slot, quantise(dy, GRADIENT, slot.scale))


cast_here.defvjp(_cast_forward, _cast_backward)
