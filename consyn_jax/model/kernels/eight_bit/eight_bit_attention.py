"""Attention that also writes 8 bits: its output, and in the backward pass the gradient of values.

Both are read by matmuls. Each program computes its rows as `document_attention` does, writes them
in 16 bits, and reads them again, from the GPU's cache, to write 8 bits in both layouts.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from consyn_jax.model.fp8.quantisation import FORWARD, GRADIENT, Scale, narrowed
from consyn_jax.model.fp8.slots import Slot
from consyn_jax.model.kernels import document_attention as plain

# Columns of a head that a program casts at a time. With more, the cast needs more registers than
# the loops before it, and the kernel spills more (docs/design/fp8.md). Its speed was not measured.
COLUMNS = 32


def eight_bit_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    first_key_BT: Int[Array, "B T"],
    last_query_BT: Int[Array, "B T"],
    out_scale: Scale,
    v_slot: Slot,
) -> tuple[Float[Array, "B T N H"], tuple[jax.Array, jax.Array, Float[Array, "B N"]]]:
    """`document_attention` of a whole sequence, and its output in e4m3.

    Args:
        out_scale: Scale of the 8-bit output.
        v_slot: Slot for the gradient of `v_BTKH`: `values` [B, T, K * H], `transposed`
            [K * H, B, T], and `largest` [B, K], for the largest magnitude in each head.

    Returns:
        The output, and its 8-bit values [B, T, N * H], their transpose [N * H, B, T], and the
        largest magnitude in each head.
    """
    (B, T, N, H), K = q_BTNH.shape, k_BTKH.shape[2]
    tiles = plain.tiles_for(H)
    given = q_BTNH, k_BTKH, v_BTKH, first_key_BT, last_query_BT
    q, k, v, first_key, last_query = plain.on_whole_tiles(*given, tiles)
    more, wider = k.shape[1] - T, k.shape[3] - H
    values = v_slot.values.reshape(B, T, K, H)
    transposed = v_slot.transposed.reshape(K, H, B, T)
    slot = v_slot._replace(
        values=jnp.pad(values, ((0, 0), (0, more), (0, 0), (0, wider))),
        transposed=jnp.pad(transposed, ((0, 0), (0, wider), (0, 0), (0, more))),
    )
    operands = _Operands(q, k, v, first_key, last_query, out_scale, slot)
    out, values, transposed, largest = _attention(operands, H**-0.5, T, tiles)
    values, transposed = values[:, :T, :, :H], transposed[:, :H, :, :T]
    written = values.reshape(B, T, N * H), transposed.reshape(N * H, B, T), largest
    return out[:, :T, :, :H], written


class _Operands(NamedTuple):
    q: Any
    k: Any
    v: Any
    first_key: Any
    last_query: Any
    out_scale: Any
    v_slot: Any


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _attention(given: _Operands, scale: float, length: int, tiles: plain.Tiles) -> Any:
    return _forward(given, scale, length, tiles)[0]


def _forward(given: _Operands, scale: float, length: int, tiles: plain.Tiles) -> Any:
    q, k, v, first_key, last_query, out_scale, v_slot = given
    offset = jnp.zeros((1,), jnp.int32)
    call = _casting(plain.forward_call(q, k, tiles.forward, scale), 0, FORWARD, length)
    read = q, k, v, first_key, offset, out_scale.reshape(1)
    out, log_sum, values, transposed, largest = call.run(*read)
    saved = q, k, v, first_key, last_query, offset, out, log_sum, v_slot.scale
    return (out, values, transposed, jnp.max(largest, axis=-1)), saved


def _backward(scale: float, length: int, tiles: plain.Tiles, saved: Any, gradients: Any) -> Any:
    q, k, v, first_key, last_query, offset, out, log_sum, v_scale = saved
    dout, *_ = gradients
    read = q, k, v, dout, log_sum, plain.correction(out, dout)
    [dq] = plain.queries_call(q, k, tiles.queries, scale).run(*read, first_key, offset)
    call = _casting(plain.keys_call(q, k, tiles.keys, scale), 1, GRADIENT, length)
    dk, dv, values, transposed, largest = call.run(*read, last_query, offset, v_scale.reshape(1))
    nothing = jnp.zeros_like(v_scale)
    slot = Slot(values, transposed, jnp.max(largest, axis=-1), nothing)
    return (_Operands(dq, dk, dv, None, None, nothing, slot),)


_attention.defvjp(_forward, _backward)


def _casting(call: plain.Call, which: int, dtype: Any, length: int) -> plain.Call:
    """The kernel that also writes its result number `which` in 8 bits.

    It reads the scale after all other arrays.

    Args:
        length: Rows of the result that are no padding; only their magnitudes count.

    Returns:
        The kernel. After its other results come the 8-bit values [B, rows, heads, H], their
        transpose [heads, H, B, rows], and the largest magnitude of each program
        [B, heads, programs].
    """
    spec, (B, rows, heads, H) = call.out[which][0], call.out[which][1].shape
    programs = call.grid[0]
    added = [
        (spec, jax.ShapeDtypeStruct((B, rows, heads, H), dtype)),
        (
            pl.BlockSpec((None, H, None, rows), lambda i, n, b: (n, 0, b, 0)),
            jax.ShapeDtypeStruct((heads, H, B, rows), dtype),
        ),
        (
            pl.BlockSpec((None, None, None), lambda i, n, b: (b, n, i)),
            jax.ShapeDtypeStruct((B, heads, programs), jnp.float32),
        ),
    ]
    return call._replace(
        kernel=partial(
            _casting_kernel, plain_kernel=call.kernel, which=which, own=call.tile.own, length=length
        ),
        in_specs=[*call.in_specs, plain.SCALAR],
        out=[*call.out, *added],
    )


def _casting_kernel(*refs, plain_kernel, which, own, length):
    *others, scale_ref, first_out, second_out, values_ref, transposed_ref, largest_ref = refs
    results = first_out, second_out
    plain_kernel(*others, *results)
    pltriton.debug_barrier()  # threads read what other threads of this program have written
    rows = plain.own_rows(own, scale_ref[0])
    exists = (pl.program_id(0) * own + jnp.arange(own) < length)[:, None]
    inverse, H = 1 / scale_ref[0], values_ref.shape[1]
    columns = min(COLUMNS, H)

    def write(j, largest):
        at = pl.ds(j * columns, columns)
        y = results[which][rows, at].astype(jnp.float32)
        y8 = narrowed(y, inverse, values_ref.dtype)
        values_ref[rows, at] = y8
        transposed_ref[at, rows] = y8.T
        return jnp.maximum(largest, jnp.max(jnp.where(exists, jnp.abs(y), 0)))

    largest_ref[...] = jax.lax.fori_loop(0, H // columns, write, jnp.float32(0))
