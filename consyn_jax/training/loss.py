"""Next-token cross-entropy: a readable reference, and the fused form that training uses.

Everything returns sums and counts; who divides, divides once. The fused form never holds the logits of all tokens: it goes through
them in chunks, and while a chunk's logits are at hand it also computes their gradients, so the backward pass has nothing to
recompute. Its backward pass only scales what the forward pass kept.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from consyn_jax.distributed.mesh import mesh_sizes, partition_spec, split_axes
from consyn_jax.model.arithmetic import LOGITS_AT_ONCE, chunk_tokens, logits_at_once

# Gradients of logits are below 1, and nearly all of them are shares of a large vocabulary; float16 ends at 6e-8 below and 65,504 above.
FLOAT16_LIFT = 2.0**12


class LossSums(NamedTuple):
    """Sums over tokens, float32: negative log-likelihood in nats, tokens counted, tokens predicted right."""

    nll: Float[Array, ""]
    tokens: Float[Array, ""]
    correct: Float[Array, ""]


class OfLogits(NamedTuple):
    """Of each token's logits, float32: the largest, the logarithm of the sum of their exponentials, the label's, and (with extras) their mean."""

    top: Float[Array, " n"]
    log_z: Float[Array, " n"]
    label: Float[Array, " n"]
    mean: Float[Array, " n"]


class Chunks(NamedTuple):
    """How logits are held.

    Attributes:
        elements: at once on one device; 0: as many as leave what the kernel needs below a GiB (`logits_at_once`).
        vocab_first: their rows are words and not tokens.
        kernel: training's softmax and its gradient are one kernel for GPUs, where a device has the whole vocabulary.
    """

    elements: int = LOGITS_AT_ONCE
    vocab_first: bool = False
    kernel: bool = False


CHUNKS = Chunks()
GPU_CHUNKS = Chunks(0, kernel=True)
# The softmax finds a chunk in the processor's cache; and products whose rows lie a multiple of 4 KiB apart, as those of a vocabulary do,
# run at half the rate on CPUs (docs/design/cpu.md).
CPU_CHUNKS = Chunks(2**24, vocab_first=True)


class Extras(NamedTuple):
    """What training adds to the loss of a token; 0 adds nothing.

    Attributes:
        label_smoothing: share of the target that is spread over the whole vocabulary, label included (Szegedy et al., 2016), as
            torch.nn.CrossEntropyLoss has it.
        z_loss: weight of log(Z)^2, which keeps the softmax's normaliser Z near 1 (Chowdhery et al., 2022).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0


def cross_entropy(logits_BTV: Float[Array, "B T V"], labels_BT: Int[Array, "B T"], mask_BT: Bool[Array, "B T"]) -> LossSums:
    """The reference: sums over the tokens where the mask is true."""
    log_probs_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
    nll_BT = -jnp.take_along_axis(log_probs_BTV, labels_BT[..., None], axis=-1)[..., 0]
    correct_BT = jnp.argmax(logits_BTV, axis=-1) == labels_BT
    return LossSums(jnp.sum(nll_BT * mask_BT), jnp.sum(mask_BT, dtype=jnp.float32), jnp.sum(correct_BT & mask_BT, dtype=jnp.float32))


