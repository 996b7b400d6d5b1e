"""Causal attention inside documents, in Pallas for Triton, without a mask or scores in memory.

A query attends to an interval of keys, from the first key of its document or window to its own
position. So two numbers per token describe the mask. A block of queries skips each block of keys
that is masked for all of its queries, so a row of many documents takes less time than a row of one.
Softmax and sums are in float32. The forward pass is FlashAttention-2 (Dao, 2023). The backward pass
has two kernels. One computes the gradient of queries. The other computes the gradients of keys and
values, and sums them over the query heads of each key head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from consyn_jax.model.kernels.visible_blocks import NEVER, over_blocks, seeing_queries, visible_keys
from consyn_jax.model.rematerialisation import KERNEL_RESIDUALS


@dataclass(frozen=True)
class Tile:
    """Block sizes and launch parameters of one kernel.

    Attributes:
        own: Number of queries whose result a program computes. The kernel for the gradients of keys
            and values computes the result of `own` keys instead.
        step: Number of keys that a program reads per loop iteration. The kernel for the gradients
            of keys and values reads `step` queries instead.
        num_warps: Warps per program.
        num_stages: Stages of the software pipeline.
    """

    own: int
    step: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tiles:
    """Tiles of the three kernels: forward, gradient of queries, gradient of keys and values."""

    forward: Tile
    queries: Tile
    keys: Tile


# Tiles by head width: the fastest on an H200 among about thirty that fit 99 KiB of shared memory
# (docs/design/attention.md). 99 KiB is the limit of Ada and of small Ampere and Blackwell GPUs, on
# which no speed was measured.
TILES = {
    64: Tiles(Tile(64, 128, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    128: Tiles(Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
}
LOG2_E = math.log2(math.e)  # the kernels compute powers of two


def document_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    first_key_BT: Int[Array, "B T"],
    last_query_BS: Int[Array, "B S"],
    first_position: Int[Array, ""] | int = 0,
    tiles: Tiles | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention with grouped heads, scores scaled by H**-0.5.

    The query at position p attends to the keys s with first_key[p] <= s <= p.

    Args:
        first_key_BT: Position of the first key that each query attends to; must not decrease along
            T.
        last_query_BS: Position of the last query that attends to each key; must agree with
            `first_key_BT`, and must not decrease along S.
        first_position: Position of the first query. It is above 0 if this device holds only a later
            section of the queries.
        tiles: Block sizes; by default those in `TILES`.
    """
    given = q_BTNH, k_BSKH, v_BSKH, first_key_BT, last_query_BS
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    tiles = tiles or tiles_for(H)
    offset = jnp.asarray(first_position, jnp.int32).reshape(1)
    return _attention(*on_whole_tiles(*given, tiles), offset, H**-0.5, tiles)[:, :T, :, :H]


def tiles_for(head_dim: int) -> Tiles:
    """The row of `TILES` for heads of this width."""
    return TILES[64 if head_dim <= 64 else 128]


def on_whole_tiles(
    q_BTNH: Any, k_BSKH: Any, v_BSKH: Any, first_key_BT: Any, last_query_BS: Any, tiles: Tiles
) -> tuple[jax.Array, ...]:
    """Pad the inputs of the kernels to whole tiles, and heads to a width that the kernels have."""
    H = q_BTNH.shape[3]
    queries = math.lcm(tiles.forward.own, tiles.queries.own, tiles.keys.step)
    keys = math.lcm(tiles.forward.step, tiles.queries.step, tiles.keys.own)
    width = max(16, pl.next_power_of_2(H))
    # Padding does not change the result: padded keys come after all real queries, the gradients of
    # padded queries are zero, and padding of a head adds zeros to its sums.
    q = _padded(q_BTNH, queries, width)
    k, v = _padded(k_BSKH, keys, width), _padded(v_BSKH, keys, width)
    first_key, last_query = (
        jnp.pad(a, ((0, 0), (0, -a.shape[1] % size)), mode="edge")
        for a, size in ((first_key_BT, queries), (last_query_BS, keys))
    )
    assert max(q.size, k.size) < 2**31, "kernels count elements in 32 bits"
    return q, k, v, first_key, last_query


