"""The kernels of `hopper_attention`, in Pallas for Mosaic GPU.

A warpgroup of 128 threads holds 64 rows of the result and multiplies with `wgmma`. The other
operand is in shared memory, to which its blocks are copied (TMA) while earlier ones are used.

In the kernels that hold queries, a program has three warpgroups. Two multiply, and share the blocks
of keys. In the forward pass they take turns: the tensor cores work for one while the other computes
exponentials. The third only copies. The kernel that holds keys has two sums, twice the registers.
So its programs have one warpgroup, whose threads can have 255 registers each, and two programs
share a multiprocessor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from consyn_jax.model.kernels.visible_blocks import NEVER, Blocks

ROWS = 64  # rows of a warpgroup, as many as one wgmma has
QUERIES, KEYS = 2 * ROWS, ROWS  # rows of a program that holds queries, and of one that holds keys
WARPGROUPS = {"num_threads": 3, "thread_name": "warpgroup"}  # for programs that hold queries
MATRIX = plgpu.Layout.WGMMA
PER_ROW, PER_COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)
IN_TILES = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # what wgmma reads


@dataclass(frozen=True)
class Reading:
    """The blocks of the operand that a kernel loops over.

    Attributes:
        step: Number of keys per block. The kernel that holds keys reads `step` queries instead.
        stages: Number of blocks in shared memory; at least 2 in the forward pass, whose warpgroups
            are half a block apart.
    """

    step: int
    stages: int


class Operands(NamedTuple):
    """The arrays that a kernel reads.

    Attributes:
        q: [B, T, N, H]
        k, v: [B, S, K, H]
        limit: Position of the first key of each query [B, T]. In the kernel that holds keys, the
            position of the last query of each key [B, S].
        blocks: `Blocks` that each program reads [B, programs, 4].
        offset: Position of the first query [1].
        dout: Gradient of the output, like q; None in the forward pass, like the next two.
        log_sum: Base-2 logarithm of the sum of each softmax [B, N, T].
        correction: Product of each output with its gradient [B, N, T].
    """

    q: Any
    k: Any
    v: Any
    limit: Any
    blocks: Any
    offset: Any
    dout: Any = None
    log_sum: Any = None
    correction: Any = None


class Place(NamedTuple):
    """The rows that a warpgroup computes, and the blocks that it reads for them.

    Attributes:
        head: Query head. In the kernel that holds keys, key head.
        row: Row of the batch.
        group: Number of the warpgroup in its program.
        first: Index of its first query or key, in the sequence.
        blocks: Blocks that the program reads.
    """

    head: Any
    row: Any
    group: Any
    first: Any
    blocks: Blocks

    def of(self, ref: Any) -> Any:
        """This warpgroup's part of an array [B, T, heads, H]."""
        return ref.at[self.row, pl.ds(self.first, ROWS), self.head]

    def positions(self) -> Any:
        """Indices of this warpgroup's queries or keys, in the sequence."""
        return self.first + plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=PER_ROW)

    def masked(self, scores: Any, block: Any, first_column: Any, limits: Callable[[], Any]) -> Any:
        """Replace scores by `NEVER` where the column's position is outside the row's limits.

        Args:
            scores: [ROWS, step]
            block: Number of the block; most blocks need no mask.
            first_column: Position of the first column.
            limits: Returns the first and the last position for each row.
        """

        def mask(scores: Any) -> Any:
            shape = scores.shape
            first, last = (_along(limit, shape, 0) for limit in limits())
            column = first_column + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)
            return jnp.where((column >= first) & (column <= last), scores, NEVER)

        is_edge = (block < self.blocks.whole_start) | (block >= self.blocks.whole_stop)
        return jax.lax.cond(is_edge, mask, lambda scores: scores, scores)


def _place(blocks_ref: Any, own: int) -> Place:
    head, tile, row = map(jax.lax.axis_index, ("head", "tile", "row"))
    group = 0 if own == ROWS else jax.lax.axis_index("warpgroup")
    blocks = Blocks(*(blocks_ref[row, tile, i] for i in range(4)))
    return Place(head, row, group, tile * own + group * ROWS, blocks)


def _keys_of(at: Place, given: Operands, first_key: Any) -> Callable[[], Any]:
    """Return the `limits` of `Place.masked` for queries: the first and the last key of each."""
    return lambda: (first_key, given.offset[0] + at.positions())


def _along(x: Any, shape: tuple[int, ...], axis: int) -> Any:
    return jax.lax.broadcast_in_dim(x, shape, [axis])


def _load(ref: Any, layout: Any, **how: Any) -> Any:
    # Before JAX 0.11, the index was an argument without a default.
    index = () if jax.__version_info__ >= (0, 11) else ((),)
    return plgpu.load(ref, *index, layout=layout, **how)


