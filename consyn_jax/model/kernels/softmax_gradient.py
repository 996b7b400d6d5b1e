"""Softmax of the logits and gradient of the cross-entropy in one kernel, in Pallas for Triton.

XLA would read the logits four times for this. Here, one program handles one token. It keeps up to
49,152 logits in registers from the softmax to the gradient, so it reads them once and computes one
exponential for each; logits beyond those it reads twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

# Threads of a program, at most, and logits that each keeps. A thread then has 128 registers, and
# one program fills the register file of an SM.
THREADS, KEPT = 512, 96
# Logits that a thread keeps where the rest needs more registers: with label smoothing, with weights
# that are arguments, and if gradients are float32.
KEPT_IN_FEWER = 64
# Logits that a thread reads at once, of those that are read twice.
AT_ONCE = 32
# Logit of padding. It is finite, so that a thread that has only padding gives no NaN.
NEVER = -(2.0**100)
LOG2_E = math.log2(math.e)

PerToken = Float[Array, " n"]


class Row(NamedTuple):
    """Division of a row of logits into units, in each of which a thread has a few logits.

    Attributes:
        num_logits: Logits of the row, including padding.
        vocab_size: Real logits of the row.
        threads: Threads that share a unit.
        width: Logits of a unit.
        units: Units of the row; the last ones may reach beyond its end.
        blocks: Number of blocks of units that are read twice, at the beginning of the row.
        at_once: Units of a block, which are read at once.
    """

    num_logits: int
    vocab_size: int
    threads: int
    width: int
    units: int
    blocks: int
    at_once: int

    @property
    def streamed(self) -> int:
        """Number of units that are read twice."""
        return self.blocks * self.at_once

    def mask(self, j: Any, end: int) -> Any:
        """Select the logits of unit `j` that lie before `end`; None if all do."""
        last = j if isinstance(j, int) else self.streamed - 1
        if (last + 1) * self.width <= end:
            return None
        return jnp.arange(self.width) < end - j * self.width

    def where(self, j: Any, x: Any) -> Any:
        """Replace `x` by zero where unit `j` has padding."""
        mask = self.mask(j, self.vocab_size)
        return x if mask is None else jnp.where(mask, x, 0.0)

    def of(self, ref: Any, j: Any) -> Any:
        """The view of unit `j` of a row in memory."""
        return ref.at[pl.ds(j * self.width, self.width)]


def divided(num_logits: int, vocab_size: int, itemsize: int, kept: int) -> Row:
    """Divide a row of logits of `itemsize` bytes, of which a thread can keep the number `kept`.

    >>> divided(49_152, 49_152, 2, 96)[2:]
    (512, 4096, 12, 0, 0)
    >>> divided(131_072, 131_072, 2, 96)[2:]
    (512, 2048, 64, 5, 8)
    """
    threads = min(max(pl.next_power_of_2(pl.cdiv(num_logits, 64)), 128), THREADS)
    # Reading 16 bytes at once is best; what is carried through a loop must be in few registers.
    each = 16 // itemsize if num_logits <= kept * threads else 4
    width = each * threads
    units = pl.cdiv(num_logits, width)
    beyond = max(0, units - kept // each)
    blocks = pl.cdiv(beyond, AT_ONCE // each)
    at_once = pl.cdiv(beyond, max(blocks, 1))
    return Row(num_logits, vocab_size, threads, width, units, blocks, at_once)


def softmax_gradient(
    logits_nV: Float[Array, "n V"],
    labels_n: Int[Array, " n"],
    weights_n: Float[Array, " n"],
    vocab_size: int,
    label_smoothing: float | Float[Array, ""],
    z_loss: float | Float[Array, ""],
    dtype: Any,
) -> tuple[Float[Array, "n V"], PerToken, PerToken, PerToken, PerToken]:
    """Gradient of the loss with respect to the logits: cross-entropy, label smoothing and z-loss.

    All arithmetic is float32. If `dtype` is the logits' dtype, the gradient overwrites the logits.

    Args:
        labels_n: Label of each token, below `vocab_size`; tokens of weight 0 may have any label.
        weights_n: Weight of each token in the loss, a factor of its gradient.
        vocab_size: Number of real logits per token; the remaining columns are padding.
        label_smoothing, z_loss: A number becomes a constant of the kernel; an array is an argument.
        dtype: The dtype of the gradient.

    Returns:
        The gradient [n, V] in `dtype`, and four float32 values per token: the largest logit,
        log(Z), the logit of the label, and, valid only with label smoothing, the mean logit.
    """
    n, V = logits_nV.shape
    assert n * V < 2**31, "kernels count elements in 32 bits"
    given = {"smoothing": label_smoothing, "z_loss": z_loss}
    arguments = {name: x for name, x in given.items() if isinstance(x, jax.Array)}
    constants = {name: x for name, x in given.items() if name not in arguments}
    smooths = "smoothing" in arguments or bool(label_smoothing)
    kept = KEPT_IN_FEWER if smooths or arguments or jnp.dtype(dtype).itemsize > 2 else KEPT
    row = divided(V, vocab_size, logits_nV.dtype.itemsize, kept)
    whole = pl.BlockSpec((None, row.units * row.width), lambda i: (i, 0))
    scalar = pl.BlockSpec((1,), lambda i: (i,))
    per_token = jax.ShapeDtypeStruct((n,), jnp.float32)
    return pl.pallas_call(
        partial(_kernel, tuple(arguments), constants, smooths, row),
        grid=(n,),
        in_specs=[whole, scalar, scalar, *[pl.BlockSpec((1,), lambda i: (0,))] * len(arguments)],
        out_specs=(whole, *[scalar] * 4),
        out_shape=(jax.ShapeDtypeStruct((n, V), dtype), *[per_token] * 4),
        compiler_params=pltriton.CompilerParams(num_warps=max(1, row.threads // 32)),
        input_output_aliases={0: 0} if logits_nV.dtype == dtype else {},
        name="softmax_gradient",
    )(
        logits_nV,
        labels_n,
        weights_n.astype(jnp.float32),
        *(x.astype(jnp.float32).reshape(1) for x in arguments.values()),
    )


def _kernel(arguments, constants, smooths: bool, row: Row, *refs):
    logits_ref, label_ref, weight_ref, *argument_refs = refs[:-5]
    dlogits_ref, top_ref, log_z_ref, label_logit_ref, mean_ref = refs[-5:]
    values = constants | {n: ref[0] for n, ref in zip(arguments, argument_refs, strict=True)}
    smoothing, z_loss = values["smoothing"], values["z_loss"]
    label, weight = jnp.clip(label_ref[0], 0, row.vocab_size - 1), weight_ref[0]
    # Read before the reductions, in which threads wait for each other: later, another thread may
    # have overwritten this logit with the gradient.
    label_logit = logits_ref[label].astype(jnp.float32)

    def load(j):
        where, mask = row.of(logits_ref, j), row.mask(j, row.vocab_size)
        logits = pltriton.load(where, mask=mask, other=None if mask is None else NEVER)
        return logits.astype(jnp.float32)

    powers, top, total, total_logit = _reduce_row(load, row, smooths)
    log_z = top + jnp.log2(total) / LOG2_E
    top_ref[0], log_z_ref[0], label_logit_ref[0], mean_ref[0] = (
        top,
        log_z,
        label_logit,
        total_logit / row.vocab_size,
    )
    factor = (1 + 2 * z_loss * log_z) / total * weight
    of_label, of_any = (1.0 - smoothing) * weight, smoothing / row.vocab_size * weight
    places = label - jnp.arange(row.width)

    def write(j, power):
        gradient = power * factor
        if smooths:
            gradient -= row.where(j, of_any)
        # Not as a target for each logit: the compiler would compute all of them before the
        # reductions, for which it has no registers.
        gradient = jnp.where(places == j * row.width, gradient - of_label, gradient)
        gradient = gradient.astype(dlogits_ref.dtype)
        pltriton.store(row.of(dlogits_ref, j), gradient, mask=row.mask(j, row.num_logits))

    for j, power in enumerate(powers, row.streamed):
        write(j, power)

    def write_streamed(i, carry):
        first = row.streamed - (i + 1) * row.at_once  # the last first: they may be in the L2 cache
        for j in range(row.at_once):
            write(first + j, jnp.exp2((load(first + j) - top) * LOG2_E))
        return carry

    jax.lax.fori_loop(0, row.blocks, write_streamed, 0)


def _reduce_row(load: Callable[[Any], jax.Array], row: Row, smooths: bool) -> Any:
    """Return the exponentials of a row's logits less the largest one, and what is reduced.

    Each thread reduces its own logits first, so threads wait for each other once per result.

    Returns:
        The exponentials of the units that are not streamed; the largest logit; the sum of all
        exponentials; and, if `smooths`, the sum of the logits.
    """

    def add_block(i, carry):
        tops, totals, sums = carry
        units = [i * row.at_once + j for j in range(row.at_once)]
        logits = [load(j) for j in units]
        new_tops = reduce(jnp.maximum, logits, tops)
        totals = totals * jnp.exp2((tops - new_tops) * LOG2_E)
        totals = sum((jnp.exp2((x - new_tops) * LOG2_E) for x in logits), totals)
        if smooths:
            sums = sum(map(row.where, units, logits), sums)
        return new_tops, totals, sums

    tops = jnp.full((row.width,), NEVER, jnp.float32)
    totals = sums = jnp.zeros((row.width,), jnp.float32)
    tops, totals, sums = jax.lax.fori_loop(0, row.blocks, add_block, (tops, totals, sums))
    units = range(row.streamed, row.units)
    logits = [load(j) for j in units]
    top = jnp.max(reduce(jnp.maximum, logits, tops))
    powers = [jnp.exp2((x - top) * LOG2_E) for x in logits]
    if row.blocks:
        totals = totals * jnp.exp2((tops - top) * LOG2_E)
    total_logit = jnp.float32(0)
    if smooths:
        total_logit = jnp.sum(sum(map(row.where, units, logits), sums))
    return powers, top, jnp.sum(sum(powers, totals)), total_logit
