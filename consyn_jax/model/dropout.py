"""Dropout whose draw is a matter of seed and place, never of the machine."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from consyn_jax.distributed.mesh import constrain

EMBEDDING, ATTENTION, ATTENTION_BRANCH, MLP_BRANCH = range(4)  # places inside a layer; the embedding is layer 0, the blocks are 1 to L


class Dropout(NamedTuple):
    """Zeroes a share `rate` of the elements and multiplies the others by 1 / (1 - rate) (Srivastava et al., 2014).

    What is drawn for an element follows from the key and from its position in the whole array, so it is the same on every mesh, and
    the same again where the backward pass recomputes.
    """

    key: jax.Array
    rate: float

    def at(self, number: int | Int[Array, ""]) -> Dropout:
        """The draws of one layer, or of one place in it."""
        return Dropout(jax.random.fold_in(self.key, number), self.rate)

    def kept(self, shape: tuple[int, ...], logical_axes: tuple[str | None, ...]) -> Bool[Array, "..."]:
        """True for the elements that stay, laid out by the names of their axes."""
        return constrain(jax.random.bernoulli(self.key, 1 - self.rate, shape), *logical_axes)

    def apply(self, x: Float[Array, "..."], kept: Bool[Array, "..."]) -> Float[Array, "..."]:
        """`x` with zeros where it is not kept."""
        return jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)


def drop_out(x_BTD: Float[Array, "B T D"], dropout: Dropout | None, place: int) -> Float[Array, "B T D"]:
    """Dropout of hidden states at a place of a layer; None leaves them as they are."""
    if dropout is None:
        return x_BTD
    there = dropout.at(place)
    return there.apply(x_BTD, there.kept(x_BTD.shape, ("batch", "sequence", None)))