def head_loss(
    x_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    labels_BT: Int[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    vocab_size: int,
    chunks: Chunks = CHUNKS,
) -> LossSums:
    """Cross-entropy of `x @ head.T` over the first `vocab_size` rows of the head, differentiable in its `nll`.

    The products run in the dtype of `x`, sums and the softmax in float32. Memory beyond the results, a device in bfloat16: the head
    once more, and 6 bytes for each of the logits at once (tests/planning). The head's gradient is float32, and there from here on.
    """
    nll, sums = head_objective(x_BTD, head_VD, labels_BT, mask_BT, vocab_size, Extras(), chunks)
    return sums._replace(nll=nll)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def head_objective(
    x_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    labels_BT: Int[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    vocab_size: int,
    extras: Extras,
    chunks: Chunks = CHUNKS,
) -> tuple[Float[Array, ""], LossSums]:
    """What training minimises, summed over tokens and differentiable, and beside it the sums of the plain loss, which are not.

    Memory as `head_loss`.
    """
    return _run(x_BTD, head_VD, labels_BT, mask_BT, vocab_size, extras, chunks, with_gradients=False)[0]


def _forward(x: Any, head: Any, labels: Any, mask: Any, vocab_size: int, extras: Extras, chunks: Chunks) -> Any:
    found, dx, dhead = _run(x, head, labels, mask, vocab_size, extras, chunks, with_gradients=True)
    return found, (dx, dhead, jnp.zeros((), x.dtype))


def _backward(vocab_size: int, extras: Extras, chunks: Chunks, kept: Any, cotangents: tuple[jax.Array, LossSums]) -> Any:
    dx, dhead, like_x = kept
    return (dx * cotangents[0]).astype(like_x.dtype), dhead * cotangents[0], None, None


head_objective.defvjp(_forward, _backward)


@jax.named_scope("head")
def _run(x: Any, head: Any, labels: Any, mask: Any, vocab_size: int, extras: Extras, chunks: Chunks, with_gradients: bool) -> Any:
    """One device: the plain function. On a mesh: each device its own tokens and its part of the vocabulary, sums at the end."""
    local = partial(_local, sizes=mesh_sizes(), vocab_size=vocab_size, extras=extras, chunks=chunks, with_gradients=with_gradients)
    if not jax.sharding.get_abstract_mesh().empty:
        tokens, hidden = partition_spec(("batch", "sequence")), partition_spec(("batch", "sequence", None))
        weights, scalars = partition_spec(("vocab", "embed")), partition_spec(())
        found = (scalars, hidden, weights) if with_gradients else (scalars, None, None)
        local = jax.shard_map(local, in_specs=(hidden, weights, tokens, tokens), out_specs=found, check_vma=False)
    (sums, penalty), dx, dhead = local(x, head, labels, mask)
    return (sums.nll if penalty is None else sums.nll + penalty, sums), dx, dhead


def _local(x, head, labels, mask, *, sizes, vocab_size, extras, chunks, with_gradients):
    token_axes, vocab_axes, embed_axes = split_axes(sizes, "batch", "sequence"), split_axes(sizes, "vocab"), split_axes(sizes, "embed")
    weight = head.astype(x.dtype)
    if embed_axes:
        weight = jax.lax.all_gather(weight, embed_axes, axis=1, tiled=True)
    first_row = jax.lax.axis_index(vocab_axes) * weight.shape[0] if vocab_axes else 0
    rows = first_row + jnp.arange(weight.shape[0])
    padded = weight.shape[0] * sizes["tensor"] != vocab_size
    # float16 would lose the smallest gradients to come; the scale of the loss meets them only in the backward pass
    dx_dtype = jnp.float32 if x.dtype == jnp.float16 else x.dtype
    fused = chunks.kernel and with_gradients and not vocab_axes
    chunk = partial(
        _chunk,
        rows=rows,
        vocab_size=vocab_size,
        padded=padded,
        extras=extras,
        vocab_axes=vocab_axes,
        dx_dtype=jnp.float32 if vocab_axes else dx_dtype,  # rounded after it is summed
        vocab_first=chunks.vocab_first,
        kernel=fused,
        with_gradients=with_gradients,
    )
    B, T, D = x.shape
    elements = chunks.elements or (logits_at_once(weight.nbytes, weight.dtype.itemsize) if fused else LOGITS_AT_ONCE)
    sums, dx, dhead = _over_chunks(chunk, weight, x.reshape(B * T, D), labels.reshape(B * T), mask.reshape(B * T), elements)
    if token_axes:
        sums = jax.lax.psum(sums, token_axes)
    if not with_gradients:
        return sums, None, None
    if vocab_axes:
        dx = jax.lax.psum(dx, vocab_axes)
    rest = tuple(axis for axis in token_axes if axis not in embed_axes)
    if embed_axes:
        dhead = jax.lax.psum_scatter(dhead, embed_axes, scatter_dimension=1, tiled=True)
    if rest:
        dhead = jax.lax.psum(dhead, rest)
    return sums, dx.reshape(B, T, D).astype(dx_dtype), dhead


def _over_chunks(chunk, weight_VD, x_nD, labels_n, mask_n, elements):
    """Add up `chunk` over parts of the n tokens small enough to hold their logits."""
    n, D = x_nD.shape
    length = chunk_tokens(n, weight_VD.shape[0], elements)
    num_chunks = math.ceil(n / length)
    if num_chunks == 1:
        return chunk(weight_VD, x_nD, labels_n, mask_n)

    def split(a: jax.Array) -> jax.Array:
        padded = jnp.pad(a, ((0, num_chunks * length - n),) + ((0, 0),) * (a.ndim - 1))
        return padded.reshape(num_chunks, length, *a.shape[1:])

    def body(total, parts):
        sums, dx, dhead = chunk(weight_VD, *parts)
        return jax.tree.map(jnp.add, total, (sums, dhead)), dx

    parts = (split(x_nD), split(labels_n), split(mask_n))
    shapes = jax.eval_shape(lambda *p: chunk(weight_VD, *p), *(jax.tree.map(lambda a: a[0], parts)))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0], shapes[2]))
    (sums, dhead), dx = jax.lax.scan(body, zeros, parts)
    return sums, None if dx is None else dx.reshape(num_chunks * length, D)[:n], dhead