def _per_row(ref: Any) -> Any:
    return _load(ref, PER_ROW, optimized=False)  # from global memory, without the layout of TMA


def _zeros(*shape: int) -> Any:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), MATRIX if len(shape) == 2 else PER_ROW)


def _plus_product(accumulator: Any, a: Any, b_smem: Any) -> Any:
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b_smem))(plgpu.ACC.init(accumulator))


def _write(x: Any, smem: Any, at: Place, ref: Any) -> None:
    """Write a result [ROWS, H] to the array, by way of shared memory that is free now."""
    smem[...] = x.astype(smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem, at.of(ref))


def _over_keys(at: Place, given: Operands, reading: Reading, block: Any, own: Any) -> None:
    """Run `own(run)` on the multiplying warpgroups, while the third one copies keys and values.

    `run(carry)` updates the carry by `block(index, k, v, k_is_free, v_is_free, carry)` for each
    block.
    """
    _, _, N, H = given.q.shape
    keys = plgpu.BlockSpec(
        (reading.step, H), lambda i: (at.blocks.start + i, 0), transforms=IN_TILES
    )
    key_head = jax.lax.div(at.head, jnp.int32(N // given.k.shape[2]))
    plgpu.emit_pipeline_warp_specialized(
        block,
        grid=(at.blocks.stop - at.blocks.start,),
        in_specs=[keys, keys],
        max_concurrent_steps=reading.stages,
        num_compute_wgs=2,
        memory_registers=24,
        wg_axis="warpgroup",
        manual_consumed_barriers=True,
        compute_context=own,
    )(given.k.at[at.row, :, key_head, :], given.v.at[at.row, :, key_head, :])


def _weights_and_gradients(shape: Any, scores: Any, gradients: Any, weights_of: Any) -> Any:
    """Compute the softmax weights of a block, and the gradients of these weights.

    Both products begin at once, and the weights are computed while the second one is under way.

    Args:
        scores, gradients: Operands [ROWS, H] and [step, H] of each product, in shared memory.
        weights_of: Returns the weights that belong to scores.
    """

    def multiply(first: Any, second: Any) -> Any:
        for accumulator, (a, b) in ((first, scores), (second, gradients)):
            plgpu.wgmma(accumulator, a, b.T)
        weights = weights_of(plgpu.wgmma_accumulator_load(first, wait_n=1))
        return weights, second[...]

    return pl.run_scoped(multiply, *[plgpu.ACC(shape, jnp.float32)] * 2)


# ------------------------------------------------------------------------------------------ kernels


def forward(given, out_ref, log_sum_ref, q_smems, sum_smems, arrived, turn, *, scale, reading):
    """Compute the output and the logarithm of each softmax's sum."""
    at, H = _place(given.blocks, QUERIES), given.q.shape[3]
    shape, q_smem = (ROWS, reading.step), q_smems.at[at.group]

    def take_turn():  # each warpgroup 2 n + 1 times for n blocks
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    def own(run):
        plgpu.copy_gmem_to_smem(at.of(given.q), q_smem, arrived.at[at.group])
        first_key = _per_row(given.limit.at[at.row, pl.ds(at.first, ROWS)])
        plgpu.barrier_wait(arrived.at[at.group])
        pl.when(at.group == 1)(take_turn)
        top = plgpu.layout_cast(jnp.full((ROWS,), NEVER, jnp.float32), PER_ROW)
        acc, total, top, _ = run((_zeros(ROWS, H), _zeros(ROWS), top, first_key))
        pl.when(at.group == 0)(take_turn)
        sum_smems[at.group] = top * scale + jnp.log2(total)
        _write(acc / _along(total, acc.shape, 0), q_smem, at, out_ref)
        sums_ref = log_sum_ref.at[at.row, at.head, pl.ds(at.first, ROWS)]
        plgpu.copy_smem_to_gmem(sum_smems.at[at.group], sums_ref)
        plgpu.wait_smem_to_gmem(0)

    def block(index, k_smem, v_smem, k_is_free, v_is_free, carry):
        (acc, total, top, first_key), j = carry, at.blocks.start + index[0]

        def multiply(accumulator):
            plgpu.wgmma(accumulator, q_smem, k_smem.T)
            take_turn()
            return accumulator[...]

        scores = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
        plgpu.barrier_arrive(k_is_free)
        scores = at.masked(scores, j, j * reading.step, _keys_of(at, given, first_key))
        new_top = jnp.maximum(top, scores.max(axis=1))
        shrunk = jnp.exp2((top - new_top) * scale)
        weights = jnp.exp2(scores * scale - _along(new_top * scale, shape, 0))
        acc, total = acc * _along(shrunk, acc.shape, 0), total * shrunk + weights.sum(axis=1)
        weights = weights.astype(v_smem.dtype)
        # The softmax is complete before the turn passes.
        acc, total, top, weights = jax.lax.optimization_barrier((acc, total, new_top, weights))
        take_turn()
        acc = _plus_product(acc, weights, v_smem)
        plgpu.barrier_arrive(v_is_free)
        return acc, total, top, first_key

    _over_keys(at, given, reading, block, own)


def queries(given, dq_ref, q_smems, dout_smems, arrived, *, scale, outer_scale, reading):
    """Compute the gradient of queries."""
    at, H = _place(given.blocks, QUERIES), given.q.shape[3]
    shape, q_smem, dout_smem = (ROWS, reading.step), q_smems.at[at.group], dout_smems.at[at.group]

    def own(run):
        for ref, smem in ((given.q, q_smem), (given.dout, dout_smem)):
            plgpu.copy_gmem_to_smem(at.of(ref), smem, arrived.at[at.group])
        rows = pl.ds(at.first, ROWS)
        log_sum, correction = (
            _per_row(ref.at[at.row, at.head, rows]) for ref in (given.log_sum, given.correction)
        )
        first_key = _per_row(given.limit.at[at.row, rows])
        plgpu.barrier_wait(arrived.at[at.group])
        dq, *_ = run((_zeros(ROWS, H), log_sum, correction, first_key))
        _write(dq * outer_scale, q_smem, at, dq_ref)
        plgpu.wait_smem_to_gmem(0)

    def block(index, k_smem, v_smem, k_is_free, v_is_free, carry):
        (dq, log_sum, correction, first_key), j = carry, at.blocks.start + index[0]

        def weights_of(scores):
            scores = at.masked(scores, j, j * reading.step, _keys_of(at, given, first_key))
            return jnp.exp2(scores * scale - _along(log_sum, shape, 0))

        pairs = (q_smem, k_smem), (dout_smem, v_smem)
        weights, dweights = _weights_and_gradients(shape, *pairs, weights_of)
        plgpu.barrier_arrive(v_is_free)
        dscores = weights * (dweights - _along(correction, shape, 0))
        dq = _plus_product(dq, dscores.astype(k_smem.dtype), k_smem)
        plgpu.barrier_arrive(k_is_free)
        return dq, log_sum, correction, first_key

    _over_keys(at, given, reading, block, own)


def keys(given, dk_ref, dv_ref, k_smem, v_smem, arrived, *, scale, outer_scale, reading):
    """Compute the gradients of keys and values."""
    at, H, step = _place(given.blocks, KEYS), given.k.shape[3], reading.step
    shape, group = (ROWS, step), given.q.shape[2] // given.k.shape[2]
    for ref, smem in ((given.k, k_smem), (given.v, v_smem)):
        plgpu.copy_gmem_to_smem(at.of(ref), smem, arrived)
    plgpu.barrier_wait(arrived)

    def block(index, q_smem, dout_smem, sum_smem, correction_smem, carry):
        i = at.blocks.start + index[0]

        def limits():
            # Read here and not before the loop, for which there are no registers left.
            return at.positions(), _per_row(given.limit.at[at.row, pl.ds(at.first, ROWS)])

        def weights_of(scores):
            log_sum = _along(_load(sum_smem, PER_COLUMN), shape, 1)
            scores = at.masked(scores, i, given.offset[0] + i * step, limits)
            return jnp.exp2(scores * scale - log_sum)

        pairs = (k_smem, q_smem), (v_smem, dout_smem)
        weights, dweights = _weights_and_gradients(shape, *pairs, weights_of)
        correction = _along(_load(correction_smem, PER_COLUMN), shape, 1)
        # JAX's interpreter does not know that a copy waits for all threads to have read.
        plgpu.commit_smem()

        def add(accumulators):
            dk, dv = accumulators
            plgpu.wgmma(dv, weights.astype(dout_smem.dtype), dout_smem)
            dscores = weights * (dweights - correction)
            plgpu.wgmma(dk, dscores.astype(q_smem.dtype), q_smem)

        return pl.run_state(add)(tuple(map(plgpu.ACC.init, carry)))

    rows = plgpu.BlockSpec(
        (step, None, H),
        lambda i, n: (at.blocks.start + i, at.head * group + n, 0),
        transforms=IN_TILES,
    )
    sums = plgpu.BlockSpec((None, step), lambda i, n: (at.head * group + n, at.blocks.start + i))
    dk, dv = plgpu.emit_pipeline(
        block,
        grid=(at.blocks.stop - at.blocks.start, group),
        in_specs=[rows, rows, sums, sums],
        max_concurrent_steps=reading.stages,
        init_carry=(_zeros(ROWS, H), _zeros(ROWS, H)),
    )(*(ref.at[at.row] for ref in (given.q, given.dout, given.log_sum, given.correction)))
    _write(dk * outer_scale, k_smem, at, dk_ref)
    _write(dv, v_smem, at, dv_ref)
    plgpu.wait_smem_to_gmem(0)
