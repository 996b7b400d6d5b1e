"""Next-token cross-entropy: a readable reference, and the fused implementation for training.

All functions return sums and counts, so that the caller divides once. The fused implementation
computes gradients while a chunk's logits are in memory. Its backward pass only scales them.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from consyn_jax.distributed.mesh import mesh_sizes, on_each_device, split_axes
from consyn_jax.model.arithmetic import LOGITS_AT_ONCE, chunk_tokens, logit_bytes, logits_at_once
from consyn_jax.model.embedding import sum_over_tokens
from consyn_jax.training.program_arguments import Extras

# In float16 (6e-8 to 65,504), logit gradients are multiplied by this, because most are tiny.
FLOAT16_LIFT = 2.0**12


class LossSums(NamedTuple):
    """Float32 sums over tokens: negative log-likelihood (nats), tokens, correct predictions."""

    nll: Float[Array, ""]
    tokens: Float[Array, ""]
    correct: Float[Array, ""]

    @property
    def terms(self) -> Any:
        """Number of terms in the summed loss: one per token."""
        return self.tokens

    def means(self, terms: Any) -> dict[str, Any]:
        """Return the training metrics: the sums divided by `terms`, the number of terms."""
        return {"loss": self.nll / terms}


class LogitStatistics(NamedTuple):
    """Float32 statistics of each token's logits.

    Attributes:
        top: The largest logit.
        log_z: Logarithm of the sum of the exponentials of all logits.
        label: The logit of the label.
        mean: Mean of the logits over the vocabulary; zero unless training uses `Extras`.
    """

    top: Float[Array, " n"]
    log_z: Float[Array, " n"]
    label: Float[Array, " n"]
    mean: Float[Array, " n"]


class Chunks(NamedTuple):
    """Size of the chunks of logits, and their layout in memory.

    Attributes:
        elements: Maximum number of logits in memory on a device; 0 to use `logits_at_once`.
        vocab_first: Whether logits are [V, n] rather than [n, V].
        kernel: Whether training uses the fused GPU kernel if the vocabulary is not sharded.
        head_is_frozen: Whether the output embedding (the head) needs no gradient.
        gpu_bytes: Memory of the GPU; 0 if unknown.
        logits_dtype: The dtype in which logits are stored while there are gradients to compute.
    """

    elements: int = LOGITS_AT_ONCE
    vocab_first: bool = False
    kernel: bool = False
    head_is_frozen: bool = False
    gpu_bytes: int = 0
    logits_dtype: Any = jnp.float32


CHUNKS = Chunks()
GPU_CHUNKS = Chunks(0, kernel=True)
# A chunk fits the processor's cache. With [n, V], rows would be a multiple of 4 KiB apart, which
# halves the rate of matmuls on CPUs (docs/design/cpu.md).
CPU_CHUNKS = Chunks(2**24, vocab_first=True)


class Vocabulary(NamedTuple):
    """The section of the vocabulary on one device, and the layout of the logits.

    Attributes:
        size: Number of tokens in the whole vocabulary, without padding.
        words_V: Token ids of this device's section, including padding.
        padded: Whether the head has padding rows at the end of the vocabulary.
        mesh_axes: Mesh axes over which the vocabulary is sharded.
        axis: Axis of the vocabulary in the logits: 0 if they are [V, n], 1 if they are [n, V].
    """

    size: int
    words_V: Int[Array, " V"]
    padded: bool
    mesh_axes: tuple[str, ...]
    axis: int

    def from_tokens(self, a_n: jax.Array) -> jax.Array:
        """Reshape an array of one value per token, so that it broadcasts to logits."""
        return jnp.expand_dims(a_n, self.axis)

    def from_words(self, a_V: jax.Array) -> jax.Array:
        """Reshape an array of one value per vocabulary entry, so that it broadcasts to logits."""
        return jnp.expand_dims(a_V, 1 - self.axis)


def cross_entropy(
    logits_BTV: Float[Array, "B T V"], labels_BT: Int[Array, "B T"], mask_BT: Bool[Array, "B T"]
) -> LossSums:
    """Reference implementation of the loss: sums over the tokens whose mask is true."""
    log_probs_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
    nll_BT = -jnp.take_along_axis(log_probs_BTV, labels_BT[..., None], axis=-1)[..., 0]
    correct_BT = jnp.argmax(logits_BTV, axis=-1) == labels_BT
    return LossSums(
        jnp.sum(nll_BT * mask_BT),
        jnp.sum(mask_BT, dtype=jnp.float32),
        jnp.sum(correct_BT & mask_BT, dtype=jnp.float32),
    )


def head_loss(
    x_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    labels_BT: Int[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    vocab_size: int,
    chunks: Chunks = CHUNKS,
) -> LossSums:
    """Cross-entropy of the logits `x @ head.T`, for the first `vocab_size` rows of the head.

    Only `nll` of the result is differentiable. Matmuls run in the dtype of `x`; sums and the
    softmax are float32. In bfloat16, a device needs memory for the results, for a copy of the head,
    and for the logits of one chunk: 6 bytes per logit, or 2 if logits are bfloat16, too (as
    measured in tests/planning). The head's float32 gradient stays in memory from the forward pass
    on.
    """
    nll, sums = head_objective(x_BTD, head_VD, labels_BT, mask_BT, vocab_size, Extras(), chunks)
    return sums._replace(nll=nll)


def head_objective(
    x_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    labels_BT: Int[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    vocab_size: int,
    extras: Extras,
    chunks: Chunks = CHUNKS,
) -> tuple[Float[Array, ""], LossSums]:
    """Compute the training objective, summed over tokens, and the sums of the plain loss.

    Only the objective is differentiable, with respect to `x` and the head. It uses as much memory
    as `head_loss`.
    """
    weights, fixed = extras.arguments, extras.constants
    return _objective(x_BTD, head_VD, labels_BT, mask_BT, weights, vocab_size, fixed, chunks)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _objective(
    x: Any, head: Any, labels: Any, mask: Any, weights: Any, size: int, fixed: Any, chunks: Chunks
) -> Any:
    extras = fixed._replace(**weights)
    return on_mesh(x, head, labels, mask, size, extras, chunks, with_gradients=False)[0]


def _forward(
    x: Any, head: Any, labels: Any, mask: Any, weights: Any, size: int, fixed: Any, chunks: Chunks
) -> Any:
    extras = fixed._replace(**weights)
    result, dx, dhead = on_mesh(x, head, labels, mask, size, extras, chunks, with_gradients=True)
    return result, (dx, dhead, jnp.zeros((), x.dtype))


def _backward(size: int, fixed: Any, chunks: Chunks, saved: Any, cotangents: Any) -> Any:
    dx, dhead, like_x = saved
    dhead = None if dhead is None else dhead * cotangents[0]
    return (dx * cotangents[0]).astype(like_x.dtype), dhead, None, None, None


_objective.defvjp(_forward, _backward)


@jax.named_scope("head")
def on_mesh(
    x: Any,
    head: Any,
    labels: Any,
    mask: Any,
    vocab_size: int,
    extras: Extras,
    chunks: Chunks,
    with_gradients: bool,
) -> Any:
    """Compute the objective, the `LossSums`, and the gradients of `x` and `head` on the mesh.

    Args:
        mask: Boolean mask of the targets, or a weight per token.
    """
    tokens, hidden, weights = ("batch", "sequence"), ("batch", "sequence", None), ("vocab", "embed")
    of_head = None if chunks.head_is_frozen else weights
    local = on_each_device(
        partial(
            _on_device,
            sizes=mesh_sizes(),
            vocab_size=vocab_size,
            fixed=extras.constants,
            chunks=chunks,
            with_gradients=with_gradients,
        ),
        (hidden, weights, tokens, tokens, dict.fromkeys(extras.arguments, ())),
        ((), hidden, of_head) if with_gradients else ((), None, None),
    )
    (sums, penalty), dx, dhead = local(x, head, labels, mask, extras.arguments)
    return (sums.nll if penalty is None else sums.nll + penalty, sums), dx, dhead


def _on_device(x, head, labels, mask, extras, *, sizes, vocab_size, fixed, chunks, with_gradients):
    """Compute sums over all devices, and this device's shards of the gradients."""
    token_axes = split_axes(sizes, "batch", "sequence")
    weight, vocab = gathered_head(x, head, sizes, vocab_size, chunks)
    # The smallest float16 gradients would underflow, because the loss scale is applied only later.
    dx_dtype = jnp.float32 if x.dtype == jnp.float16 else x.dtype
    kernel = chunks.kernel and with_gradients and not vocab.mesh_axes
    chunk = partial(
        _chunk,
        vocab=vocab,
        extras=fixed._replace(**extras),
        dx_dtype=jnp.float32 if vocab.mesh_axes else dx_dtype,  # rounded after the psum below
        kernel=kernel,
        with_gradients=with_gradients,
        chunks=chunks,
    )
    B, T, D = x.shape
    elements = chunks.elements or LOGITS_AT_ONCE
    if kernel and not chunks.elements:
        each = logit_bytes(jnp.dtype(chunks.logits_dtype).itemsize, x.dtype.itemsize)
        size = {"words": weight.shape[0], "gpu_bytes": chunks.gpu_bytes}
        elements = logits_at_once(weight.nbytes, each, **size)
    sums, dx, dhead = _over_chunks(
        chunk, weight, x.reshape(B * T, D), labels.reshape(B * T), mask.reshape(B * T), elements
    )
    if token_axes:
        sums = jax.lax.psum(sums, token_axes)
    if not with_gradients:
        return sums, None, None
    if vocab.mesh_axes:
        dx = jax.lax.psum(dx, vocab.mesh_axes)
    dhead = None if dhead is None else sum_over_tokens(dhead, sizes)
    return sums, dx.reshape(B, T, D).astype(dx_dtype), dhead


