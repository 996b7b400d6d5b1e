"""FLOPs, parameters and training memory of a model, from its configuration alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from consyn_jax.model_config import NO_LORA, LoraOptions, ModelConfig

BF16, FLOAT32 = 2, 4
# Bytes per frozen weight on a GPU, by --lora_base_dtype; nf4 adds one float32 per 64 weights.
BASE_BYTES = {"auto": BF16, "float32": FLOAT32, "bfloat16": BF16, "int8": 1, "nf4": 0.5 + 4 / 64}
LOGITS_AT_ONCE = 2**26  # smallest chunk of the loss on a GPU: 256 MiB in float32
# Memory of logits and head weights on a GPU: 1 GiB, or 5 % of the GPU's memory if that is more.
HEAD_BYTES = 2**30
HEAD_SHARE = 0.05
MOST_LOGITS = 2**31 - 1  # in a chunk; kernels count elements in 32 bits
MOST_TOKENS = 8192  # largest chunk; more would speed up the loss's matmuls by less than 1 %
CPU_LOGITS = 2**24  # in a chunk of the loss on a CPU (docs/design/cpu.md)
CPU_UNROLLED_LAYERS = 12  # deeper models run their blocks in a loop
TILE = 128  # tokens; products whose sizes are whole tiles waste nothing
BYTES_OF_LOGIT = {"float32": FLOAT32, "bfloat16": BF16}  # by --logits_dtype
LOGIT_BYTES_WITHOUT_KERNEL = 10  # if devices share the vocabulary: 2.5 float32 arrays of logits


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


def cpu_step_bytes(
    config: ModelConfig,
    batch_size: int,
    accumulation: int,
    length: int,
    moment_bytes: int,
    lora: LoraOptions = NO_LORA,
) -> float:
    """Estimate the bytes of memory that a train step in float32 needs on a CPU.

    For the presets haiku and verse, the estimate is within a tenth of the compiler's figure
    (tests/cli/choices/test_machine_fit.py). It is the sum of:

    - the parameters and the optimizer's moments;
    - three arrays as large as the trained parameters, or four with gradient accumulation;
    - two arrays as large as the logits of one chunk;
    - the activations of all blocks, and two [T, T] matrices per head. Rematerialisation saves
      nothing, because XLA on CPUs merges the repeated computation with the first one;
    - for LoRA, a float32 copy of each frozen matrix and of each matrix product's output.

    Args:
        batch_size: Sequences per micro-batch.
        accumulation: Micro-batches per train step.
        length: Tokens per sequence.
        moment_bytes: Bytes of the optimizer's moments per trained parameter.
    """
    c, tokens = config, batch_size * length
    block, _ = _block_bytes(c, 1, "none")
    attended = 2 * c.num_heads * length * FLOAT32
    logits = 2 * FLOAT32 * min(CPU_LOGITS, tokens * c.padded_vocab_size)
    arrays = 3 if accumulation == 1 else 4
    trained, frozen, outputs = num_parameters(c), 0.0, 0
    if lora.is_used:
        matrices = c.num_layers * num_block_parameters(c)
        kept = FLOAT32 if lora.lora_base_dtype == "auto" else BASE_BYTES[lora.lora_base_dtype]
        frozen = matrices * (kept + FLOAT32) + (trained - matrices) * FLOAT32
        trained = num_adapter_parameters(c, lora)
        outputs = c.head_dim * (c.num_heads + 2 * c.num_kv_heads) + 2 * (c.hidden_dim + c.mlp_dim)
    state = trained * (FLOAT32 + moment_bytes) + frozen
    activations = tokens * c.num_layers * (block * FLOAT32 / BF16 + attended + outputs * FLOAT32)
    return state + arrays * FLOAT32 * trained + activations + logits


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated bytes on one device during a train step in bfloat16.

    Attributes:
        parameters: Bytes of the float32 parameters, and of the frozen weights under an adapter.
        moments: Bytes of the optimizer's moments.
        gradients: Bytes of the float32 gradients, which are summed over micro-batches.
        activations: Bytes of the activations that all blocks save for the backward pass.
        working: Bytes of temporary memory at the peak of the step. The peak is in the backward pass
            of one block, or in the loss, where a micro-batch has logits but no gradients yet.
    """

    parameters: int
    moments: int
    gradients: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """Bytes on one device: the sum of all fields."""
        return self.parameters + self.moments + self.gradients + self.activations + self.working


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
    embedding (the head), so a few large chunks are faster than many small ones.

    Args:
        head_bytes: Bytes of the output embedding in the compute dtype.
        bytes_each: Bytes per logit, from `logit_bytes`.
        words: Rows of the output embedding.
        gpu_bytes: Memory of the GPU; 0 if it is not known.
    """
    room = max(HEAD_BYTES, int(HEAD_SHARE * gpu_bytes)) - head_bytes
    most = max(MOST_TOKENS * words, HEAD_BYTES // bytes_each)
    return max(LOGITS_AT_ONCE, min(most, room // bytes_each, MOST_LOGITS))


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


def estimate_memory(
    config: ModelConfig,
    sizes: Mapping[str, int],
    batch_size: int,
    accumulation: int,
    length: int,
    remat: str,
    moment_bytes: int | float,
    lora: LoraOptions = NO_LORA,
    gpu_bytes: int = 0,
    logit: int = FLOAT32,
) -> MemoryEstimate:
    """Estimate a train step's memory on one device; for presets, the error is below a tenth.

    Args:
        sizes: Number of devices along each mesh axis.
        batch_size: Sequences per micro-batch, over all devices.
        accumulation: Micro-batches per train step.
        length: Tokens per sequence.
        remat: A value of `--gradient_checkpointing`.
        moment_bytes: Bytes of the optimizer's moments per trained parameter.
        gpu_bytes: Memory of the GPU; 0 if it is not known.
        logit: Bytes of a logit, by `--logits_dtype`.
    """
    c, tensor, fsdp = config, sizes["tensor"], sizes["fsdp"]
    tokens = batch_size * length / (sizes["data"] * fsdp * sizes["context"])
    at_head = _head_bytes(c, tokens, tensor, gpu_bytes, logit, is_frozen=lora.is_used)
    if lora.is_used:
        return _adapter_memory(c, sizes, tokens, remat, moment_bytes, lora, at_head)
    own, head = num_parameters(c) / (fsdp * tensor), c.padded_vocab_size * c.hidden_dim / tensor
    block, saved = _block_bytes(c, tensor, remat)
    # The weight gradients of one block, its weights, and the weights of the next block.
    weights = num_block_parameters(c) / tensor * (FLOAT32 + BF16 * (2 if fsdp > 1 else 1))
    activation_gradients = BF16 * 2 * (c.mlp_dim / tensor + c.hidden_dim)
    at_block = tokens * ((0 if remat == "none" else block) + activation_gradients) + weights
    if fsdp > 1:  # the input embedding's gradient is sharded only at the end
        at_block += head * FLOAT32
    if accumulation > 1:  # added to the accumulated gradients in place, except for embeddings
        at_head += own * FLOAT32
        at_block += head * FLOAT32 / fsdp
    at_block += own * FLOAT32
    # At the peak of the loss, this micro-batch has no gradients yet.
    gradients = int(own * FLOAT32) if accumulation > 1 or at_block >= at_head else 0
    return MemoryEstimate(
        parameters=int(own * FLOAT32),
        moments=int(own * moment_bytes),
        gradients=gradients,
        activations=int(tokens * c.num_layers * saved),
        working=int(max(at_head, at_block) - gradients),
    )


def _adapter_memory(
    c: ModelConfig,
    sizes: Mapping[str, int],
    tokens: float,
    remat: str,
    moment_bytes: int | float,
    lora: LoraOptions,
    at_head: float,
) -> MemoryEstimate:
    """Estimate the memory of a train step of an adapter, including the frozen weights.

    Args:
        tokens: Tokens per micro-batch on one device.
        at_head: Temporary bytes of the loss, mostly its logits.
    """
    tensor, shards = sizes["tensor"], sizes["fsdp"] * sizes["tensor"]
    own, matrices = num_adapter_parameters(c, lora) / shards, c.num_layers * num_block_parameters(c)
    others = num_parameters(c) - matrices
    plain = FLOAT32 if lora.lora_base_dtype == "float32" else BF16
    frozen = matrices * BASE_BYTES[lora.lora_base_dtype] + others * plain
    block, saved = _block_bytes(c, tensor, remat)
    # While the backward pass repeats a block's forward pass, the block's weights are in memory in
    # 16 bits. With fsdp, the weights of the next block are in memory, too.
    dense = BF16 * (2 if sizes["fsdp"] > 1 else 1) * num_block_parameters(c) / tensor
    at_block = tokens * (
        (0 if remat == "none" else block) + BF16 * 2 * (c.mlp_dim / tensor + c.hidden_dim)
    )
    return MemoryEstimate(
        parameters=int(own * FLOAT32 + frozen / shards),
        moments=int(own * moment_bytes),
        gradients=int(own * FLOAT32),
        activations=int(tokens * c.num_layers * saved),
        working=int(max(at_head, at_block + dense)),
    )


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


def _block_bytes(c: ModelConfig, tensor: int, remat: str) -> tuple[float, int | float]:
    """Bytes per token of one block's activations: (all, only those that `remat` saves)."""
    query, key, feed_forward = (
        c.num_heads * c.head_dim / tensor,
        c.num_kv_heads * c.head_dim / tensor,
        c.mlp_dim / tensor,
    )
    # The inputs of both branches and their norms; queries and keys, each raw, normed and rotated;
    # values; the output of attention; gate, up and their product.
    block = BF16 * (4 * c.hidden_dim + 3 * query + 3 * key + key + query + 3 * feed_forward)
    attended = BF16 * query + FLOAT32 * c.num_heads / tensor
    saved = {
        "none": block,
        "minimal": BF16 * (2 * c.hidden_dim + query + 2 * key + 2 * feed_forward) + attended,
        "attention": BF16 * c.hidden_dim + attended,
        "full": BF16 * c.hidden_dim,
        "offload": 0,
    }
    return block, saved[remat]


def _head_bytes(
    c: ModelConfig, tokens: float, tensor: int, gpu_bytes: int, logit: int, is_frozen: bool = False
) -> float:
    """Bytes of the loss: one chunk of logits, the head and its gradient, and the hidden states."""
    words = c.padded_vocab_size // tensor
    at_once, stream_bytes = LOGITS_AT_ONCE, FLOAT32
    each = LOGIT_BYTES_WITHOUT_KERNEL - 2 * (FLOAT32 - logit)  # two arrays have the logits' dtype
    if tensor == 1:
        each, stream_bytes, head_bytes = logit_bytes(logit), BF16, BF16 * words * c.hidden_dim
        at_once = logits_at_once(head_bytes, each, words=words, gpu_bytes=gpu_bytes)
    logits = words * chunk_tokens(max(1, round(tokens)), words, at_once)
    head = c.padded_vocab_size * c.hidden_dim / tensor
    weights = 0 if is_frozen else head * (BF16 + FLOAT32)  # head in bf16, gradient in float32
    return each * logits + weights + tokens * c.hidden_dim * stream_bytes
