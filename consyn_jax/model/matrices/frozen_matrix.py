"""Matrices that are not trained, with a low-rank adapter beside them (Hu et al., 2021)."""

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
    """A matrix that is not trained, with or without an adapter; it replaces an array in a block.

    Attributes:
        base: An array, or a matrix in fewer bits.
        a: [inputs..., R], with `b`, [R, outputs...], the adapter; None without an adapter.
        key: Random key for dropout of the adapter's input; None without dropout.
        scale: Factor of the adapter's output.
        dropout: Rate of that dropout.
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
        """Return `x @ (base + scale * a @ b)`, in the dtype of `x`."""
        y = frozen_linear(x, self.base)
        if self.a is None:
            return y
        if self.key is not None:
            drop = Dropout(self.key, self.dropout)
            kept = drop.kept(x.shape, ("batch", "sequence", *[None] * (x.ndim - 2)))
            x = drop.apply(x, kept)
        return y + product(product(x, self.a), self.b) * jnp.asarray(self.scale, y.dtype)


def over_frozen(product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Extend a product of arrays to frozen matrices; adapters are multiplied by it."""

    def either(x: jax.Array, w: Any) -> jax.Array:
        return w.times(x, product) if isinstance(w, FrozenMatrix) else product(x, w)

    return either


@jax.custom_vjp
def frozen_linear(x: Float[Array, "*B D"], w: Any) -> Float[Array, "*B F"]:
    """`x @ w` in the dtype of `x`, without a gradient of `w`.

    For the backward pass `w` is saved as it is stored, and made dense once more. So no more than
    one layer is dense at a time, and `x` need not be kept.

    Args:
        w: [D, F], where D or F may be several axes: an array or a matrix in fewer bits.
    """
    return x @ _dense(w, x)


def _dense(w: Any, x: jax.Array) -> jax.Array:
    dense = w.astype(x.dtype) if isinstance(w, jax.Array) else w.dense(x.dtype)
    return dense.reshape(x.shape[-1], -1)


def _forward(x: jax.Array, w: Any) -> Any:
    return frozen_linear(x, w), (w, jnp.zeros((0, x.shape[-1]), x.dtype))


def _backward(kept: Any, dy: jax.Array) -> tuple[jax.Array, None]:
    w, like_x = kept
    # Ties w to dy; else the compiler would keep the dense matrix of the forward pass.
    w, dy = jax.lax.optimization_barrier((w, dy))
    return jnp.einsum("...f,df->...d", dy, _dense(w, like_x)), None


frozen_linear.defvjp(_forward, _backward)
