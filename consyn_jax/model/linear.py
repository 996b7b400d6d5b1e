"""The matmul that all layers use, with a backward pass written by hand."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(
    x: Float[Array, "*B D"], w: Float[Array, "..."], recast: bool = False
) -> Float[Array, "*B F"]:
    """Compute `x @ w` in the dtype of `x`; the gradient of `w` is summed and returned in float32.

    Automatic differentiation would round the gradient of `w` to the dtype of `x`. It would also
    compute that gradient transposed; on CPUs, such a matmul takes XLA three times as long.

    Args:
        w: [D, F], where D or F may stand for several dimensions, such as heads and their width.
        recast: Whether the backward pass casts the float32 `w` again. Otherwise the forward pass
            saves a 16-bit copy, which takes half the weights' memory. Set it to False under
            rematerialisation: the repeated forward pass casts `w` already, and another cast would
            gather sharded weights twice.
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
    over_rows = partial(
        jax.lax.dot_general,
        dimension_numbers=((rows, rows), ((), ())),
        preferred_element_type=jnp.float32,
    )
    # XLA on CPUs transposes the first operand, so put the smaller one first (in float32 only).
    narrows = x.dtype == jnp.float32 and dy.shape[-1] < x.shape[-1]
    dw = over_rows(dy, x).T if narrows else over_rows(x, dy)
    return jnp.einsum("...f,df->...d", dy, _matrix(x, w)), dw.reshape(like.shape)


linear.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear_pair(
    x: Float[Array, "*B D"], w: Float[Array, "D F"], v: Float[Array, "D F"], recast: bool = False
) -> Float[Array, "*B 2 F"]:
    """Compute `linear(x, w)` and `linear(x, v)` in one matmul, also in the backward pass.

    The backward matmul then also adds the two gradients of `x`, so that no later operation has to
    read both. The results stay in one array, because splitting it would copy them.
    """
    return _pair_forward(x, w, v, recast)[0]


def _pair(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
    """Stack both matrices as [D, 2, F], so that a mesh can split F."""
    return jnp.stack([w, v], axis=1).astype(x.dtype)


def _pair_forward(x: jax.Array, w: jax.Array, v: jax.Array, recast: bool) -> Any:
    pair_D2F = _pair(x, w, v)
    y = jnp.einsum("...d,dgf->...gf", x, pair_D2F)
    return y, (x, (w, v) if recast else pair_D2F)


def _pair_backward(
    recast: bool, kept: Any, dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, pair_D2F = kept
    if recast:
        pair_D2F = _pair(x, *pair_D2F)
    rows = tuple(range(x.ndim - 1))
    dpair_D2F = jax.lax.dot_general(
        x, dy, ((rows, rows), ((), ())), preferred_element_type=jnp.float32
    )
    dx = jnp.einsum("...gf,dgf->...d", dy, pair_D2F)
    return dx, dpair_D2F[:, 0], dpair_D2F[:, 1]


linear_pair.defvjp(_pair_forward, _pair_backward)


def add_bias(y: Float[Array, "..."], bias: Float[Array, "..."]) -> Float[Array, "..."]:
    """Compute `y + bias` in the dtype of `y`; the gradient of the bias is summed in float32.

    Args:
        bias: Bias in the shape of the last dimensions of `y`.
    """
    return (y.astype(jnp.float32) + bias).astype(y.dtype)


def heads_of(
    y: Float[Array, "B T F"], w: Any, bias: Float[Array, "N H"] | None
) -> Float[Array, "B T N H"]:
    """Split the product with `w` [D, N, H] into heads, and add the bias if there is one."""
    y = y.reshape(*y.shape[:-1], *w.shape[1:])
    return y if bias is None else add_bias(y, bias)


class QkvWeights(NamedTuple):
    """The parameters of queries, keys and values, and of the norm before their matmuls.

    Attributes:
        norm: Scale of the norm.
        q_bias, k_bias, v_bias: Biases; None if the model has none.
        q_norm, k_norm: Scales of the norms of queries and keys; None if the model has none.
    """

    norm: Any
    q: Any
    k: Any
    v: Any
    q_bias: Any = None
    k_bias: Any = None
    v_bias: Any = None
    q_norm: Any = None
    k_norm: Any = None


class MlpWeights(NamedTuple):
    """The parameters of a block's MLP and of the norm before it, without the output bias.

    Attributes:
        norm: Scale of the norm.
        gate_bias, up_bias: Biases; None if the model has none.
    """

    norm: Any
    gate: Any
    up: Any
    down: Any
    gate_bias: Any = None
    up_bias: Any = None
