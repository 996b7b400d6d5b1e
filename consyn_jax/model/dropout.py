"""Dropout that depends on the seed and the position only, and not on the mesh."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from consyn_jax.distributed.mesh import constrain

# Places inside a layer; the embedding is layer 0, the blocks are 1 to L.
EMBEDDING, ATTENTION, ATTENTION_BRANCH, MLP_BRANCH = range(4)


class Dropout(NamedTuple):
    """Zeroes a share `rate` of the elements and multiplies the others by 1 / (1 - rate).

    Source: Srivastava et al., 2014. The draw for an element depends on the key and on its position
    in the whole array, so it is the same on every mesh and when the backward pass recomputes.
    """

    key: jax.Array
    rate: float

    def at(self, number: int | Int[Array, ""]) -> Dropout:
        """Derive a dropout with its own random key.

        For the dropout of a micro-batch, `number` is the layer. For the dropout of a layer, it is
        the place in that layer.
        """
        return Dropout(jax.random.fold_in(self.key, number), self.rate)

    def kept(
        self, shape: tuple[int, ...], logical_axes: tuple[str | None, ...]
    ) -> Bool[Array, "..."]:
        """Draw True for the elements that stay, sharded by the names of their axes."""
        return constrain(jax.random.bernoulli(self.key, 1 - self.rate, shape), *logical_axes)

    def apply(self, x: Float[Array, "..."], kept: Bool[Array, "..."]) -> Float[Array, "..."]:
        """Scale the elements of `x` that are kept, and zero the others."""
        return jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)


def drop_out(
    x_BTD: Float[Array, "B T D"], dropout: Dropout | None, place: int
) -> Float[Array, "B T D"]:
    """Apply dropout to hidden states at a place of a layer, if there is dropout."""
    if dropout is None:
        return x_BTD
    there = dropout.at(place)
    return there.apply(x_BTD, there.kept(x_BTD.shape, ("batch", "sequence", None)))