def gathered_head(x, head, sizes: dict[str, int], vocab_size: int, chunks: Chunks):
    """Gather the head along D and cast it like `x`; also return this device's `Vocabulary`."""
    weight, mesh_axes = head.astype(x.dtype), split_axes(sizes, "vocab")
    if embed_axes := split_axes(sizes, "embed"):
        weight = jax.lax.all_gather(weight, embed_axes, axis=1, tiled=True)
    rows, axis = weight.shape[0], 0 if chunks.vocab_first else 1
    words_V = (jax.lax.axis_index(mesh_axes) * rows if mesh_axes else 0) + jnp.arange(rows)
    padded = rows * sizes["tensor"] != vocab_size
    return weight, Vocabulary(vocab_size, words_V, padded, mesh_axes, axis)


def _over_chunks(chunk, weight_VD, x_nD, labels_n, mask_n, elements):
    """Sum the results of `chunk` over chunks of tokens, each with at most `elements` logits."""
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


def _chunk(
    weight_VD, x_nD, labels_n, mask_n, *, vocab, extras, dx_dtype, kernel, with_gradients, chunks
):
    """Return ((loss sums, penalty or None), gradient of x, gradient of the head) of a chunk."""
    logits_nV = logits_of(
        weight_VD, x_nD, vocab, chunks.logits_dtype if with_gradients else jnp.float32
    )
    lift = FLOAT16_LIFT if x_nD.dtype == jnp.float16 else 1.0
    if kernel:
        # Pallas is slow to import
        from consyn_jax.model.kernels.softmax_gradient import softmax_gradient

        smoothing, z_loss = extras
        dlogits, *found = softmax_gradient(
            logits_nV, labels_n, mask_n * lift, vocab.size, smoothing, z_loss, x_nD.dtype
        )
        statistics = LogitStatistics(*found)
    else:
        share_nV, statistics = softmax(logits_nV, labels_n, vocab, extras.are_used)
        dlogits = _logit_gradient(share_nV, statistics, labels_n, vocab, extras)
        dlogits = dlogits * vocab.from_tokens(mask_n * lift)
    sums = _loss_sums(statistics, mask_n != 0, vocab.size)
    penalty = None if not extras.are_used else _penalty(statistics, mask_n, extras)
    if not with_gradients:
        return (sums, penalty), None, None
    axes, dlogits = "nV" if vocab.axis else "Vn", dlogits.astype(x_nD.dtype)
    dx_nD = jnp.einsum(f"{axes},VD->nD", dlogits, weight_VD, preferred_element_type=jnp.float32)
    dx_nD = (dx_nD / lift).astype(dx_dtype)
    if chunks.head_is_frozen:
        return (sums, penalty), dx_nD, None
    dhead_VD = jnp.einsum(f"{axes},nD->VD", dlogits, x_nD, preferred_element_type=jnp.float32)
    return (sums, penalty), dx_nD, dhead_VD / lift


