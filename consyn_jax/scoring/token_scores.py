"""Score the tokens of an evaluation: log-likelihood, and whether a token is the likeliest."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from consyn_jax.distributed.mesh import mesh_sizes, on_each_device, split_axes
from consyn_jax.model.arithmetic import LOGITS_AT_ONCE, chunk_tokens

TOKENS, HIDDEN, WEIGHTS = ("batch", "sequence"), ("batch", "sequence", None), ("vocab", "embed")


class TokenScores(NamedTuple):
    """Scores of the label at each position.

    Attributes:
        log_likelihood: Log-likelihood of the label, in nats; float32.
        is_greedy: Whether the label has the largest logit; among equal logits, the first counts.
    """

    log_likelihood: Float[Array, "*shape"]
    is_greedy: Bool[Array, "*shape"]


def reference_scores(
    logits_BTV: Float[Array, "B T V"], labels_BT: Int[Array, "B T"]
) -> TokenScores:
    """Readable reference for `token_scores`; it keeps all logits in memory at once."""
    log_probs_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
    of_label_BT = jnp.take_along_axis(log_probs_BTV, labels_BT[..., None], axis=-1)[..., 0]
    return TokenScores(of_label_BT, jnp.argmax(logits_BTV, axis=-1) == labels_BT)


def token_scores(
    x_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    labels_BT: Int[Array, "B T"],
    vocab_size: int,
) -> TokenScores:
    """Scores of the labels under the logits `x @ head.T`, on the current mesh.

    Logits are computed for some tokens at a time, so that a long batch needs little memory.

    Args:
        vocab_size: Number of rows of `head` that are vocabulary entries; later rows are padding.
    """
    local = on_each_device(
        partial(_on_device, sizes=mesh_sizes(), vocab_size=vocab_size),
        (HIDDEN, WEIGHTS, TOKENS),
        (TOKENS, TOKENS),
    )
    return TokenScores(*local(x_BTD, head_VD, labels_BT))


def _on_device(x_BTD: Any, head_VD: Any, labels_BT: Any, *, sizes: Any, vocab_size: int) -> Any:
    """Scores of this device's tokens, combined over the devices that split the vocabulary."""
    weight_VD = head_VD.astype(x_BTD.dtype)
    if embed_axes := split_axes(sizes, "embed"):
        weight_VD = jax.lax.all_gather(weight_VD, embed_axes, axis=1, tiled=True)
    vocab_axes = split_axes(sizes, "vocab")
    rows = weight_VD.shape[0]
    words_V = jnp.arange(rows) + (jax.lax.axis_index(vocab_axes) * rows if vocab_axes else 0)
    B, T, D = x_BTD.shape
    length = chunk_tokens(B * T, rows, LOGITS_AT_ONCE)
    num_chunks = math.ceil(B * T / length)

    def split(a: jax.Array) -> jax.Array:
        padded = jnp.pad(a, ((0, num_chunks * length - B * T),) + ((0, 0),) * (a.ndim - 1))
        return padded.reshape(num_chunks, length, *a.shape[1:])

    chunk = partial(_chunk, weight_VD, words_V, vocab_size=vocab_size, axes=vocab_axes)
    parts = (split(x_BTD.reshape(B * T, D)), split(labels_BT.reshape(B * T)))
    scores = jax.lax.map(lambda part: chunk(*part), parts)
    return tuple(a.reshape(-1)[: B * T].reshape(B, T) for a in scores)


def _chunk(
    weight_VD: jax.Array,
    words_V: jax.Array,
    x_nD: jax.Array,
    labels_n: jax.Array,
    *,
    vocab_size: int,
    axes: tuple[str, ...],
) -> TokenScores:
    logits_nV = jnp.einsum("nD,VD->nV", x_nD, weight_VD, preferred_element_type=jnp.float32)
    logits_nV = jnp.where(words_V < vocab_size, logits_nV, -jnp.inf)
    place_n = labels_n - words_V[0]
    is_here_n = (place_n >= 0) & (place_n < words_V.size)
    label_n = jnp.take_along_axis(logits_nV, jnp.where(is_here_n, place_n, 0)[:, None], 1)[:, 0]
    label_n = jnp.where(is_here_n, label_n, 0.0)
    top_n, first_n = jnp.max(logits_nV, axis=1), words_V[jnp.argmax(logits_nV, axis=1)]
    if axes:
        top_here_n, top_n = top_n, jax.lax.pmax(top_n, axes)
        nowhere = jnp.iinfo(first_n.dtype).max
        first_n = jax.lax.pmin(jnp.where(top_here_n == top_n, first_n, nowhere), axes)
    total_n = jnp.sum(jnp.exp(logits_nV - top_n[:, None]), axis=1)
    if axes:
        total_n, label_n = jax.lax.psum((total_n, label_n), axes)
    return TokenScores(label_n - top_n - jnp.log(total_n), first_n == labels_n)
