"""The matrix product of every layer, with its backward pass written out."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: Float[Array, "*B D"], w: Float[Array, "..."], recast: bool = False) -> Float[Array, "*B F"]:
    """`x @ w` in the dtype of `x`; the gradient of `w` is summed and returned in float32, whatever that dtype is.

    Left to differentiate itself, the product gives the gradient of `w` transposed, which XLA on CPUs computes at a third of the
    speed, and rounds it to the dtype of `x`.

    Args:
        w: [D, F], or D or F as several axes, as heads have them.
        recast: the backward pass casts `w` again, and no copy of it is kept, as of all layers it would be half as large as the weights.
            Not for a backward pass that repeats the forward pass: it has the cast, and would gather sharded weights once more.
    """
    return x @ _matrix(x, w)


def _matrix(x: jax.Array, w: jax.Array) -> jax.Array:
    return w.reshape(x.shape[-1], -1).astype(x.dtype)


def _forward(x: jax.Array, w: jax.Array, recast: bool) -> Any:
    matrix = _matrix(x, w)
    return x @ matrix, (x, w if recast else matrix, jax.ShapeDtypeStruct(w.shape, w.dtype))


def _backward(recast: bool, kept: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w, like = kept
    rows = tuple(range(x.ndim - 1))
    over_rows = partial(jax.lax.dot_general, dimension_numbers=((rows, rows), ((), ())), preferred_element_type=jnp.float32)
    narrows = x.dtype == jnp.float32 and dy.shape[-1] < x.shape[-1]  # CPUs transpose the first operand; in narrow types they lack the other order
    dw = over_rows(dy, x).T if narrows else over_rows(x, dy)
    return jnp.einsum("...f,df->...d", dy, _matrix(x, w)), dw.reshape(like.shape)


linear.defvjp(_forward, _backward)
