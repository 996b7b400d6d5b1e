"""Attention inside documents for Hopper, in Pallas for Mosaic GPU.

The same mathematics as `document_attention`, which is written in Triton. A warpgroup of 128 threads
holds 64 rows of the result, multiplies with `wgmma`, and reads the other operand from shared
memory, to which blocks are copied (TMA) while earlier ones are used. As in `document_attention`,
blocks that no row sees are not read, only the blocks at the edges are masked, and no atomic adds
are needed.

In the kernels that hold queries, a program has three warpgroups. Two multiply, and share the
blocks of keys; in the forward pass they take turns, so that the tensor cores work for one while the
other computes exponentials. The third only copies. The kernel that holds keys has twice the sums,
which need all registers that a thread can have; its programs have one warpgroup, and two programs
or three share a multiprocessor.

Scores, softmax and sums are float32; weights and score gradients are rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from consyn_jax.model.kernels.document_attention import NEVER
from consyn_jax.model.rematerialisation import KERNEL_RESIDUALS

ROWS = 64  # of a warpgroup: the number of rows of one wgmma
QUERIES, KEYS = 2 * ROWS, ROWS  # of a program that holds queries, and of one that holds keys
WARPGROUPS = {"num_threads": 3, "thread_name": "warpgroup"}  # of a program that holds queries
MATRIX = plgpu.Layout.WGMMA
PER_ROW, PER_COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)
IN_TILES = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # what wgmma reads


@dataclass(frozen=True)
class Reading:
    """How a kernel reads the operand that it loops over.

    Attributes:
        step: Number of keys per block; of queries in the kernel for the gradients of keys.
        stages: Number of blocks in shared memory.
    """

    step: int
    stages: int


class Readings(NamedTuple):
    """The blocks of the three kernels: forward, gradient of queries, gradients of keys and values."""

    forward: Reading
    queries: Reading
    keys: Reading


# By head width: the largest blocks that spill no registers (tests/planning/test_hopper_kernels.py).
# No GPU has run them.
READINGS = {
    64: Readings(Reading(128, 2), Reading(64, 2), Reading(64, 2)),
    128: Readings(Reading(128, 2), Reading(64, 2), Reading(64, 2)),
}


def hopper_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    first_key_BT: Int[Array, "B T"],
    last_query_BS: Int[Array, "B S"],
    first_position: Int[Array, ""] | int = 0,
    readings: Readings | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention with grouped heads, scores scaled by H**-0.5, in bfloat16 or float16.

    The query at position p attends to the keys s with first_key[p] <= s <= p.

    Args:
        first_key_BT: Position of the first key that each query attends to; must not decrease along
            T.
        last_query_BS: Position of the last query that attends to each key; must agree with
            `first_key_BT`, and must not decrease along S.
        first_position: Position of the first query. It is above 0 if this device holds only a later
            section of the queries.
        readings: Block sizes; by default those in `READINGS`.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    readings = readings or READINGS[64 if H <= 64 else 128]
    # Padding does not change the result: padded keys come after all real queries, the gradients of
    # padded queries are zero, and padding of a head adds zeros to its sums.
    queries = math.lcm(QUERIES, readings.keys.step)
    keys = math.lcm(KEYS, readings.forward.step, readings.queries.step)
    q = _padded(q_BTNH, queries)
    k, v = _padded(k_BSKH, keys), _padded(v_BSKH, keys)
    first_key, last_query = (
        jnp.pad(a, ((0, 0), (0, -a.shape[1] % size)), mode="edge").astype(jnp.int32)
        for a, size in ((first_key_BT, queries), (last_query_BS, keys))
    )
    offset = jnp.asarray(first_position, jnp.int32).reshape(1)
    return _attention(q, k, v, first_key, last_query, offset, H**-0.5, readings)[:, :T, :, :H]


def _padded(x: jax.Array, length: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % length), (0, 0), (0, -x.shape[3] % 64)))


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attention(
    q: Any, k: Any, v: Any, first_key: Any, last_query: Any, offset: Any, scale: float, readings: Any
) -> jax.Array:
    return _forward(q, k, v, first_key, last_query, offset, scale, readings)[0]


def _forward(
    q: Any, k: Any, v: Any, first_key: Any, last_query: Any, offset: Any, scale: float, readings: Any
) -> Any:
    B, T, N, H = q.shape
    reading = readings.forward
    blocks = _visible_keys(first_key, offset, reading.step, k.shape[1])
    out, log_sum = _kernel(
        partial(_forward_kernel, scale=scale * math.log2(math.e), reading=reading),
        "hopper_attention_forward",
        grid=(N, T // QUERIES, B),
        out=[_like(q), jax.ShapeDtypeStruct((B, N, T), jnp.float32)],
        scratch=[
            _rows_of(q, 2),
            plgpu.SMEM((2, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_arrivals=2),
        ],
        **WARPGROUPS,
    )(q, k, v, first_key, blocks, offset)
    out, log_sum = (checkpoint_name(x, KERNEL_RESIDUALS) for x in (out, log_sum))
    return out, (q, k, v, first_key, last_query, offset, out, log_sum)


def _backward(scale: float, readings: Readings, saved: Any, dout: jax.Array) -> Any:
    q, k, v, first_key, last_query, offset, out, log_sum = saved
    B, T, N, _ = q.shape
    S, K = k.shape[1:3]
    scales = {"scale": scale * math.log2(math.e), "outer_scale": scale}
    product = out.astype(jnp.float32) * dout.astype(jnp.float32)
    correction_BNT = jnp.sum(product, axis=-1).transpose(0, 2, 1)

    reading = readings.queries
    blocks = _visible_keys(first_key, offset, reading.step, S)
    dq = _kernel(
        partial(_queries_kernel, reading=reading, **scales),
        "hopper_attention_queries",
        grid=(N, T // QUERIES, B),
        out=_like(q),
        scratch=[_rows_of(q, 2), _rows_of(q, 2), plgpu.Barrier(num_arrivals=2, num_barriers=2)],
        **WARPGROUPS,
    )(q, k, v, dout, log_sum, correction_BNT, first_key, blocks, offset)

    reading = readings.keys
    blocks = _seeing_queries(last_query, offset, reading.step, T)
    dk, dv = _kernel(
        partial(_keys_kernel, reading=reading, **scales),
        "hopper_attention_keys",
        grid=(K, S // KEYS, B),
        out=[_like(k), _like(v)],
        scratch=[_rows_of(k), _rows_of(v), plgpu.Barrier(num_arrivals=2)],
    )(q, k, v, dout, log_sum, correction_BNT, last_query, blocks, offset)
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


# ------------------------------------------------------------------------------------------- blocks


def _visible_keys(first_key: jax.Array, offset: jax.Array, step: int, S: int) -> jax.Array:
    """The blocks of keys that each program's queries see.

    Args:
        first_key: Position of the first key that each query attends to [B, T].
        offset: Position of the first query [1].
        step: Keys per block.

    Returns:
        For each program [B, T / QUERIES, 4]: the first block to read and the block after the last, and
        the same of the blocks that need no mask.
    """
    own = first_key.reshape(first_key.shape[0], -1, QUERIES)
    first = offset + QUERIES * jnp.arange(own.shape[1])
    stop = jnp.minimum((first + QUERIES - 1) // step + 1, S // step)
    return _blocks(own[..., 0] // step, stop, -(-own[..., -1] // step), (first + 1) // step)


def _seeing_queries(last_query: jax.Array, offset: jax.Array, step: int, T: int) -> jax.Array:
    """The blocks of queries that see each program's keys, as in `_visible_keys`.

    A pipeline reads at least one block. On a mesh with a `context` axis, all queries of the device
    may come before or after the keys, and then that block is masked.

    Args:
        last_query: Position of the last query that attends to each key [B, S].
        offset: Position of the device's first query [1].
        step: Queries per block.
    """
    own = last_query.reshape(last_query.shape[0], -1, KEYS)
    first = KEYS * jnp.arange(own.shape[1]) - offset
    start = jnp.minimum(jnp.maximum(first, 0) // step, T // step - 1)
    stop = jnp.clip((own[..., -1] - offset) // step + 1, start + 1, T // step)
    whole_start = -(-jnp.maximum(first + KEYS - 1, 0) // step)
    return _blocks(start, stop, whole_start, jnp.maximum(own[..., 0] + 1 - offset, 0) // step)


def _blocks(*bounds: jax.Array) -> jax.Array:
    return jnp.stack(jnp.broadcast_arrays(*bounds), axis=-1).astype(jnp.int32)


class Place(NamedTuple):
    """Where a program is in the arrays.

    Attributes:
        head: Query head; in the kernel for the gradients of keys, key head.
        row: Row of the batch.
        group: Warpgroup: 0 and 1 multiply.
        first: Index of the warpgroup's first row of the result, in the sequence.
        start, stop: Blocks to read.
        whole_start, whole_stop: Blocks that need no mask.
    """

    head: Any
    row: Any
    group: Any
    first: Any
    start: Any
    stop: Any
    whole_start: Any
    whole_stop: Any

    @property
    def rows(self) -> Any:
        return pl.ds(self.first, ROWS)

    def masked(self, scores: Any, j: Any, mask: Callable[[Any], Any]) -> Any:
        """Apply `mask` to the scores of block j, if it needs it."""
        edge = (j < self.whole_start) | (j >= self.whole_stop)
        return jax.lax.cond(edge, mask, lambda scores: scores, scores)


def _place(blocks_ref: Any, own: int) -> Place:
    head, tile, row = map(jax.lax.axis_index, ("head", "tile", "row"))
    group = 0 if own == ROWS else jax.lax.axis_index("warpgroup")
    bounds = (blocks_ref[row, tile, i] for i in range(4))
    return Place(head, row, group, tile * own + group * ROWS, *bounds)


def _stream(body: Any, own: Any, grid: Any, reading: Reading, specs: Any) -> Any:
    """Return the function that runs `own` on two warpgroups, while the third one copies.

    `own(run)` calls `run(carry)`, which calls `body(index, *blocks, *consumed, carry)` per block.
    """
    return plgpu.emit_pipeline_warp_specialized(
        body,
        grid=grid,
        in_specs=specs,
        max_concurrent_steps=reading.stages,
        num_compute_wgs=2,
        memory_registers=24,
        wg_axis="warpgroup",
        manual_consumed_barriers=True,
        compute_context=own,
    )


def _positions(shape: tuple[int, int], axis: int) -> Any:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX)


def _along(x: Any, shape: tuple[int, int], axis: int) -> Any:
    return jax.lax.broadcast_in_dim(x, shape, [axis])


def _load(ref: Any, **how: Any) -> Any:
    # Before JAX 0.11, the index was an argument without a default.
    return plgpu.load(ref, *(() if jax.__version_info__ >= (0, 11) else ((),)), **how)


def _per_row(ref: Any) -> Any:
    return _load(ref, layout=PER_ROW, optimized=False)


def _zeros(*shape: int) -> Any:
    return plgpu.layout_cast(
        jnp.zeros(shape, jnp.float32), MATRIX if len(shape) == 2 else PER_ROW
    )


def _transposed(ref: Any) -> Any:
    return plgpu.transpose_ref(ref, (1, 0))


def _weights_and_gradients(shape: Any, scores: Any, gradients: Any, weights_of: Any) -> Any:
    """Compute the softmax weights of a block, and the gradients of these weights.

    Both products begin at once, and the weights are computed while the second one is under way.

    Args:
        scores, gradients: The operands [ROWS, H] and [step, H] of each product, in shared memory.
        weights_of: Returns the weights that belong to scores.
    """

    def multiply(first: Any, second: Any) -> Any:
        for accumulator, (a, b) in ((first, scores), (second, gradients)):
            plgpu.wgmma(accumulator, a, _transposed(b))
        weights = weights_of(plgpu.wgmma_accumulator_load(first, wait_n=1))
        return weights, second[...]

    return pl.run_scoped(multiply, *[plgpu.ACC(shape, jnp.float32)] * 2)


# ------------------------------------------------------------------------------------------ kernels


def _forward_kernel(
    q_ref,
    k_ref,
    v_ref,
    first_key_ref,
    blocks_ref,
    offset_ref,
    out_ref,
    log_sum_ref,
    own_smem,
    sums_smem,
    arrived,
    turn,
    *,
    scale,
    reading,
):
    at, H = _place(blocks_ref, QUERIES), q_ref.shape[3]
    shape = (ROWS, reading.step)
    q_smem = own_smem.at[at.group]

    def take_turn():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    def own(run):
        plgpu.copy_gmem_to_smem(q_ref.at[at.row, at.rows, at.head], q_smem, arrived.at[at.group])
        first_key = _per_row(first_key_ref.at[at.row, at.rows])
        plgpu.barrier_wait(arrived.at[at.group])
        pl.when(at.group == 1)(take_turn)
        top = plgpu.layout_cast(jnp.full((ROWS,), NEVER, jnp.float32), PER_ROW)
        acc, total, top, _ = run((_zeros(ROWS, H), _zeros(ROWS), top, first_key))
        pl.when(at.group == 0)(take_turn)
        q_smem[...] = (acc / _along(total, acc.shape, 0)).astype(q_smem.dtype)
        sums_smem[at.group] = top * scale + jnp.log2(total)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem, out_ref.at[at.row, at.rows, at.head])
        plgpu.copy_smem_to_gmem(
            sums_smem.at[at.group], log_sum_ref.at[at.row, at.head, at.rows]
        )
        plgpu.wait_smem_to_gmem(0)

    def block(index, k_smem, v_smem, k_consumed, v_consumed, carry):
        acc, total, top, first_key = carry
        j = at.start + index[0]

        def mask(scores):
            keys = j * reading.step + _positions(shape, 1)
            queries = offset_ref[0] + at.first + _positions(shape, 0)
            seen = (keys >= _along(first_key, shape, 0)) & (keys <= queries)
            return jnp.where(seen, scores, NEVER)

        def multiply(accumulator):
            plgpu.wgmma(accumulator, q_smem, _transposed(k_smem))
            take_turn()
            return accumulator[...]

        scores = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
        plgpu.barrier_arrive(k_consumed)
        scores = at.masked(scores, j, mask)
        new_top = jnp.maximum(top, scores.max(axis=1))
        shrunk = jnp.exp2((top - new_top) * scale)
        weights = jnp.exp2(scores * scale - _along(new_top * scale, shape, 0))
        acc = acc * _along(shrunk, acc.shape, 0)
        total = total * shrunk + weights.sum(axis=1)
        weights = weights.astype(v_smem.dtype)
        # The softmax is complete before the turn passes.
        acc, total, top, weights = jax.lax.optimization_barrier((acc, total, new_top, weights))
        take_turn()
        acc = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, v_smem))(plgpu.ACC.init(acc))
        plgpu.barrier_arrive(v_consumed)
        return acc, total, top, first_key

    keys = plgpu.BlockSpec((reading.step, H), lambda i: (at.start + i, 0), transforms=IN_TILES)
    key_head = jax.lax.div(at.head, jnp.int32(q_ref.shape[2] // k_ref.shape[2]))
    _stream(block, own, (at.stop - at.start,), reading, [keys, keys])(
        k_ref.at[at.row, :, key_head, :], v_ref.at[at.row, :, key_head, :]
    )


def _queries_kernel(
    q_ref,
    k_ref,
    v_ref,
    dout_ref,
    log_sum_ref,
    correction_ref,
    first_key_ref,
    blocks_ref,
    offset_ref,
    dq_ref,
    q_smems,
    dout_smems,
    arrived,
    *,
    scale,
    outer_scale,
    reading,
):
    at, H = _place(blocks_ref, QUERIES), q_ref.shape[3]
    shape = (ROWS, reading.step)
    q_smem, dout_smem = q_smems.at[at.group], dout_smems.at[at.group]

    def own(run):
        for ref, smem in ((q_ref, q_smem), (dout_ref, dout_smem)):
            plgpu.copy_gmem_to_smem(ref.at[at.row, at.rows, at.head], smem, arrived.at[at.group])
        log_sum, correction = (
            _per_row(ref.at[at.row, at.head, at.rows]) for ref in (log_sum_ref, correction_ref)
        )
        first_key = _per_row(first_key_ref.at[at.row, at.rows])
        plgpu.barrier_wait(arrived.at[at.group])
        dq, *_ = run((_zeros(ROWS, H), log_sum, correction, first_key))
        q_smem[...] = (dq * outer_scale).astype(q_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem, dq_ref.at[at.row, at.rows, at.head])
        plgpu.wait_smem_to_gmem(0)

    def block(index, k_smem, v_smem, k_consumed, v_consumed, carry):
        dq, log_sum, correction, first_key = carry
        j = at.start + index[0]

        def mask(scores):
            keys = j * reading.step + _positions(shape, 1)
            queries = offset_ref[0] + at.first + _positions(shape, 0)
            seen = (keys >= _along(first_key, shape, 0)) & (keys <= queries)
            return jnp.where(seen, scores, NEVER)

        def weights_of(scores):
            return jnp.exp2(at.masked(scores, j, mask) * scale - _along(log_sum, shape, 0))

        weights, dweights = _weights_and_gradients(
            shape, (q_smem, k_smem), (dout_smem, v_smem), weights_of
        )
        plgpu.barrier_arrive(v_consumed)
        dscores = (weights * (dweights - _along(correction, shape, 0))).astype(k_smem.dtype)
        dq = pl.run_state(lambda ref: plgpu.wgmma(ref, dscores, k_smem))(plgpu.ACC.init(dq))
        plgpu.barrier_arrive(k_consumed)
        return dq, log_sum, correction, first_key

    keys = plgpu.BlockSpec((reading.step, H), lambda i: (at.start + i, 0), transforms=IN_TILES)
    key_head = jax.lax.div(at.head, jnp.int32(q_ref.shape[2] // k_ref.shape[2]))
    _stream(block, own, (at.stop - at.start,), reading, [keys, keys])(
        k_ref.at[at.row, :, key_head, :], v_ref.at[at.row, :, key_head, :]
    )


def _keys_kernel(
    q_ref,
    k_ref,
    v_ref,
    dout_ref,
    log_sum_ref,
    correction_ref,
    last_query_ref,
    blocks_ref,
    offset_ref,
    dk_ref,
    dv_ref,
    k_smem,
    v_smem,
    arrived,
    *,
    scale,
    outer_scale,
    reading,
):
    at, H = _place(blocks_ref, KEYS), k_ref.shape[3]
    shape = (ROWS, reading.step)
    for ref, smem in ((k_ref, k_smem), (v_ref, v_smem)):
        plgpu.copy_gmem_to_smem(ref.at[at.row, at.rows, at.head], smem, arrived)
    plgpu.barrier_wait(arrived)

    def block(index, q_smem, dout_smem, sum_smem, correction_smem, carry):
        (dk, dv), i = carry, at.start + index[0]

        def mask(scores):
            queries = offset_ref[0] + i * reading.step + _positions(shape, 1)
            keys = at.first + _positions(shape, 0)
            # Not read before the loop: its registers would spill.
            last_query = _per_row(last_query_ref.at[at.row, at.rows])
            seen = (queries >= keys) & (queries <= _along(last_query, shape, 0))
            return jnp.where(seen, scores, NEVER)

        def weights_of(scores):
            log_sum = _along(_load(sum_smem, layout=PER_COLUMN), shape, 1)
            return jnp.exp2(at.masked(scores, i, mask) * scale - log_sum)

        weights, dweights = _weights_and_gradients(
            shape, (k_smem, q_smem), (v_smem, dout_smem), weights_of
        )
        correction = _along(_load(correction_smem, layout=PER_COLUMN), shape, 1)

        def add(refs):
            dk_ref, dv_ref = refs
            plgpu.wgmma(dv_ref, weights.astype(dout_smem.dtype), dout_smem)
            dscores = weights * (dweights - correction)
            plgpu.wgmma(dk_ref, dscores.astype(q_smem.dtype), q_smem)

        return pl.run_state(add)((plgpu.ACC.init(dk), plgpu.ACC.init(dv)))

    group = q_ref.shape[2] // k_ref.shape[2]
    heads = plgpu.BlockSpec(
        (reading.step, None, H),
        lambda i, n: (at.start + i, at.head * group + n, 0),
        transforms=IN_TILES,
    )
    sums = plgpu.BlockSpec((None, reading.step), lambda i, n: (at.head * group + n, at.start + i))
    dk, dv = plgpu.emit_pipeline(
        block,
        grid=(at.stop - at.start, group),
        in_specs=[heads, heads, sums, sums],
        max_concurrent_steps=reading.stages,
        init_carry=(_zeros(ROWS, H), _zeros(ROWS, H)),
    )(*(ref.at[at.row] for ref in (q_ref, dout_ref, log_sum_ref, correction_ref)))
    k_smem[...] = (dk * outer_scale).astype(k_smem.dtype)
    v_smem[...] = dv.astype(v_smem.dtype)
    plgpu.commit_smem()
    for smem, ref in ((k_smem, dk_ref), (v_smem, dv_ref)):
        plgpu.copy_smem_to_gmem(smem, ref.at[at.row, at.rows, at.head])
    plgpu.wait_smem_to_gmem(0)