def logits_of(weight_VD, x_nD, vocab: Vocabulary, dtype=jnp.float32):
    """Compute the logits of a chunk in `dtype`, in the layout of `vocab`."""
    product = ("nD,VD->nV", x_nD, weight_VD) if vocab.axis else ("VD,nD->Vn", weight_VD, x_nD)
    return jnp.einsum(*product, preferred_element_type=dtype)


def softmax(logits_nV, labels_n, vocab: Vocabulary, with_mean: bool):
    """Compute the softmax probabilities, and the statistics of each token's logits, in float32."""
    if logits_nV.dtype == jnp.bfloat16:
        # XLA would leave the rounding out where matmuls cannot return bfloat16, as on CPUs.
        logits_nV = jax.lax.reduce_precision(logits_nV.astype(jnp.float32), 8, 7)
    is_word_nV = vocab.from_words(vocab.words_V < vocab.size)
    if vocab.padded:
        logits_nV = jnp.where(is_word_nV, logits_nV, -jnp.inf)
    top_n = jnp.max(logits_nV, axis=vocab.axis)
    if vocab.mesh_axes:
        top_n = jax.lax.pmax(top_n, vocab.mesh_axes)
    unnormalised_nV = jnp.exp(logits_nV - vocab.from_tokens(top_n))
    total_n = jnp.sum(unnormalised_nV, axis=vocab.axis)
    label_logit_n = _label_logits(logits_nV, labels_n, vocab)
    if vocab.mesh_axes:
        total_n, label_logit_n = jax.lax.psum((total_n, label_logit_n), vocab.mesh_axes)
    log_z_n = jnp.log(total_n) + top_n
    share_nV = unnormalised_nV / vocab.from_tokens(total_n)
    mean_n = jnp.zeros_like(top_n)
    if with_mean:
        mean_n = jnp.sum(jnp.where(is_word_nV, logits_nV, 0.0), axis=vocab.axis) / vocab.size
        if vocab.mesh_axes:
            mean_n = jax.lax.psum(mean_n, vocab.mesh_axes)
    return share_nV, LogitStatistics(top_n, log_z_n, label_logit_n, mean_n)


