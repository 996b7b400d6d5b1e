"""FLOPs, parameters and chunks of logits of a model, from its configuration alone."""

from __future__ import annotations

import math

from consyn_jax.model_config import NO_LORA, LoraOptions, ModelConfig

BF16, FLOAT32 = 2, 4
# Bytes per frozen weight on a GPU, by --lora_base_dtype; nf4 adds one float32 per 64 weights.
BASE_BYTES = {"auto": BF16, "float32": FLOAT32, "bfloat16": BF16, "int8": 1, "nf4": 0.5 + 4 / 64}
LOGITS_AT_ONCE = 2**26  # smallest chunk of the loss on a GPU: 256 MiB in float32
# Memory of logits and head weights on a GPU: 1 GiB, or 5 % of the GPU's memory if that is more.
HEAD_BYTES = 2**30
HEAD_SHARE = 0.05
# The same in chunks of at most FEWEST_TOKENS: an eighth of the GPU's memory.
SMALL_CHUNK_SHARE = 0.125
MOST_LOGITS = 2**31 - 1  # in a chunk; kernels count elements in 32 bits
# Tokens of a chunk. Re-reading the head's gradient prolongs the loss's matmuls by about 43 % with
# 512 tokens, 11 % with 2,048 and 3 % with 8,192 (docs/design/loss.md).
FEWEST_TOKENS, MOST_TOKENS = 2048, 8192
CPU_LOGITS = 2**24  # in a chunk of the loss on a CPU (docs/design/cpu.md)
# Deeper models run their blocks in a loop, because unrolled ones take too long to compile.
CPU_UNROLLED_LAYERS, GPU_UNROLLED_LAYERS = 12, 24
TILE = 128  # tokens; products whose sizes are whole tiles waste nothing
BYTES_OF_LOGIT = {"float32": FLOAT32, "bfloat16": BF16}  # by --logits_dtype
LOGIT_BYTES_WITHOUT_KERNEL = 10  # if devices share the vocabulary: 2.5 float32 arrays of logits


def query_blocks(length: int) -> int:
    """Into how many blocks of queries attention without a kernel divides a sequence.

    A block reads no keys after its last query: 5/8 of the scores with four blocks. With more
    blocks, short sequences gain nothing, and programs take longer to compile.
    """
    return 4 if length >= 256 and length % 4 == 0 else 1


def matmul_parameters(config: ModelConfig) -> int:
    """Number of parameters that take part in a matrix product with every token.

    This counts all matrices of the blocks, and the output embedding without vocabulary padding. It
    does not count the input embedding, because a token only looks up one row.

    >>> from consyn_jax.resolve import preset_architecture
    >>> matmul_parameters(preset_architecture("verse"))
    122683392
    """
    c = config
    attention = c.hidden_dim * c.head_dim * 2 * (c.num_heads + c.num_kv_heads)
    return c.num_layers * (attention + 3 * c.hidden_dim * c.mlp_dim) + c.vocab_size * c.hidden_dim


def train_flops_per_token(
    config: ModelConfig, sequence_length: int, lora: LoraOptions = NO_LORA
) -> float:
    """FLOPs of the forward and backward pass per token, without recomputation.

    Each matmul parameter takes 6 FLOPs (Kaplan et al., 2020). Attention takes 6 x T x heads x
    head_dim per layer: only the lower triangle of the scores is counted, because the kernels
    compute only that. A sliding window shortens T in the layers that have one. When an adapter is
    trained, a frozen matmul parameter takes 4 FLOPs, because its gradient is not computed.
    """
    lengths = sum(
        sequence_length if window is None else min(sequence_length, 2 * window)
        for window in config.windows
    )
    attention = 6.0 * lengths * config.num_heads * config.head_dim
    trained = num_adapter_parameters(config, lora) if lora.is_used else matmul_parameters(config)
    return 4.0 * matmul_parameters(config) + 2.0 * trained + attention


def num_parameters(config: ModelConfig) -> int:
    """Number of parameters of the model, including the rows that pad the vocabulary.

    >>> from consyn_jax.resolve import preset_architecture
    >>> num_parameters(preset_architecture("stanza"))
    1333895168
    """
    c = config
    return (
        c.num_layers * num_block_parameters(c)
        + c.padded_vocab_size * c.hidden_dim * (1 if c.tie_embeddings else 2)
        + c.hidden_dim
    )


def padding_parameters(config: ModelConfig) -> int:
    """Number of parameters in the rows that pad the vocabulary; exported models do not have them.

    >>> from consyn_jax.resolve import preset_architecture
    >>> padding_parameters(preset_architecture("haiku", 259))
    16000
    """
    rows = config.padded_vocab_size - config.vocab_size
    return rows * config.hidden_dim * (1 if config.tie_embeddings else 2)


def counted_parameters(config: ModelConfig) -> str:
    """The number of parameters as text, apart from those that pad the vocabulary.

    >>> from consyn_jax.resolve import preset_architecture
    >>> counted_parameters(preset_architecture("haiku", 49_000))
    '7,125,376 parameters (and 3,072 that pad the vocabulary)'
    """
    padding = padding_parameters(config)
    note = f" (and {padding:,} that pad the vocabulary)" if padding else ""
    return f"{num_parameters(config) - padding:,} parameters{note}"


