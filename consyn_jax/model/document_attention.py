"""Causal attention inside documents, as kernels in Pallas for Triton: neither a mask nor the scores ever lie in memory.

What a query sees is an interval of keys: from the first of its document, or of its window, to itself. So a mask is two numbers a token,
and a block of queries goes through the blocks of keys that it sees, and no others: a row of many documents takes less time than one of a
single document. Softmax and sums are float32. The forward pass is that of FlashAttention-2 (Dao, 2023); backward is one kernel for the
gradient of queries and one for those of keys and values, which adds up over the query heads that share a key head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

KEPT = "document attention"  # the name of what its backward pass needs of it
NEVER = -(2.0**100)  # in place of the score of a key that is not seen; finite, and scaled without rounding, so that a block without any gives no NaN


@dataclass(frozen=True)
class Tile:
    """How one kernel works: `own` queries (or keys) that a program holds, `step` keys (or queries) that it takes at once."""

    own: int
    step: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tiles:
    """Of the three kernels."""

    forward: Tile
    queries: Tile
    keys: Tile


# By width of a head; the fastest of some thirty on an H200 (docs/design/attention.md) that fit the 99 KiB of shared memory that a program has on
# Ada and on small Amperes and Blackwells, where they were not measured.
TILES = {
    64: Tiles(Tile(64, 128, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    128: Tiles(Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
}


def document_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    first_key_BT: Int[Array, "B T"],
    last_query_BS: Int[Array, "B S"],
    first_position: Int[Array, ""] | int = 0,
    tiles: Tiles | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention, scaled by H**-0.5, grouped heads, where the query at position p sees the keys s with first_key[p] <= s <= p.

    Args:
        first_key_BT: the first key that each query sees; does not fall along T.
        last_query_BS: the position of the last query that sees each key, the same relation from the other side; does not fall along S.
        first_position: of the first query, among the keys.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    tiles = tiles or TILES[64 if H <= 64 else 128]
    forward, backward, other = tiles.forward, tiles.queries, tiles.keys
    queries, keys = math.lcm(forward.own, backward.own, other.step), math.lcm(forward.step, backward.step, other.own)
    width = max(16, pl.next_power_of_2(H))
    # What is added changes nothing: keys behind all real queries, queries whose gradient is zero, zeros in every sum over a head.
    q, k, v = _padded(q_BTNH, queries, width), _padded(k_BSKH, keys, width), _padded(v_BSKH, keys, width)
    first_key, last_query = (jnp.pad(a, ((0, 0), (0, -a.shape[1] % size)), mode="edge") for a, size in ((first_key_BT, queries), (last_query_BS, keys)))
    assert max(q.size, k.size) < 2**31, "kernels count elements in 32 bits"
    offset = jnp.asarray(first_position, jnp.int32).reshape(1)
    return _attention(q, k, v, first_key, last_query, offset, H**-0.5, tiles)[:, :T, :, :H]


def _padded(x: jax.Array, length: int, width: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % length), (0, 0), (0, width - x.shape[3])))


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attention(q: Any, k: Any, v: Any, first_key: Any, last_query: Any, offset: Any, scale: float, tiles: Tiles) -> jax.Array:
    return _forward(q, k, v, first_key, last_query, offset, scale, tiles)[0]


def _forward(q: Any, k: Any, v: Any, first_key: Any, last_query: Any, offset: Any, scale: float, tiles: Tiles) -> Any:
    B, T, N, H = q.shape
    group, tile = N // k.shape[2], tiles.forward
    head = pl.BlockSpec((None, tile.own, None, H), lambda i, n, b: (b, i, n, 0))
    all_keys = pl.BlockSpec((None, k.shape[1], None, H), lambda i, n, b: (b, 0, n // group, 0))
    out, log_sum = pl.pallas_call(
        partial(_forward_kernel, scale=scale * math.log2(math.e), step=tile.step),
        grid=(T // tile.own, N, B),
        in_specs=[head, all_keys, all_keys, pl.BlockSpec((None, tile.own), lambda i, n, b: (b, i)), _SCALAR],
        out_specs=[head, pl.BlockSpec((None, None, tile.own), lambda i, n, b: (b, n, i))],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)],
        compiler_params=_parameters(tile),
        name="document_attention_forward",
    )(q, k, v, first_key, offset)
    out, log_sum = checkpoint_name(out, KEPT), checkpoint_name(log_sum, KEPT)
    return out, (q, k, v, first_key, last_query, offset, out, log_sum)


def _backward(scale: float, tiles: Tiles, kept: Any, dout: jax.Array) -> Any:
    q, k, v, first_key, last_query, offset, out, log_sum = kept
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    group, scales = N // K, {"scale": scale * math.log2(math.e), "outer_scale": scale}
    correction_BNT = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1).transpose(0, 2, 1)

    tile = tiles.queries
    head = pl.BlockSpec((None, tile.own, None, H), lambda i, n, b: (b, i, n, 0))
    sums = pl.BlockSpec((None, None, tile.own), lambda i, n, b: (b, n, i))
    all_keys = pl.BlockSpec((None, S, None, H), lambda i, n, b: (b, 0, n // group, 0))
    dq = pl.pallas_call(
        partial(_queries_kernel, step=tile.step, **scales),
        grid=(T // tile.own, N, B),
        in_specs=[head, all_keys, all_keys, head, sums, sums, pl.BlockSpec((None, tile.own), lambda i, n, b: (b, i)), _SCALAR],
        out_specs=head,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=_parameters(tile),
        name="document_attention_queries",
    )(q, k, v, dout, log_sum, correction_BNT, first_key, offset)

    tile = tiles.keys
    head = pl.BlockSpec((None, tile.own, None, H), lambda i, n, b: (b, i, n, 0))
    all_queries = pl.BlockSpec((None, T, group, H), lambda i, n, b: (b, 0, n, 0))
    sums = pl.BlockSpec((None, group, T), lambda i, n, b: (b, n, 0))
    dk, dv = pl.pallas_call(
        partial(_keys_kernel, step=tile.step, **scales),
        grid=(S // tile.own, K, B),
        in_specs=[all_queries, head, head, all_queries, sums, sums, pl.BlockSpec((None, tile.own), lambda i, n, b: (b, i)), _SCALAR],
        out_specs=[head, head],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2,
        compiler_params=_parameters(tile),
        name="document_attention_keys",
    )(q, k, v, dout, log_sum, correction_BNT, last_query, offset)
    return dq, dk, dv, None, None, None


_attention.defvjp(_forward, _backward)

_SCALAR = pl.BlockSpec((1,), lambda i, n, b: (0,))


def _parameters(tile: Tile) -> pltriton.CompilerParams:
    return pltriton.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages)


# ------------------------------------------------------------------------------------------------------------------------- kernels


def _product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    return jax.lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32)


def _over_blocks(start: Any, stop: Any, whole_start: Any, whole_stop: Any, block: Any, carry: Any) -> Any:
    """`block(index, carry, masked)` for all blocks from start to stop; only those from whole_start to whole_stop need no mask."""
    whole_start = jnp.clip(whole_start, start, stop)
    whole_stop = jnp.clip(whole_stop, whole_start, stop)
    before = whole_start - start

    def at_the_edges(i: Any, carry: Any) -> Any:
        return block(jnp.where(i < before, start + i, whole_stop + i - before), carry, True)

    carry = jax.lax.fori_loop(0, before + stop - whole_stop, at_the_edges, carry)
    return jax.lax.fori_loop(whole_start, whole_stop, lambda i, carry: block(i, carry, False), carry)


def _keys_of(first_key: Any, positions: Any, step: int, num_keys: int) -> tuple[Any, Any, Any, Any]:
    """Of a block of queries, the blocks of keys as `_over_blocks` takes them."""
    stop = jnp.minimum(positions[1] // step + 1, num_keys // step)
    return first_key[0] // step, stop, (first_key[1] + step - 1) // step, (positions[0] + 1) // step


def _forward_kernel(q_ref, k_ref, v_ref, first_key_ref, offset_ref, out_ref, log_sum_ref, *, scale, step):
    own, H = q_ref.shape
    first = offset_ref[0] + pl.program_id(0) * own
    positions, first_key, q = first + jnp.arange(own), first_key_ref[...], q_ref[...]

    def block(j, carry, masked):
        acc, total, top = carry
        keys = pl.ds(j * step, step)
        scores = _product(q, k_ref[keys, :], (1, 1))
        if masked:
            at = j * step + jnp.arange(step)[None, :]
            scores = jnp.where((at >= first_key[:, None]) & (at <= positions[:, None]), scores, NEVER)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        # scaled here, where it is one instruction with the difference
        shrunk, weights = jnp.exp2((top - new_top) * scale), jnp.exp2(scores * scale - (new_top * scale)[:, None])
        acc = acc * shrunk[:, None] + _product(weights.astype(v_ref.dtype), v_ref[keys, :], (1, 0))
        return acc, total * shrunk + jnp.sum(weights, axis=1), new_top

    blocks = _keys_of((first_key_ref[0], first_key_ref[own - 1]), (first, first + own - 1), step, k_ref.shape[0])
    nothing = jnp.zeros((own, H), jnp.float32), jnp.zeros((own,), jnp.float32), jnp.full((own,), NEVER, jnp.float32)
    acc, total, top = _over_blocks(*blocks, block, nothing)
    out_ref[...] = (acc / total[:, None]).astype(out_ref.dtype)
    log_sum_ref[...] = top * scale + jnp.log2(total)


def _queries_kernel(q_ref, k_ref, v_ref, dout_ref, log_sum_ref, correction_ref, first_key_ref, offset_ref, dq_ref, *, scale, outer_scale, step):
    own, H = q_ref.shape
    first = offset_ref[0] + pl.program_id(0) * own
    positions, first_key, q, dout = first + jnp.arange(own), first_key_ref[...], q_ref[...], dout_ref[...]
    log_sum, correction = log_sum_ref[...], correction_ref[...]

    def block(j, dq, masked):
        keys = pl.ds(j * step, step)
        k = k_ref[keys, :]
        scores = _product(q, k, (1, 1))
        if masked:
            at = j * step + jnp.arange(step)[None, :]
            scores = jnp.where((at >= first_key[:, None]) & (at <= positions[:, None]), scores, NEVER)
        weights = jnp.exp2(scores * scale - log_sum[:, None])
        dscores = weights * (_product(dout, v_ref[keys, :], (1, 1)) - correction[:, None])
        return dq + _product(dscores.astype(k.dtype), k, (1, 0))

    blocks = _keys_of((first_key_ref[0], first_key_ref[own - 1]), (first, first + own - 1), step, k_ref.shape[0])
    dq = _over_blocks(*blocks, block, jnp.zeros((own, H), jnp.float32))
    dq_ref[...] = (dq * outer_scale).astype(dq_ref.dtype)


def _keys_kernel(q_ref, k_ref, v_ref, dout_ref, log_sum_ref, correction_ref, last_query_ref, offset_ref, dk_ref, dv_ref, *, scale, outer_scale, step):
    (own, H), (T, group, _), first = k_ref.shape, q_ref.shape, pl.program_id(0) * k_ref.shape[0]
    offset, positions, last_query, k, v = offset_ref[0], first + jnp.arange(own), last_query_ref[...], k_ref[...], v_ref[...]

    def of_head(n, carry):
        def block(i, carry, masked):
            dk, dv = carry
            queries = pl.ds(i * step, step)
            q, dout = q_ref[queries, n, :], dout_ref[queries, n, :]
            scores = _product(k, q, (1, 1))
            if masked:
                at = offset + i * step + jnp.arange(step)[None, :]
                scores = jnp.where((at >= positions[:, None]) & (at <= last_query[:, None]), scores, NEVER)
            weights = jnp.exp2(scores * scale - log_sum_ref[n, queries][None, :])
            dscores = weights * (_product(v, dout, (1, 1)) - correction_ref[n, queries][None, :])
            return dk + _product(dscores.astype(q.dtype), q, (1, 0)), dv + _product(weights.astype(q.dtype), dout, (1, 0))

        return _over_blocks(*blocks, block, carry)

    # positions to places among this device's queries, which may begin behind these keys or end before them
    start = jnp.maximum(first - offset, 0) // step
    stop = jnp.clip((last_query_ref[own - 1] - offset) // step + 1, start, T // step)
    blocks = start, stop, (jnp.maximum(first + own - 1 - offset, 0) + step - 1) // step, jnp.maximum(last_query_ref[0] + 1 - offset, 0) // step
    nothing = jnp.zeros((own, H), jnp.float32)
    dk, dv = jax.lax.fori_loop(0, group, of_head, (nothing, nothing))
    dk_ref[...], dv_ref[...] = (dk * outer_scale).astype(dk_ref.dtype), dv.astype(dv_ref.dtype)
