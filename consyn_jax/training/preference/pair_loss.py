"""The loss of direct preference optimisation (Rafailov et al., 2023, arXiv:2305.18290).

A row [2T] of a batch has the chosen sequence in its first half, and the rejected one in its second.
The log-probability of an answer is the sum over its tokens. Its reference is its log-probability
under the model that the run started from. Its reward is beta x (log-probability - reference). The
loss of a pair is -log sigmoid(reward of the chosen answer - reward of the rejected answer), as in
TRL's `DPOTrainer` with `loss_type="sigmoid"`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from consyn_jax.data.pairs import CHOSEN_REFERENCE, REJECTED_REFERENCE
from consyn_jax.distributed.mesh import mesh_sizes, on_each_device
from consyn_jax.model.arithmetic import LOGITS_AT_ONCE, chunk_tokens
from consyn_jax.training.loss import (
    Chunks,
    Extras,
    gathered_head,
    logits_of,
    on_mesh,
    softmax,
)


class PairSums(NamedTuple):
    """Float32 sums over pairs.

    Attributes:
        tokens: Number of tokens of the answers.
        wins: Number of pairs whose chosen answer has the larger reward.
    """

    loss: Float[Array, ""]
    pairs: Float[Array, ""]
    tokens: Float[Array, ""]
    wins: Float[Array, ""]
    chosen_rewards: Float[Array, ""]
    rejected_rewards: Float[Array, ""]
    chosen_log_probs: Float[Array, ""]
    rejected_log_probs: Float[Array, ""]

    @property
    def terms(self) -> Any:
        """Number of terms in the sum that training minimises."""
        return self.pairs

    def means(self, terms: Any) -> dict[str, Any]:
        """Return the metrics, as means over `terms` pairs, with the names that TRL uses."""
        return {
            "loss": self.loss / terms,
            "rewards/chosen": self.chosen_rewards / terms,
            "rewards/rejected": self.rejected_rewards / terms,
            "rewards/margins": (self.chosen_rewards - self.rejected_rewards) / terms,
            "rewards/accuracies": self.wins / terms,
            "logps/chosen": self.chosen_log_probs / terms,
            "logps/rejected": self.rejected_log_probs / terms,
        }


def pair_objective(
    log_probs_B2: Float[Array, "B 2"], batch: dict[str, Any], beta: float
) -> tuple[Float[Array, ""], PairSums]:
    """Compute the loss, summed over the pairs of a micro-batch, and the sums to report.

    Args:
        batch: Arrays of the micro-batch, including the reference log-probabilities of each pair. A
            row without targets is padding.
    """
    reference_B2 = jnp.stack([batch[CHOSEN_REFERENCE], batch[REJECTED_REFERENCE]], 1)
    is_pair_B = jnp.any(batch["loss_mask"], axis=-1)
    rewards_B2 = beta * (log_probs_B2 - reference_B2)
    margins_B = rewards_B2[:, 0] - rewards_B2[:, 1]

    def total(values_B: jax.Array) -> Float[Array, ""]:
        return jnp.sum(jnp.where(is_pair_B, values_B, 0.0), dtype=jnp.float32)

    loss = total(-jax.nn.log_sigmoid(margins_B))
    sums = PairSums(
        loss,
        jnp.sum(is_pair_B, dtype=jnp.float32),
        jnp.sum(batch["loss_mask"], dtype=jnp.float32),
        total(margins_B > 0),
        *(total(rewards_B2[:, i]) for i in (0, 1)),
        *(total(log_probs_B2[:, i]) for i in (0, 1)),
    )
    return loss, sums


def num_terms(batch: dict[str, Any]) -> Float[Array, ""]:
    """Return the number of terms in the objective of a batch: its pairs, or its target tokens."""
    counted = batch["loss_mask"]
    if CHOSEN_REFERENCE in batch:
        counted = jnp.any(counted, axis=-1)
    return jnp.sum(counted, dtype=jnp.float32)


def answer_log_probs(
    x_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    labels_BT: Int[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    vocab_size: int,
    chunks: Chunks,
) -> Float[Array, "B 2"]:
    """Compute the log-probability of each answer: the sum over the tokens whose mask is true."""
    token_BT = token_log_probs(x_BTD, head_VD, labels_BT, vocab_size, chunks)
    B, T = labels_BT.shape
    return jnp.sum(jnp.where(mask_BT, token_BT, 0.0).reshape(B, 2, T // 2), axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def token_log_probs(
    x_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    labels_BT: Int[Array, "B T"],
    vocab_size: int,
    chunks: Chunks,
) -> Float[Array, "B T"]:
    """Compute the log-probability of each label under the logits `x @ head.T`, in float32.

    Neither the forward nor the backward pass holds the logits of all tokens. The backward pass
    computes them again, because the gradient of a token depends on its whole sequence.
    """
    tokens, hidden, weights = ("batch", "sequence"), ("batch", "sequence", None), ("vocab", "embed")
    local = on_each_device(
        partial(_on_device, sizes=mesh_sizes(), vocab_size=vocab_size, chunks=chunks),
        (hidden, weights, tokens),
        tokens,
    )
    return local(x_BTD, head_VD, labels_BT)


def _forward(x: Any, head: Any, labels: Any, vocab_size: int, chunks: Chunks) -> Any:
    return token_log_probs(x, head, labels, vocab_size, chunks), (x, head, labels)


@jax.named_scope("head")
def _backward(vocab_size: int, chunks: Chunks, saved: Any, cotangent_BT: jax.Array) -> Any:
    x, head, labels = saved
    # The weights are divided by the largest, so that a loss scale in them cannot overflow float16.
    largest = jnp.max(jnp.abs(cotangent_BT))
    weights_BT = -cotangent_BT / jnp.where(largest > 0, largest, 1.0)
    _, dx, dhead = on_mesh(
        x, head, labels, weights_BT, vocab_size, Extras(), chunks, with_gradients=True
    )
    dhead = None if dhead is None else dhead * largest  # None for a frozen head
    return (dx * largest).astype(x.dtype), dhead, None


token_log_probs.defvjp(_forward, _backward)


@jax.named_scope("head")
def _on_device(x, head, labels, *, sizes, vocab_size, chunks):
    """Compute the log-probabilities of this device's tokens."""
    weight_VD, vocab = gathered_head(x, head, sizes, vocab_size, chunks)
    B, T, D = x.shape
    length = chunk_tokens(B * T, weight_VD.shape[0], chunks.elements or LOGITS_AT_ONCE)
    num_chunks = math.ceil(B * T / length)

    def split(a: jax.Array) -> jax.Array:
        padded = jnp.pad(a, ((0, num_chunks * length - B * T),) + ((0, 0),) * (a.ndim - 1))
        return padded.reshape(num_chunks, length, *a.shape[1:])

    def chunk(parts: tuple[jax.Array, jax.Array]) -> jax.Array:
        x_nD, labels_n = parts
        _, statistics = softmax(logits_of(weight_VD, x_nD, vocab), labels_n, vocab, False)
        return statistics.label - statistics.log_z

    found = jax.lax.map(chunk, (split(x.reshape(B * T, D)), split(labels.reshape(B * T))))
    return found.reshape(-1)[: B * T].reshape(B, T)