def num_block_parameters(c: ModelConfig) -> int:
    """Number of parameters in one decoder block."""
    matrices = (
        2 * c.hidden_dim * c.head_dim * (c.num_heads + c.num_kv_heads)
        + 3 * c.hidden_dim * c.mlp_dim
    )
    biases = (
        c.qkv_bias * c.head_dim * (c.num_heads + 2 * c.num_kv_heads)
        + c.output_bias * c.hidden_dim
        + c.mlp_bias * (2 * c.mlp_dim + c.hidden_dim)
    )
    return matrices + biases + 2 * c.hidden_dim + (2 * c.head_dim if c.qk_norm else 0)


def cpu_step_flops(
    config: ModelConfig, tokens: int, sequence_length: int, lora: LoraOptions = NO_LORA
) -> float:
    """FLOPs of a train step on a CPU, where attention also computes the masked scores.

    Args:
        tokens: Tokens per train step.
    """
    attention = config.num_layers * sequence_length * config.num_heads * config.head_dim
    trained = num_adapter_parameters(config, lora) if lora.is_used else matmul_parameters(config)
    return tokens * (4.0 * matmul_parameters(config) + 2.0 * trained + 12.0 * attention)


def logit_bytes(logit: int = FLOAT32, gradient: int = BF16) -> int:
    """Bytes of memory per logit, for the logit and its gradient.

    A gradient that has as many bytes as the logit overwrites the logit.

    >>> logit_bytes(), logit_bytes(BF16)
    (6, 2)
    """
    return logit if logit == gradient else logit + gradient


def logits_at_once(
    head_bytes: int, bytes_each: int = logit_bytes(), *, words: int = 0, gpu_bytes: int = 0
) -> int:
    """Number of logits that the loss may hold in memory at once on one GPU.

    The loss runs over chunks of tokens. Each chunk reads and writes the gradient of the output
    embedding (the head), so a few large chunks are faster than many small ones. On a GPU whose
    memory is known, a chunk has at least `FEWEST_TOKENS` tokens if the memory allows it.

    Args:
        head_bytes: Bytes of the output embedding in the compute dtype.
        bytes_each: Bytes per logit, from `logit_bytes`.
        words: Rows of the output embedding.
        gpu_bytes: Memory of the GPU; 0 if it is not known.
    """
    room = max(HEAD_BYTES, int(HEAD_SHARE * gpu_bytes)) - head_bytes
    most = max(MOST_TOKENS * words, HEAD_BYTES // bytes_each)
    room_for_few = int(SMALL_CHUNK_SHARE * gpu_bytes) - head_bytes
    fewest = max(LOGITS_AT_ONCE, min(FEWEST_TOKENS * words, room_for_few // bytes_each))
    return max(fewest, min(most, room // bytes_each, MOST_LOGITS))


def chunk_tokens(tokens: int, words: int, logits: int) -> int:
    """Number of tokens per chunk of the loss, so that a chunk has at most `logits` logits.

    If possible, the result divides `tokens`, is a multiple of `TILE`, and uses more than half of
    `logits`. Otherwise it makes the chunks as even as possible.

    Args:
        tokens: Tokens of the micro-batch on one device.
        words: Logits per token on one device.
        logits: Number of logits that may be in memory at once.
    """
    most = max(1, logits // words)
    if tokens * words <= logits:
        return tokens
    for length in range(most - most % TILE, max(most // 2, 2 * TILE), -TILE):
        if tokens % length == 0:
            return length
    return math.ceil(tokens / min(tokens, math.ceil(tokens * words / logits)))


def useful_ranks(c: ModelConfig, lora: LoraOptions) -> dict[str, int]:
    """Full rank of each adapted matrix, which is the length of the matrix's shorter side.

    >>> from consyn_jax.resolve import preset_architecture
    >>> from consyn_jax.model_config import LoraOptions
    >>> lora = LoraOptions(lora_rank=16, lora_targets=("q_proj", "k_proj", "up_proj"))
    >>> useful_ranks(preset_architecture("stanza"), lora)
    {'q': 2048, 'k': 1024, 'up': 2048}
    """
    query, key = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    outer = {"q": query, "k": key, "v": key, "o": query}  # the other side has the model's width
    return {name: min(outer.get(name, c.mlp_dim), c.hidden_dim) for name in lora.targets}


def num_adapter_parameters(c: ModelConfig, lora: LoraOptions) -> int:
    """Number of parameters of a LoRA adapter for the model that `c` describes.

    >>> from consyn_jax.resolve import preset_architecture
    >>> from consyn_jax.model_config import LoraOptions
    >>> num_adapter_parameters(preset_architecture("stanza"), LoraOptions(lora_rank=16))
    14352384
    """
    query, key = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    outer = {"q": query, "k": key, "v": key, "o": query}  # the other side has the model's width
    wide = (outer.get(name, c.mlp_dim) + c.hidden_dim for name in lora.targets)
    return c.num_layers * lora.rank * sum(wide)