def _padded(x: jax.Array, length: int, width: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % length), (0, 0), (0, width - x.shape[3])))


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attention(
    q: Any, k: Any, v: Any, first_key: Any, last_query: Any, offset: Any, scale: float, tiles: Tiles
) -> jax.Array:
    return _forward(q, k, v, first_key, last_query, offset, scale, tiles)[0]


def _forward(
    q: Any, k: Any, v: Any, first_key: Any, last_query: Any, offset: Any, scale: float, tiles: Tiles
) -> Any:
    out, log_sum = forward_call(q, k, tiles.forward, scale).run(q, k, v, first_key, offset)
    out, log_sum = (checkpoint_name(x, KERNEL_RESIDUALS) for x in (out, log_sum))
    return out, (q, k, v, first_key, last_query, offset, out, log_sum)


def _backward(scale: float, tiles: Tiles, saved: Any, dout: jax.Array) -> Any:
    q, k, v, first_key, last_query, offset, out, log_sum = saved
    given = q, k, v, dout, log_sum, correction(out, dout)
    [dq] = queries_call(q, k, tiles.queries, scale).run(*given, first_key, offset)
    dk, dv = keys_call(q, k, tiles.keys, scale).run(*given, last_query, offset)
    return dq, dk, dv, None, None, None


_attention.defvjp(_forward, _backward)


def correction(out: jax.Array, dout: jax.Array) -> Float[Array, "B N T"]:
    """The sum over each head of the output times its gradient, which both backward kernels read."""
    return jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1).transpose(0, 2, 1)


class Call(NamedTuple):
    """A kernel, its grid of programs, and how it reads and writes arrays.

    Attributes:
        out: The spec and the shape of each result.
    """

    name: str
    kernel: Callable[..., None]
    tile: Tile
    grid: tuple[int, int, int]
    in_specs: list[pl.BlockSpec]
    out: list[tuple[pl.BlockSpec, jax.ShapeDtypeStruct]]

    def run(self, *arrays: jax.Array) -> Sequence[jax.Array]:
        """Compute the results."""
        return pl.pallas_call(
            self.kernel,
            grid=self.grid,
            in_specs=self.in_specs,
            out_specs=[spec for spec, _ in self.out],
            out_shape=[shape for _, shape in self.out],
            compiler_params=pltriton.CompilerParams(
                num_warps=self.tile.num_warps, num_stages=self.tile.num_stages
            ),
            name=f"document_attention_{self.name}",
        )(*arrays)


