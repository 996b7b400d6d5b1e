"""The matrix product of every layer, with its backward pass written out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def linear(x: Float[Array, "*B D"], w: Float[Array, "D F"]) -> Float[Array, "*B F"]:
    """`x @ w` in the dtype of `x`; the gradient of `w` is summed and returned in float32, whatever that dtype is.

    Left to differentiate itself, the product gives the gradient of `w` transposed, which XLA on CPUs computes at a third of the
    speed, and rounds it to the dtype of `x`.
    """
    return x @ w.astype(x.dtype)


def _forward(x: jax.Array, w: jax.Array) -> Any:
    w = w.astype(x.dtype)  # kept as it is used: cast again in the backward pass, sharded weights would be gathered again
    return x @ w, (x, w)


def _backward(kept: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = kept
    rows = tuple(range(x.ndim - 1))
    dw = jax.lax.dot_general(x, dy, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
    return jnp.einsum("...f,df->...d", dy, w), dw


linear.defvjp(_forward, _backward)
