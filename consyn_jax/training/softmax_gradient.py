"""The softmax of logits and the gradient of its cross-entropy as one kernel, in Pallas for Triton.

XLA reads the logits four times for that. Here a program has a token, and goes through its row twice.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from consyn_jax.training.loss import OfLogits

WIDTH = 16384  # logits that a program has at once: of nine sizes and numbers of threads the fastest on an H200
NEVER = -(2.0**100)  # the logit of what is no word; finite, so that a thread that sees no word gives no NaN
LOG2_E = math.log2(math.e)


def softmax_gradient(
    logits_nV: Float[Array, "n V"],
    labels_n: Int[Array, " n"],
    weights_n: Float[Array, " n"],
    vocab_size: int,
    label_smoothing: float,
    z_loss: float,
    dtype: Any,
) -> tuple[Float[Array, "n V"], OfLogits]:
    """The gradient in the logits, in `dtype`, of the cross-entropy with label smoothing and z-loss, and what the loss is made of.

    Args:
        labels_n: of words; of a token of weight 0 it may be anything.
        weights_n: factor of a token's gradient.
        vocab_size: logits from there on are no words'.
    """
    n, V = logits_nV.shape
    assert n * V < 2**31, "kernels count elements in 32 bits"
    width = min(WIDTH, pl.next_power_of_2(V))
    whole = pl.cdiv(V, width) * width
    row, scalar = pl.BlockSpec((None, whole), lambda i: (i, 0)), pl.BlockSpec((1,), lambda i: (i,))
    dlogits, *found = pl.pallas_call(
        partial(_kernel, width=width, num_logits=V, vocab_size=vocab_size, smoothing=label_smoothing, z_loss=z_loss),
        grid=(n,),
        in_specs=[row, scalar, scalar],
        out_specs=[row, *[scalar] * 4],
        out_shape=[jax.ShapeDtypeStruct((n, V), dtype), *[jax.ShapeDtypeStruct((n,), jnp.float32)] * 4],
        compiler_params=pltriton.CompilerParams(num_warps=max(4, width // 512)),
        name="softmax_gradient",
    )(logits_nV, labels_n, weights_n.astype(jnp.float32))
    return dlogits, OfLogits(*found)


def _kernel(logits_ref, label_ref, weight_ref, dlogits_ref, top_ref, log_z_ref, label_logit_ref, mean_ref, *, width, num_logits, vocab_size, smoothing, z_loss):
    blocks = logits_ref.shape[0] // width
    label = jnp.clip(label_ref[0], 0, vocab_size - 1)

    def load(j):
        at = j * width + jnp.arange(width)
        logits = pltriton.load(logits_ref.at[pl.ds(j * width, width)], mask=at < vocab_size, other=NEVER)
        return at, logits.astype(jnp.float32)

    def look(j, carry):
        """Largest logit and sum of exponentials of what each thread sees: threads wait for each other only at the end."""
        top, total, summed = carry
        at, logits = load(j)
        new_top = jnp.maximum(top, logits)
        total = total * jnp.exp2((top - new_top) * LOG2_E) + jnp.exp2((logits - new_top) * LOG2_E)
        if smoothing:
            summed += jnp.sum(jnp.where(at < vocab_size, logits, 0.0))
        return new_top, total, summed

    nothing = jnp.full((width,), NEVER, jnp.float32), jnp.zeros((width,), jnp.float32), jnp.float32(0)
    tops, totals, summed = jax.lax.fori_loop(0, blocks, look, nothing)
    top = jnp.max(tops)
    log_z = top + jnp.log2(jnp.sum(totals * jnp.exp2((tops - top) * LOG2_E))) / LOG2_E
    top_ref[0], log_z_ref[0], label_logit_ref[0], mean_ref[0] = top, log_z, logits_ref[label].astype(jnp.float32), summed / vocab_size
    weight, factor = weight_ref[0], 1 + 2 * z_loss * log_z

    def give(j, carry):
        at, logits = load(j)
        share = jnp.exp2((logits - log_z) * LOG2_E) * factor
        target = jnp.where(at == label, 1.0 - smoothing, 0.0)
        if smoothing:
            target += jnp.where(at < vocab_size, smoothing / vocab_size, 0.0)
        gradient = ((share - target) * weight).astype(dlogits_ref.dtype)
        pltriton.store(dlogits_ref.at[pl.ds(j * width, width)], gradient, mask=at < num_logits)
        return carry

    jax.lax.fori_loop(0, blocks, give, 0)
