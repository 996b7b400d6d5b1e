"""Frozen matrices with a trained low-rank adapter (Hu et al., 2021)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from consyn_jax.model.dropout import Dropout
from consyn_jax.model.linear import linear

# The matrices of a block, and the number of leading dimensions that a product sums over.
INPUTS = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FrozenMatrix:
    """A frozen weight matrix of a block, with an optional adapter.

    Attributes:
        base: The frozen matrix, as an array or quantised.
        a: First matrix of the adapter, [inputs..., R]; None without an adapter.
        b: Second matrix of the adapter, [R, outputs...]; None without an adapter.
        key: Random key for dropout of the adapter's input; None without dropout.
        scale: Factor of the adapter's output.
        dropout: Dropout rate of the adapter's input.
    """

    base: Any
    a: Any = None
    b: Any = None
    key: Any = None
    scale: float = field(default=1.0, metadata={"static": True})
    dropout: float = field(default=0.0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix."""
        shape: tuple[int, ...] = self.base.shape
        return shape

    def __getitem__(self, index: Any) -> FrozenMatrix:
        assert index is Ellipsis
        return self

    def times(self, x: Float[Array, "*B D"], product: Callable[..., Any] = linear) -> jax.Array:
        """Return `x @ base + scale * (x @ a) @ b` in the dtype of `x`.

        If `key` is set, dropout is applied to the input of `a`.

        Args:
            product: Function that multiplies by `a` and by `b`.
        """
        y = frozen_linear(x, self.base)
        if self.a is None:
            return y
        if self.key is not None:
            drop = Dropout(self.key, self.dropout)
            kept = drop.kept(x.shape, ("batch", "sequence", *[None] * (x.ndim - 2)))
            x = drop.apply(x, kept)
        return y + product(product(x, self.a), self.b) * jnp.asarray(self.scale, y.dtype)


def over_frozen(product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Extend a matmul function to frozen matrices; it then also multiplies by their adapters."""

    def either(x: jax.Array, w: Any) -> jax.Array:
        return w.times(x, product) if isinstance(w, FrozenMatrix) else product(x, w)

    return either


@jax.custom_vjp
def frozen_linear(x: Float[Array, "*B D"], w: Any) -> Float[Array, "*B F"]:
    """Compute `x @ w` in the dtype of `x`, without a gradient of `w`.

    The backward pass dequantises `w` again, so that at most one layer is dequantised at a time. It
    does not need `x`.

    Args:
        w: Array or quantised matrix [D, F], where D or F may stand for several dimensions.
    """
    return x @ _dense(w, x)


def _dense(w: Any, x: jax.Array) -> jax.Array:
    dense = w.astype(x.dtype) if isinstance(w, jax.Array) else w.dense(x.dtype)
    return dense.reshape(x.shape[-1], -1)


def _forward(x: jax.Array, w: Any) -> Any:
    return frozen_linear(x, w), (w, jnp.zeros((0, x.shape[-1]), x.dtype))


def _backward(kept: Any, dy: jax.Array) -> tuple[jax.Array, None]:
    w, like_x = kept
    # The barrier makes w depend on dy. Otherwise the compiler would keep the dequantised matrix.
    w, dy = jax.lax.optimization_barrier((w, dy))
    return jnp.einsum("...f,df->...d", dy, _dense(w, like_x)), None


frozen_linear.defvjp(_forward, _backward)
