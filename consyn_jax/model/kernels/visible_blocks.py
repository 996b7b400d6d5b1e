"""Blocks of keys that a tile of queries attends to, and the reverse, for kernels of attention.

A query attends to an interval of keys, so both are ranges.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Score of a masked key. It is finite, so that a block in which all keys are masked gives no NaN,
# and a power of two, so that scaling does not round it.
NEVER = -(2.0**100)


class Blocks(NamedTuple):
    """Two half-open ranges of blocks.

    Attributes:
        start, stop: Range of the blocks to read.
        whole_start, whole_stop: Range of the blocks that need no mask.
    """

    start: Any
    stop: Any
    whole_start: Any
    whole_stop: Any


def over_blocks(blocks: Blocks, block: Any, carry: Any) -> Any:
    """Update `carry` by `block(index, carry, masked)` for each block; masked blocks come first."""
    start, stop, whole_start, whole_stop = blocks
    whole_start = jnp.clip(whole_start, start, stop)
    whole_stop = jnp.clip(whole_stop, whole_start, stop)
    num_whole = whole_stop - whole_start

    def at_the_edges(i: Any, carry: Any) -> Any:
        return block(jnp.where(i < whole_start, i, i + num_whole), carry, True)

    carry = jax.lax.fori_loop(start, stop - num_whole, at_the_edges, carry)
    return jax.lax.fori_loop(
        whole_start, whole_stop, lambda i, carry: block(i, carry, False), carry
    )


def visible_keys(first_key: Any, first: Any, step: int, num_keys: int) -> Blocks:
    """The blocks of keys to which a tile of queries attends.

    Args:
        first_key: For each query of the tile, the position of the first key that it attends to.
        first: Position of the tile's first query.
        step: Keys per block.
    """
    own = first_key.shape[0]
    earliest, latest = first_key[0], first_key[own - 1]
    last = first + own - 1
    stop = jnp.minimum(last // step + 1, num_keys // step)
    return Blocks(earliest // step, stop, (latest + step - 1) // step, (first + 1) // step)


def seeing_queries(last_query: Any, first: Any, offset: Any, step: int, num_queries: int) -> Blocks:
    """The blocks of queries that attend to a tile of keys.

    On a mesh with a `context` axis, there may be none: all queries of the device may come before or
    after these keys.

    Args:
        last_query: Position of the last query that attends to each key of the tile.
        first: Position of the tile's first key.
        offset: Position of the device's first query.
        step: Queries per block.
    """
    own = last_query.shape[0]
    start = jnp.maximum(first - offset, 0) // step
    stop = jnp.clip((last_query[own - 1] - offset) // step + 1, start, num_queries // step)
    whole_start = (jnp.maximum(first + own - 1 - offset, 0) + step - 1) // step
    whole_stop = jnp.maximum(last_query[0] + 1 - offset, 0) // step
    return Blocks(start, stop, whole_start, whole_stop)
