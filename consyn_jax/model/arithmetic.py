"""How much a model computes, from its configuration alone."""

from __future__ import annotations

from consyn_jax.config import ModelConfig


def matmul_parameters(config: ModelConfig) -> int:
    """Parameters that take part in a matrix product for every token: all matrices, the output embedding once, no lookup table.

    >>> from consyn_jax.config import preset_architecture
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