def _label_logits(logits_nV, labels_n, vocab: Vocabulary):
    """Look up the logit of each token's label; zero if the label is on another device."""
    place_n = labels_n - vocab.words_V[0]
    here_n = (place_n >= 0) & (place_n < vocab.words_V.size)
    label_logit_n = jnp.take_along_axis(
        logits_nV, vocab.from_tokens(jnp.where(here_n, place_n, 0)), axis=vocab.axis
    ).reshape(labels_n.shape)
    return jnp.where(here_n, label_logit_n, 0.0)


def _logit_gradient(share_nV, statistics, labels_n, vocab: Vocabulary, extras: Extras):
    """Gradient of the objective with respect to the logits, from the softmax `share_nV`."""
    target_nV = vocab.from_words(vocab.words_V) == vocab.from_tokens(labels_n)
    if extras.are_used:
        share_nV = share_nV * vocab.from_tokens(1 + 2 * extras.z_loss * statistics.log_z)
        is_word_nV = vocab.from_words(vocab.words_V < vocab.size)
        target_nV = (
            1 - extras.label_smoothing
        ) * target_nV + extras.label_smoothing / vocab.size * is_word_nV
    return share_nV - target_nV


def _loss_sums(statistics: LogitStatistics, mask_n: jax.Array, vocab_size: int) -> LossSums:
    nll_n = statistics.log_z - statistics.label
    # A label is predicted if its logit is the largest and its probability is above 1 / V. So equal
    # logits, as with an output embedding of zeros, predict nothing.
    is_largest_n = statistics.label >= statistics.top
    correct_n = is_largest_n & (nll_n < math.log(vocab_size) * (1 - 1e-6)) & mask_n
    return LossSums(
        jnp.sum(jnp.where(mask_n, nll_n, 0.0)),
        jnp.sum(mask_n, dtype=jnp.float32),
        jnp.sum(correct_n, dtype=jnp.float32),
    )


def _penalty(statistics: LogitStatistics, mask_n: jax.Array, extras: Extras) -> jax.Array:
    """Sum label smoothing and z-loss over tokens."""
    smoothing_n = extras.label_smoothing * (statistics.label - statistics.mean)
    penalty_n = smoothing_n + extras.z_loss * statistics.log_z**2
    return jnp.sum(jnp.where(mask_n, penalty_n, 0.0))