def forward_call(q: jax.Array, k: jax.Array, tile: Tile, scale: float) -> Call:
    """The kernel of the forward pass: output and softmax sums [B, N, T]."""
    (B, T, N, H), S = q.shape, k.shape[1]
    head, _, tokens, all_keys = _query_blocks(tile, H, S, N // k.shape[2])
    sums = pl.BlockSpec((None, None, T), lambda i, n, b: (b, n, 0))
    kernel = partial(_forward_kernel, scale=scale * LOG2_E, step=tile.step)
    return Call(
        "forward",
        kernel,
        tile,
        (T // tile.own, N, B),
        [head, all_keys, all_keys, tokens, SCALAR],
        [_own_rows_like(q), (sums, jax.ShapeDtypeStruct((B, N, T), jnp.float32))],
    )


def queries_call(q: jax.Array, k: jax.Array, tile: Tile, scale: float) -> Call:
    """The kernel for the gradient of the queries."""
    (B, T, N, H), S = q.shape, k.shape[1]
    head, sums, tokens, all_keys = _query_blocks(tile, H, S, N // k.shape[2])
    return Call(
        "queries",
        partial(_queries_kernel, scale=scale * LOG2_E, outer_scale=scale, step=tile.step),
        tile,
        (T // tile.own, N, B),
        [head, all_keys, all_keys, head, sums, sums, tokens, SCALAR],
        [_own_rows_like(q)],
    )


def keys_call(q: jax.Array, k: jax.Array, tile: Tile, scale: float) -> Call:
    """The kernel for the gradients of keys and values."""
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    head, _, tokens, _ = _query_blocks(tile, H, S, N // K)  # blocks of keys
    all_queries = pl.BlockSpec((None, T, N // K, H), lambda i, n, b: (b, 0, n, 0))
    sums = pl.BlockSpec((None, N // K, T), lambda i, n, b: (b, n, 0))
    return Call(
        "keys",
        partial(_keys_kernel, scale=scale * LOG2_E, outer_scale=scale, step=tile.step),
        tile,
        (S // tile.own, K, B),
        [all_queries, head, head, all_queries, sums, sums, tokens, SCALAR],
        [_own_rows_like(k)] * 2,
    )


SCALAR = pl.BlockSpec((1,), lambda i, n, b: (0,))


def _query_blocks(tile: Tile, H: int, S: int, group: int) -> tuple[pl.BlockSpec, ...]:
    """Return block specs for arrays [B, T, N, H], [B, N, T], [B, T] and [B, S, K, H].

    Program (i, n, b) gets block i of the T positions, query head n, and row b of the batch. It gets
    all S positions of the last array, for the key head that belongs to query head n.
    """
    return (
        pl.BlockSpec((None, tile.own, None, H), lambda i, n, b: (b, i, n, 0)),
        pl.BlockSpec((None, None, tile.own), lambda i, n, b: (b, n, i)),
        pl.BlockSpec((None, tile.own), lambda i, n, b: (b, i)),
        pl.BlockSpec((None, S, None, H), lambda i, n, b: (b, 0, n // group, 0)),
    )


def _own_rows_like(x: jax.Array) -> tuple[pl.BlockSpec, jax.ShapeDtypeStruct]:
    """Return a result like x [B, length, heads, H], of which a program writes `own_rows`."""
    spec = pl.BlockSpec((None, x.shape[1], None, x.shape[3]), lambda i, n, b: (b, 0, n, 0))
    return spec, jax.ShapeDtypeStruct(x.shape, x.dtype)


# ------------------------------------------------------------------------------------------ kernels


def _product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    return jax.lax.dot_general(
        a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32
    )


def own_rows(own: int, position: Any) -> Any:
    """Return the rows of a program's results, hidden from the compiler.

    They are the rows of its inputs. If the compiler knew this, it would compute both addresses
    before the loops and keep them in registers, and kernels for heads of 128 would spill.

    Args:
        position: Any position that was read from memory, so never negative, which the compiler does
            not know.
    """
    return pl.ds(jnp.where(position < 0, 0, pl.program_id(0) * own), own)


def _masked(scores: Any, at: Any, first: Any, last: Any) -> Any:
    """Replace scores by `NEVER` where the column's position is outside [first, last] of the row.

    Args:
        at: Positions of the columns.
    """
    return jnp.where((at >= first[:, None]) & (at <= last[:, None]), scores, NEVER)


def _forward_kernel(
    q_ref, k_ref, v_ref, first_key_ref, offset_ref, out_ref, log_sum_ref, *, scale, step
):
    own, H = q_ref.shape
    first = offset_ref[0] + pl.program_id(0) * own
    positions, first_key, q = first + jnp.arange(own), first_key_ref[...], q_ref[...]

    def block(j, carry, masked):
        acc, total, top = carry
        keys = pl.ds(j * step, step)
        scores = _product(q, k_ref[keys, :], (1, 1))
        if masked:
            at = j * step + jnp.arange(step)[None, :]
            scores = _masked(scores, at, first_key, positions)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        # Scores are scaled only here, because the GPU multiplies and subtracts in one instruction.
        shrunk = jnp.exp2((top - new_top) * scale)
        weights = jnp.exp2(scores * scale - (new_top * scale)[:, None])
        acc = acc * shrunk[:, None] + _product(weights.astype(v_ref.dtype), v_ref[keys, :], (1, 0))
        return acc, total * shrunk + jnp.sum(weights, axis=1), new_top

    blocks = visible_keys(first_key_ref, first, step, k_ref.shape[0])
    nothing = (
        jnp.zeros((own, H), jnp.float32),
        jnp.zeros((own,), jnp.float32),
        jnp.full((own,), NEVER, jnp.float32),
    )
    acc, total, top = over_blocks(blocks, block, nothing)
    rows = own_rows(own, first_key_ref[0])
    out_ref[rows, :] = (acc / total[:, None]).astype(out_ref.dtype)
    log_sum_ref[rows] = top * scale + jnp.log2(total)


def _queries_kernel(
    q_ref,
    k_ref,
    v_ref,
    dout_ref,
    log_sum_ref,
    correction_ref,
    first_key_ref,
    offset_ref,
    dq_ref,
    *,
    scale,
    outer_scale,
    step,
):
    own, H = q_ref.shape
    first = offset_ref[0] + pl.program_id(0) * own
    positions, first_key = first + jnp.arange(own), first_key_ref[...]
    q, dout, log_sum, correction = (
        ref[...] for ref in (q_ref, dout_ref, log_sum_ref, correction_ref)
    )

    def block(j, dq, masked):
        keys = pl.ds(j * step, step)
        k = k_ref[keys, :]
        scores = _product(q, k, (1, 1))
        if masked:
            at = j * step + jnp.arange(step)[None, :]
            scores = _masked(scores, at, first_key, positions)
        weights = jnp.exp2(scores * scale - log_sum[:, None])
        dscores = weights * (_product(dout, v_ref[keys, :], (1, 1)) - correction[:, None])
        return dq + _product(dscores.astype(k.dtype), k, (1, 0))

    blocks = visible_keys(first_key_ref, first, step, k_ref.shape[0])
    dq = over_blocks(blocks, block, jnp.zeros((own, H), jnp.float32))
    dq_ref[own_rows(own, first_key_ref[0]), :] = (dq * outer_scale).astype(dq_ref.dtype)


def _keys_kernel(
    q_ref,
    k_ref,
    v_ref,
    dout_ref,
    log_sum_ref,
    correction_ref,
    last_query_ref,
    offset_ref,
    dk_ref,
    dv_ref,
    *,
    scale,
    outer_scale,
    step,
):
    (own, H), (T, group, _), first = k_ref.shape, q_ref.shape, pl.program_id(0) * k_ref.shape[0]
    offset, positions = offset_ref[0], first + jnp.arange(own)
    last_query, k, v = last_query_ref[...], k_ref[...], v_ref[...]

    def head_step(n, carry):
        def block(i, carry, masked):
            dk, dv = carry
            queries = pl.ds(i * step, step)
            q, dout = q_ref[queries, n, :], dout_ref[queries, n, :]
            scores = _product(k, q, (1, 1))
            if masked:
                at = offset + i * step + jnp.arange(step)[None, :]
                scores = _masked(scores, at, positions, last_query)
            weights = jnp.exp2(scores * scale - log_sum_ref[n, queries][None, :])
            dscores = weights * (_product(v, dout, (1, 1)) - correction_ref[n, queries][None, :])
            dk += _product(dscores.astype(q.dtype), q, (1, 0))
            return dk, dv + _product(weights.astype(q.dtype), dout, (1, 0))

        return over_blocks(blocks, block, carry)

    blocks = seeing_queries(last_query_ref, first, offset, step, T)
    nothing = jnp.zeros((own, H), jnp.float32)
    dk, dv = jax.lax.fori_loop(0, group, head_step, (nothing, nothing))
    rows = own_rows(own, last_query_ref[0])
    dk_ref[rows, :] = (dk * outer_scale).astype(dk_ref.dtype)
    dv_ref[rows, :] = dv.astype(dv_ref.dtype)
