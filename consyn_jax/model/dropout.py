"""Dropout whose draws depend only on the seed and an element's position, not on the mesh."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from consyn_jax.distributed.mesh import constrain

# Dropout sites inside a layer, each with its own key. The embedding is layer 0, blocks are 1 to L.
EMBEDDING, ATTENTION, ATTENTION_BRANCH, MLP_BRANCH = range(4)


class Dropout(NamedTuple):
    """Dropout: zeroes elements with probability `rate`, and divides the rest by 1 - `rate`.

    Source: Srivastava et al., 2014. The draw for an element depends on the key and on the element's
    position in the global array. So it is the same on every mesh, and in the recomputation of a
    backward pass.
    """

    key: jax.Array
    rate: float

    def at(self, number: int | Int[Array, ""]) -> Dropout:
        """Derive a dropout with another random key, by folding `number` into this key.

        The dropout of a site in a layer takes two calls. The first call folds the number of the
        layer into the key of the micro-batch. The second call folds in the constant of the site,
        such as `MLP_BRANCH`.
        """
        return Dropout(jax.random.fold_in(self.key, number), self.rate)

    def kept(
        self, shape: tuple[int, ...], logical_axes: tuple[str | None, ...]
    ) -> Bool[Array, "..."]:
        """Draw a mask of this shape, True for elements to keep, sharded by its logical axes."""
        return constrain(jax.random.bernoulli(self.key, 1 - self.rate, shape), *logical_axes)

    def apply(self, x: Float[Array, "..."], kept: Bool[Array, "..."]) -> Float[Array, "..."]:
        """Divide elements of `x` by 1 - `rate` where `kept` is True, and zero the rest."""
        return jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)


def drop_out(
    x_BTD: Float[Array, "B T D"], dropout: Dropout | None, place: int
) -> Float[Array, "B T D"]:
    """Apply a layer's dropout to hidden states; return them unchanged if `dropout` is None.

    Args:
        dropout: Dropout of the layer.
        place: Site in the layer, such as `MLP_BRANCH`.
    """
    if dropout is None:
        return x_BTD
    there = dropout.at(place)
    return there.apply(x_BTD, there.kept(x_BTD.shape, ("batch", "sequence", None)))
