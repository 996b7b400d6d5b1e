"""How much a model computes, and how much memory its training takes, from its configuration alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from consyn_jax.config import ModelConfig

BF16, FLOAT32 = 2, 4
LOGITS_AT_ONCE = 2**26  # at least, on one device: 256 MiB in float32
HEAD_BYTES = 2**30  # what the loss may hold at once on a GPU, its weights in the compute dtype included
TILE = 128  # tokens; products whose sizes are whole tiles waste nothing
BYTES_OF_A_LOGIT = FLOAT32 + BF16  # while they are there: they and their gradient
BYTES_WITHOUT_KERNEL = 10  # the same where devices share the vocabulary: 2.5 float32 arrays of them


def matmul_parameters(config: ModelConfig) -> int:
    """Parameters that take part in a matrix product for every token: all matrices, the output embedding once, no lookup table.

    >>> from consyn_jax.resolve import preset_architecture
    >>> matmul_parameters(preset_architecture("verse"))
    122683392
    """
    c = config
    attention = c.hidden_dim * c.head_dim * 2 * (c.num_heads + c.num_kv_heads)
    return c.num_layers * (attention + 3 * c.hidden_dim * c.mlp_dim) + c.vocab_size * c.hidden_dim


def train_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of forward and backward pass for one token of a sequence of `sequence_length`, nothing recomputed.

    6 per matmul parameter (Kaplan et al., 2020), and for attention 6 x T x heads x head_dim a layer: the lower triangle only, as the
    kernels compute it. A sliding window shortens T.
    """
    length = sequence_length if config.sliding_window is None else min(sequence_length, 2 * config.sliding_window)
    return 6.0 * matmul_parameters(config) + 6.0 * config.num_layers * length * config.num_heads * config.head_dim


def num_parameters(config: ModelConfig) -> int:
    """All parameters, vocabulary padding included.

    >>> from consyn_jax.resolve import preset_architecture
    >>> num_parameters(preset_architecture("stanza"))
    1333895168
    """
    c = config
    return c.num_layers * num_block_parameters(c) + c.padded_vocab_size * c.hidden_dim * (1 if c.tie_embeddings else 2) + c.hidden_dim


def num_block_parameters(c: ModelConfig) -> int:
    """Parameters of one block."""
    matrices = 2 * c.hidden_dim * c.head_dim * (c.num_heads + c.num_kv_heads) + 3 * c.hidden_dim * c.mlp_dim
    return matrices + 2 * c.hidden_dim + (2 * c.head_dim if c.qk_norm else 0)


@dataclass(frozen=True)
class MemoryEstimate:
    """What one device holds during a train step in bfloat16, in bytes, by arithmetic.

    Attributes:
        parameters, moments: the state.
        gradients: in float32, all micro-batches added up.
        activations: what the forward pass of all blocks keeps for the backward pass.
        working: what comes and goes when most is held: with one block's weights and its backward pass, or with the logits, when
            this micro-batch has no gradients yet.
    """

    parameters: int
    moments: int
    gradients: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.moments + self.gradients + self.activations + self.working


def logits_at_once(head_bytes: int, itemsize: int = BF16) -> int:
    """That the loss holds on one GPU: each chunk of tokens reads and writes the head's gradient, so the fewer the better.

    Args:
        head_bytes: of the head in the compute dtype, whose numbers have `itemsize` bytes.
    """
    return max(LOGITS_AT_ONCE, (HEAD_BYTES - head_bytes) // (FLOAT32 + itemsize))


def chunk_tokens(tokens: int, words: int, logits: int) -> int:
    """Tokens of a chunk of at most `logits`: a divisor of all in whole tiles of a product, if one is not much less; else parts as even as can be."""
    most = max(1, logits // words)
    if tokens * words <= logits:
        return tokens
    for length in range(most - most % TILE, max(most // 2, 2 * TILE), -TILE):
        if tokens % length == 0:
            return length
    return math.ceil(tokens / min(tokens, math.ceil(tokens * words / logits)))


def estimate_memory(
    config: ModelConfig, sizes: Mapping[str, int], batch_size: int, accumulation: int, length: int, remat: str, moment_bytes: int | float
) -> MemoryEstimate:
    """Of a train step on a mesh; within a tenth of the compiler's figure for the presets on GPUs (tests/planning).

    Args:
        sizes: of the mesh's axes.
        batch_size: sequences of a micro-batch over all devices.
        remat: what the backward pass recomputes, a name of `--gradient_checkpointing`.
        moment_bytes: the optimizer's, for one parameter.
    """
    c, tensor, fsdp = config, sizes["tensor"], sizes["fsdp"]
    tokens = batch_size * length / (sizes["data"] * fsdp * sizes["context"])
    own = num_parameters(c) / (fsdp * tensor)
    query, key, feed_forward = c.num_heads * c.head_dim / tensor, c.num_kv_heads * c.head_dim / tensor, c.mlp_dim / tensor
    # two inputs and their norms; queries and keys raw, normed and rotated; values and attention's output; gate, up and their product
    block = BF16 * (4 * c.hidden_dim + 3 * query + 3 * key + key + query + 3 * feed_forward)
    attended = BF16 * query + FLOAT32 * c.num_heads / tensor
    kept = {
        "none": block,
        "minimal": BF16 * (2 * c.hidden_dim + query + 2 * key + 2 * feed_forward) + attended,
        "attention": BF16 * c.hidden_dim + attended,
        "full": BF16 * c.hidden_dim,
        "offload": 0,
    }[remat]
    head = c.padded_vocab_size * c.hidden_dim / tensor
    whole = num_block_parameters(c) / tensor * (FLOAT32 + BF16 * (2 if fsdp > 1 else 1))  # its gradient; its weights, and the next ones
    of_block = tokens * ((0 if remat == "none" else block) + BF16 * 2 * (feed_forward + c.hidden_dim)) + whole
    words = c.padded_vocab_size // tensor
    at_once = logits_at_once(BF16 * words * c.hidden_dim) if tensor == 1 else LOGITS_AT_ONCE
    logits = words * chunk_tokens(max(1, round(tokens)), words, at_once)
    logit_bytes, stream_bytes = (BYTES_OF_A_LOGIT, BF16) if tensor == 1 else (BYTES_WITHOUT_KERNEL, FLOAT32)
    of_head = logit_bytes * logits + head * (BF16 + FLOAT32) + tokens * c.hidden_dim * stream_bytes
    if fsdp > 1:  # the gradient of the input embedding is whole until the end
        of_block += head * FLOAT32
    if accumulation > 1:  # added up where the totals lie, but for the embeddings
        of_head += own * FLOAT32
        of_block += head * FLOAT32 / fsdp
    of_block += own * FLOAT32
    # the logits come before there are gradients of this micro-batch
    gradients = int(own * FLOAT32) if accumulation > 1 or of_block >= of_head else 0
    working = max(of_head, of_block) - gradients
    return MemoryEstimate(int(own * FLOAT32), int(own * moment_bytes), gradients, int(tokens * c.num_layers * kept), int(working))
