"""Attention inside documents for Hopper, in Pallas for Mosaic GPU.

The same mathematics as `document_attention`, which is written in Triton: blocks that no row sees
are not read, only the blocks at the edges are masked, and no atomic adds are needed. Scores,
softmax and sums are float32; weights and score gradients are rounded once. The module
`hopper_kernels` says how a program uses the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from consyn_jax.model.kernels import hopper_kernels as kernels
from consyn_jax.model.kernels.hopper_kernels import (
    IN_TILES,
    KEYS,
    QUERIES,
    ROWS,
    WARPGROUPS,
    Operands,
    Reading,
)
from consyn_jax.model.kernels.visible_blocks import Blocks, seeing_queries, visible_keys
from consyn_jax.model.rematerialisation import KERNEL_RESIDUALS


class Readings(NamedTuple):
    """The blocks that the three kernels read: forward, gradient of queries, gradients of keys."""

    forward: Reading
    queries: Reading
    keys: Reading


# Chosen without a GPU: with heads of 64 and of 128 the compiler spills no registers, all blocks fit
# into shared memory, and two programs of the kernel that holds keys fit into one multiprocessor.
READINGS = Readings(Reading(128, 2), Reading(64, 2), Reading(64, 2))


def hopper_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    first_key_BT: Int[Array, "B T"],
    last_query_BS: Int[Array, "B S"],
    first_position: Int[Array, ""] | int = 0,
) -> Float[Array, "B T N H"]:
    """Softmax attention with grouped heads, scores scaled by H**-0.5, in bfloat16 or float16.

    The arguments are those of `document_attention`. Needs JAX 0.10 or newer.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    # Padding does not change the result: padded keys come after all real queries, the gradients of
    # padded queries are zero, and padding of a head adds zeros to its sums.
    queries = math.lcm(QUERIES, READINGS.keys.step)
    keys = math.lcm(KEYS, READINGS.forward.step, READINGS.queries.step)
    q = _padded(q_BTNH, queries)
    k, v = _padded(k_BSKH, keys), _padded(v_BSKH, keys)
    first_key, last_query = (
        jnp.pad(a, ((0, 0), (0, -a.shape[1] % size)), mode="edge").astype(jnp.int32)
        for a, size in ((first_key_BT, queries), (last_query_BS, keys))
    )
    offset = jnp.asarray(first_position, jnp.int32).reshape(1)
    return _attention(q, k, v, first_key, last_query, offset, H**-0.5)[:, :T, :, :H]


def _padded(x: jax.Array, length: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % length), (0, 0), (0, -x.shape[3] % 64)))


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(q, k, v, first_key, last_query, offset, scale) -> jax.Array:
    return _forward(q, k, v, first_key, last_query, offset, scale)[0]


def _forward(q, k, v, first_key, last_query, offset, scale) -> Any:
    B, T, N, _ = q.shape
    reading = READINGS.forward
    blocks = _visible_keys(first_key, offset, reading.step, k.shape[1])
    scratch = [
        _rows_of(q, 2),
        plgpu.SMEM((2, ROWS), jnp.float32),
        plgpu.Barrier(num_barriers=2),
        plgpu.Barrier(num_arrivals=2),
    ]
    out, log_sum = _kernel(
        partial(kernels.forward, scale=scale * math.log2(math.e), reading=reading),
        "hopper_attention_forward",
        (N, T // QUERIES, B),
        [_like(q), jax.ShapeDtypeStruct((B, N, T), jnp.float32)],
        scratch,
        **WARPGROUPS,
    )(Operands(q, k, v, first_key, blocks, offset))
    out, log_sum = (checkpoint_name(x, KERNEL_RESIDUALS) for x in (out, log_sum))
    return out, (q, k, v, first_key, last_query, offset, out, log_sum)


def _backward(scale: float, saved: Any, dout: jax.Array) -> Any:
    q, k, v, first_key, last_query, offset, out, log_sum = saved
    B, T, N, _ = q.shape
    S, K = k.shape[1:3]
    scales = {"scale": scale * math.log2(math.e), "outer_scale": scale}
    product = out.astype(jnp.float32) * dout.astype(jnp.float32)
    rest = offset, dout, log_sum, jnp.sum(product, axis=-1).transpose(0, 2, 1)

    reading = READINGS.queries
    blocks = _visible_keys(first_key, offset, reading.step, S)
    dq = _kernel(
        partial(kernels.queries, reading=reading, **scales),
        "hopper_attention_queries",
        (N, T // QUERIES, B),
        _like(q),
        [_rows_of(q, 2), _rows_of(q, 2), plgpu.Barrier(num_arrivals=2, num_barriers=2)],
        **WARPGROUPS,
    )(Operands(q, k, v, first_key, blocks, *rest))

    reading = READINGS.keys
    blocks = _seeing_queries(last_query, offset, reading.step, T)
    dk, dv = _kernel(
        partial(kernels.keys, reading=reading, **scales),
        "hopper_attention_keys",
        (K, S // KEYS, B),
        [_like(k), _like(v)],
        [_rows_of(k), _rows_of(v), plgpu.Barrier(num_arrivals=2)],
    )(Operands(q, k, v, last_query, blocks, *rest))
    return dq, dk, dv, None, None, None


_attention.defvjp(_forward, _backward)


def _kernel(
    body: Callable[..., None], name: str, grid: Any, out: Any, scratch: Any, **warpgroups: Any
) -> Any:
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=grid,
        grid_names=("head", "tile", "row"),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        **warpgroups,
    )


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _rows_of(x: jax.Array, *warpgroups: int) -> Any:
    """Shared memory for the rows of one head that each multiplying warpgroup holds."""
    return plgpu.SMEM((*warpgroups, ROWS, x.shape[3]), x.dtype, transforms=IN_TILES)


def _visible_keys(first_key: jax.Array, offset: jax.Array, step: int, S: int) -> jax.Array:
    """Find the blocks of keys that each program's queries see [B, T / QUERIES, 4]."""

    def blocks(own: jax.Array, first: jax.Array) -> Blocks:
        return visible_keys(own, first + offset[0], step, S)

    return _of_programs(first_key, QUERIES, blocks)


def _seeing_queries(last_query: jax.Array, offset: jax.Array, step: int, T: int) -> jax.Array:
    """Find the blocks of queries that see each program's keys [B, S / KEYS, 4].

    A pipeline reads at least one block. If no query sees the keys, that block is masked.
    """

    def blocks(own: jax.Array, first: jax.Array) -> Blocks:
        found = seeing_queries(own, first, offset[0], step, T)
        start = jnp.minimum(found.start, T // step - 1)
        return found._replace(start=start, stop=jnp.maximum(found.stop, start + 1))

    return _of_programs(last_query, KEYS, blocks)


def _of_programs(limits: jax.Array, own: int, blocks: Callable[..., Blocks]) -> jax.Array:
    """Compute the blocks of every program, which holds `own` rows, as one array."""
    tiles = limits.reshape(limits.shape[0], -1, own)
    first = own * jnp.arange(tiles.shape[1])
    found = jax.vmap(jax.vmap(blocks), in_axes=(0, None))(tiles, first)
    return jnp.stack(found, axis=-1).astype(jnp.int32)