def _chunk(weight_VD, x_nD, labels_n, mask_n, *, vocab_size, extras, dx_dtype, vocab_first, kernel, with_gradients, **place):
    """Sums of one chunk (the loss, and what the extras add to it), and the gradients of what is minimised in x and the head."""
    product = ("VD,nD->Vn", weight_VD, x_nD) if vocab_first else ("nD,VD->nV", x_nD, weight_VD)
    logits_nV = jnp.einsum(*product, preferred_element_type=jnp.float32)
    lift = FLOAT16_LIFT if x_nD.dtype == jnp.float16 else 1.0
    if kernel:
        from consyn_jax.training.softmax_gradient import softmax_gradient  # as slow to import as Pallas is

        dlogits, found = softmax_gradient(logits_nV, labels_n, mask_n * lift, vocab_size, extras.label_smoothing, extras.z_loss, x_nD.dtype)
    else:
        found, dlogits = _softmax(logits_nV, labels_n, vocab_size, extras, 0 if vocab_first else 1, **place)
        dlogits = dlogits * jnp.expand_dims(mask_n * lift, 0 if vocab_first else 1)
    nll_n = found.log_z - found.label
    # A single largest logit has more than an even share; where all are equal, as an output embedding of zeros gives them, nothing is predicted.
    correct_n = (found.label >= found.top) & (nll_n < math.log(vocab_size) * (1 - 1e-6)) & mask_n
    sums = LossSums(jnp.sum(jnp.where(mask_n, nll_n, 0.0)), jnp.sum(mask_n, dtype=jnp.float32), jnp.sum(correct_n, dtype=jnp.float32))
    penalty = None
    if extras != Extras():
        penalty_n = extras.label_smoothing * (found.label - found.mean) + extras.z_loss * found.log_z**2
        penalty = jnp.sum(jnp.where(mask_n, penalty_n, 0.0))
    if not with_gradients:
        return (sums, penalty), None, None
    dx_nD, dhead_VD = _products(dlogits.astype(x_nD.dtype), x_nD, weight_VD, product[0][-2:])
    return (sums, penalty), (dx_nD / lift).astype(dx_dtype), dhead_VD / lift


def _softmax(logits_nV, labels_n, vocab_size, extras, vocab, *, rows, padded, vocab_axes):
    """What the loss is made of, and the gradient of what is minimised in the logits, of which `vocab` is the vocabulary's axis.

    Args:
        rows: numbers of this device's words.
        padded: the embedding has rows that are no words.
        vocab_axes: of the mesh, where the words are spread over devices.
    """
    of_tokens, of_words, over_words = partial(jnp.expand_dims, axis=vocab), partial(jnp.expand_dims, axis=1 - vocab), partial(jnp.sum, axis=vocab)
    real_V = rows < vocab_size
    if padded:
        logits_nV = jnp.where(of_words(real_V), logits_nV, -jnp.inf)
    top_n = jnp.max(logits_nV, axis=vocab)
    if vocab_axes:
        top_n = jax.lax.pmax(top_n, vocab_axes)
    unnormalised_nV = jnp.exp(logits_nV - of_tokens(top_n))
    is_label_nV = of_words(rows) == of_tokens(labels_n)
    total_n = over_words(unnormalised_nV)
    # looked up, as a sum over words would read all logits once more
    place_n = labels_n - rows[0]
    here_n = (place_n >= 0) & (place_n < rows.size)
    label_logit_n = jnp.take_along_axis(logits_nV, of_tokens(jnp.where(here_n, place_n, 0)), axis=vocab).reshape(labels_n.shape)
    label_logit_n = jnp.where(here_n, label_logit_n, 0.0)
    if vocab_axes:
        total_n, label_logit_n = jax.lax.psum((total_n, label_logit_n), vocab_axes)
    log_z_n, share_nV, target_nV = jnp.log(total_n) + top_n, unnormalised_nV / of_tokens(total_n), is_label_nV
    mean_logit_n = jnp.zeros_like(top_n)
    if extras != Extras():
        mean_logit_n = over_words(jnp.where(of_words(real_V), logits_nV, 0.0)) / vocab_size
        if vocab_axes:
            mean_logit_n = jax.lax.psum(mean_logit_n, vocab_axes)
        share_nV = share_nV * of_tokens(1 + 2 * extras.z_loss * log_z_n)
        target_nV = (1 - extras.label_smoothing) * is_label_nV + extras.label_smoothing / vocab_size * of_words(real_V)
    return OfLogits(top_n, log_z_n, label_logit_n, mean_logit_n), share_nV - target_nV


def _products(dlogits, x_nD, weight_VD, axes):
    """The gradients of x and the head, summed in float32, from those of the logits, whose axes are "nV" or "Vn"."""
    dx_nD = jnp.einsum(f"{axes},VD->nD", dlogits, weight_VD, preferred_element_type=jnp.float32)
    return dx_nD, jnp.einsum(f"{axes},nD->VD", dlogits, x_nD, preferred_element_type=jnp.float32)
