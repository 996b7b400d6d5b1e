"""Matrices in 8 and 4 bits that replace arrays in a block."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

# Quantiles of the normal distribution, scaled to 1 (Dettmers et al., 2023, appendix E): the table
# of bitsandbytes.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
BLOCK = 64  # weights with one factor


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Matrix:
    """A matrix in 8-bit integers, with one scale per output.

    It replaces an array in a block, so it has the array methods that blocks use.

    Attributes:
        values: int8, in the shape of the matrix.
        scale: float32, in the shape of the outputs.
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
    """Round a matrix to int8, with one scale per output, set by its largest weight.

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
    """A matrix in 4-bit normal floats: 64 weights of an output share a factor.

    These are the blocks of bitsandbytes if the inputs are a multiple of 64, because torch stores a
    matrix as [outputs, inputs]. Otherwise the last block of each output is shorter here.

    Attributes:
        codes: uint8 [blocks, 32, outputs...]: two places in the table `NF4`, the first one in the
            higher bits.
        largest: float32 [blocks, outputs...]: the largest magnitude of each block.
        inputs: The shape of the inputs.
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
    """Round a matrix to 4-bit normal floats, to nearest.

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
