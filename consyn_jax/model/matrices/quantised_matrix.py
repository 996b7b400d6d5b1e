"""Matrices quantised to 8 or 4 bits per weight; a block uses them in place of arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

# The table of bitsandbytes: quantiles of the normal distribution, scaled to a maximum of 1
# (Dettmers et al., 2023, appendix E).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
BLOCK = 64  # weights that share one scale


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Matrix:
    """A matrix in 8-bit integers, with one scale per output.

    Blocks can use it in place of an array, because it has the array methods that they call.

    Attributes:
        values: Rounded weights, int8, in the shape of the matrix.
        scale: Factor of each output's weights, float32, in the shape of the outputs.
    """

    values: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix."""
        shape: tuple[int, ...] = self.values.shape
        return shape

    def __getitem__(self, index: Any) -> Int8Matrix:
        assert index is Ellipsis
        return self

    def dense(self, dtype: Any) -> jax.Array:
        """The matrix as an array."""
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


def quantised(w: jax.Array, inputs: int) -> Int8Matrix:
    """Round a matrix to int8; the scale of each output maps the largest magnitude to 127.

    Args:
        inputs: Number of leading dimensions that the product sums over.
    """
    w = w.astype(jnp.float32)
    largest = jnp.max(jnp.abs(w), axis=tuple(range(inputs)))
    scale = jnp.where(largest > 0, largest, 1.0) / 127
    return Int8Matrix(jnp.round(w / scale).astype(jnp.int8), scale)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Nf4Matrix:
    """A matrix in 4-bit normal floats, quantised in blocks of 64 weights with the same output.

    If the number of inputs is a multiple of 64, bitsandbytes uses the same blocks. Otherwise, this
    class pads the last block of each output, while blocks of bitsandbytes span several outputs.

    Attributes:
        codes: Indices into the table `NF4`, uint8 [blocks, 32, outputs...]. Each byte holds two
            indices; the first index is in the higher 4 bits.
        largest: Largest magnitude of each block, float32 [blocks, outputs...].
        inputs: Shape of the input dimensions.
    """

    codes: Any
    largest: Any
    inputs: tuple[int, ...] = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix."""
        return (*self.inputs, *self.codes.shape[2:])

    def __getitem__(self, index: Any) -> Nf4Matrix:
        assert index is Ellipsis
        return self

    def dense(self, dtype: Any) -> jax.Array:
        """The matrix as an array."""
        blocks, half, *outputs = self.codes.shape
        pairs = jnp.stack([self.codes >> 4, self.codes & 15], axis=2)
        places = pairs.reshape(blocks, 2 * half, *outputs)
        table = jnp.array(NF4, jnp.float32)
        values = table.at[places].get(mode="promise_in_bounds") * self.largest[:, None]
        rows = values.astype(dtype).reshape(blocks * 2 * half, *outputs)
        return rows[: math.prod(self.inputs)].reshape(self.shape)


def normal_floats(w: jax.Array, inputs: int) -> Nf4Matrix:
    """Round a matrix to the nearest 4-bit normal floats.

    Args:
        inputs: Number of leading dimensions that the product sums over.
    """
    of_inputs, outputs = w.shape[:inputs], w.shape[inputs:]
    size = math.prod(of_inputs)
    rows = w.astype(jnp.float32).reshape(size, *outputs)
    rows = jnp.pad(rows, [(0, -size % BLOCK)] + [(0, 0)] * len(outputs))
    blocks = rows.reshape(-1, BLOCK, *outputs)
    largest = jnp.max(jnp.abs(blocks), axis=1)
    table = jnp.array(NF4, jnp.float32)
    shares = blocks * (1 / jnp.where(largest > 0, largest, 1.0))[:, None]
    places = jnp.searchsorted((table[1:] + table[:-1]) / 2, shares, side="left").astype(jnp.uint8)
    pairs = places.reshape(-1, BLOCK // 2, 2, *outputs)
    return Nf4Matrix((pairs[:, :, 0] << 4) | pairs[:, :, 1], largest, of_inputs)
