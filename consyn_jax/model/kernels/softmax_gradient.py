"""Softmax of the logits and gradient of the cross-entropy in one kernel, in Pallas for Triton.

XLA would read the logits four times for this. Here, one program handles one token and reads its
logits twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

# Number of logits that a program reads at once. It was the fastest on an H200 among nine pairs of
# this number and the number of threads.
WIDTH = 16384
# Logit of padding. It is finite, so that a thread that has only padding gives no NaN.
NEVER = -(2.0**100)
LOG2_E = math.log2(math.e)

PerToken = Float[Array, " n"]


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
        log(Z), the logit of the label, and the mean logit, which is valid only with label
        smoothing.
    """
    n, V = logits_nV.shape
    assert n * V < 2**31, "kernels count elements in 32 bits"
    width = min(WIDTH, pl.next_power_of_2(V))
    whole = pl.cdiv(V, width) * width
    row, scalar = pl.BlockSpec((None, whole), lambda i: (i, 0)), pl.BlockSpec((1,), lambda i: (i,))
    given = {"smoothing": label_smoothing, "z_loss": z_loss}
    arguments = {name: x for name, x in given.items() if isinstance(x, jax.Array)}
    constants = {name: x for name, x in given.items() if name not in arguments}
    per_token = jax.ShapeDtypeStruct((n,), jnp.float32)
    kernel = partial(_kernel, tuple(arguments), constants, width, V, vocab_size)
    return pl.pallas_call(
        kernel,
        grid=(n,),
        in_specs=[row, scalar, scalar, *[pl.BlockSpec((1,), lambda i: (0,))] * len(arguments)],
        out_specs=(row, *[scalar] * 4),
        out_shape=(jax.ShapeDtypeStruct((n, V), dtype), *[per_token] * 4),
        compiler_params=pltriton.CompilerParams(num_warps=max(4, width // 512)),
        input_output_aliases={0: 0} if logits_nV.dtype == dtype else {},
        name="softmax_gradient",
    )(
        logits_nV,
        labels_n,
        weights_n.astype(jnp.float32),
        *(x.astype(jnp.float32).reshape(1) for x in arguments.values()),
    )


def _kernel(arguments, constants, width, num_logits, vocab_size, *refs):
    logits_ref, label_ref, weight_ref, *argument_refs = refs[:-5]
    dlogits_ref, top_ref, log_z_ref, label_logit_ref, mean_ref = refs[-5:]
    values = constants | {n: ref[0] for n, ref in zip(arguments, argument_refs, strict=True)}
    smoothing, z_loss = values["smoothing"], values["z_loss"]
    smooths = "smoothing" in arguments or bool(smoothing)
    blocks = logits_ref.shape[0] // width
    label = jnp.clip(label_ref[0], 0, vocab_size - 1)
    # Read before the reductions, in which threads wait for each other: later, another thread may
    # have overwritten this logit with the gradient.
    label_logit = logits_ref[label].astype(jnp.float32)

    def load(j):
        at = j * width + jnp.arange(width)
        logits = pltriton.load(
            logits_ref.at[pl.ds(j * width, width)], mask=at < vocab_size, other=NEVER
        )
        return at, logits.astype(jnp.float32)

    top, log_z, total_logit = _reduce_row(load, blocks, width, vocab_size, smooths)
    top_ref[0], log_z_ref[0], label_logit_ref[0], mean_ref[0] = (
        top,
        log_z,
        label_logit,
        total_logit / vocab_size,
    )
    weight, factor = weight_ref[0], 1 + 2 * z_loss * log_z

    def write_gradient(j, carry):
        at, logits = load(j)
        share = jnp.exp2((logits - log_z) * LOG2_E) * factor
        target = jnp.where(at == label, 1.0 - smoothing, 0.0)
        if smooths:
            target += jnp.where(at < vocab_size, smoothing / vocab_size, 0.0)
        gradient = ((share - target) * weight).astype(dlogits_ref.dtype)
        pltriton.store(dlogits_ref.at[pl.ds(j * width, width)], gradient, mask=at < num_logits)
        return carry

    jax.lax.fori_loop(0, blocks, write_gradient, 0)


def _reduce_row(load: Callable, blocks: int, width: int, vocab_size: int, with_mean: bool) -> Any:
    """Return the largest logit of a row, log(Z) and, if `with_mean`, the sum of the logits.

    Each thread reduces its own logits. The threads' results are combined at the end, so threads
    wait for each other only once.
    """

    def add_block(j, carry):
        top, total, total_logit = carry
        at, logits = load(j)
        new_top = jnp.maximum(top, logits)
        total = total * jnp.exp2((top - new_top) * LOG2_E) + jnp.exp2((logits - new_top) * LOG2_E)
        if with_mean:
            total_logit += jnp.sum(jnp.where(at < vocab_size, logits, 0.0))
        return new_top, total, total_logit

    nothing = (
        jnp.full((width,), NEVER, jnp.float32),
        jnp.zeros((width,), jnp.float32),
        jnp.float32(0),
    )
    tops, totals, total_logit = jax.lax.fori_loop(0, blocks, add_block, nothing)
    top = jnp.max(tops)
    log_z = top + jnp.log2(jnp.sum(totals * jnp.exp2((tops - top) * LOG2_E))) / LOG2_E
    return top, log_z, total_logit
