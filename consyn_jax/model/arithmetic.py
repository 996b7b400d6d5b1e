"""FLOPs, parameters and training memory of a model, from its configuration alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from consyn_jax.model_config import NO_LORA, LoraOptions, ModelConfig

BF16, FLOAT32 = 2, 4
# Bytes of a frozen weight by --lora_base_dtype on a GPU; nf4 has a float32 for 64 weights.
BASE_BYTES = {"auto": BF16, "float32": FLOAT32, "bfloat16": BF16, "int8": 1, "nf4": 0.5 + 4 / 64}
LOGITS_AT_ONCE = 2**26  # smallest chunk of the loss on a GPU: 256 MiB in float32
HEAD_BYTES = 2**30  # memory for logits and head weights on a GPU, or a larger share of its memory
HEAD_SHARE = 0.05
MOST_TOKENS = 8192  # in a chunk; more would save less than 1 % of the loss's products
CPU_LOGITS = 2**24  # in a chunk of the loss on a CPU (docs/design/cpu.md)
CPU_UNROLLED_LAYERS = 12  # deeper models run their blocks in a loop
TILE = 128  # tokens; products whose sizes are whole tiles waste nothing
LOGIT_BYTES = FLOAT32 + BF16  # a logit and its gradient
LOGIT_BYTES_WITHOUT_KERNEL = 10  # if devices share the vocabulary: 2.5 float32 arrays of logits


def matmul_parameters(config: ModelConfig) -> int:
    """Number of parameters that every token is multiplied with.

    These are all matrices and the output embedding; the input embedding is only looked up.

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
    """FLOPs of forward and backward pass for one token, without recomputation.

    They are 6 per matmul parameter (Kaplan et al., 2020), and 6 x T x heads x head_dim in each
    layer for attention, which counts only the lower triangle, as the kernels do. A sliding window
    shortens T in the layers that have it. Under an adapter, the frozen weights take 4 per matmul
    parameter, as they have no gradient.
    """
    lengths = sum(
        sequence_length if window is None else min(sequence_length, 2 * window)
        for window in config.windows
    )
    attention = 6.0 * lengths * config.num_heads * config.head_dim
    trained = num_adapter_parameters(config, lora) if lora.is_used else matmul_parameters(config)
    return 4.0 * matmul_parameters(config) + 2.0 * trained + attention


def num_parameters(config: ModelConfig) -> int:
    """All parameters, vocabulary padding included.

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


def num_block_parameters(c: ModelConfig) -> int:
    """Parameters of one block."""
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
    """FLOPs of a train step on a CPU, where attention also computes what the mask hides."""
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
    """Memory of a train step in float32 on a CPU, by arithmetic.

    Within a tenth of the compiler's figure for haiku and verse
    (tests/cli/choices/test_machine_fit.py). XLA on CPUs undoes recomputation, because it removes
    the barriers against merging repeated computations. So each block keeps its activations and two
    [T, T] matrices per head. Besides the state there are three arrays of the parameters' size, and
    two of one chunk's logits. Under an adapter, these three have the adapter's size. Frozen
    matrices are in memory twice, as stored and in float32, and so are the outputs of the matrices.

    Args:
        batch_size: Sequences in a micro-batch.
        moment_bytes: Bytes of the optimizer's moments per parameter.
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
    """Bytes on one device during a train step in bfloat16, by arithmetic.

    Attributes:
        parameters: The float32 parameters.
        moments: The optimizer's moments.
        gradients: In float32, summed over micro-batches.
        activations: Activations of all blocks that are saved for the backward pass.
        working: Temporary memory at the peak. The peak is either the backward pass of one block or
            the logits, before this micro-batch has gradients.
    """

    parameters: int
    moments: int
    gradients: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """The sum of all."""
        return self.parameters + self.moments + self.gradients + self.activations + self.working


def logits_at_once(
    head_bytes: int, itemsize: int = BF16, *, words: int = 0, gpu_bytes: int = 0
) -> int:
    """Logits that the loss holds at once on one GPU.

    Each chunk of tokens reads and writes the head's gradient, so few large chunks are best.

    Args:
        head_bytes: Bytes of the head in the compute dtype.
        itemsize: Bytes of a number of that dtype.
        words: Words of the head.
        gpu_bytes: Memory of the GPU; 0 if it is not known.
    """
    room = max(HEAD_BYTES, int(HEAD_SHARE * gpu_bytes)) - head_bytes
    most = max(MOST_TOKENS * words, HEAD_BYTES // (FLOAT32 + itemsize))
    return max(LOGITS_AT_ONCE, min(most, room // (FLOAT32 + itemsize)))


def chunk_tokens(tokens: int, words: int, logits: int) -> int:
    """Number of tokens in a chunk of the loss with at most `logits` logits.

    A divisor of `tokens` that is a multiple of `TILE`, if one uses over half of `logits`; otherwise
    the length that makes the chunks most even.
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
) -> MemoryEstimate:
    """Memory of a train step on a mesh.

    For the presets on GPUs it is within a tenth of the compiler's figure (tests/planning).

    Args:
        sizes: Sizes of the mesh's axes.
        batch_size: Sequences in a micro-batch over all devices.
        remat: A value of `--gradient_checkpointing`.
        moment_bytes: Bytes of the optimizer's moments per parameter.
        gpu_bytes: Memory of a GPU of the table (distributed/hardware.py), or 0.
    """
    c, tensor, fsdp = config, sizes["tensor"], sizes["fsdp"]
    tokens = batch_size * length / (sizes["data"] * fsdp * sizes["context"])
    if lora.is_used:
        return _adapter_memory(c, sizes, tokens, remat, moment_bytes, lora, gpu_bytes)
    own = num_parameters(c) / (fsdp * tensor)
    head = c.padded_vocab_size * c.hidden_dim / tensor
    block, saved = _block_bytes(c, tensor, remat)
    weights = (  # one block's weight gradients, its weights, and the next block's
        num_block_parameters(c) / tensor * (FLOAT32 + BF16 * (2 if fsdp > 1 else 1))
    )
    activation_gradients = BF16 * 2 * (c.mlp_dim / tensor + c.hidden_dim)
    at_block = tokens * ((0 if remat == "none" else block) + activation_gradients) + weights
    at_head = _head_bytes(c, tokens, tensor, gpu_bytes)
    if fsdp > 1:  # the gradient of the input embedding is whole until the end
        at_block += head * FLOAT32
    if accumulation > 1:  # added to the accumulated gradients, except the embeddings'
        at_head += own * FLOAT32
        at_block += head * FLOAT32 / fsdp
    at_block += own * FLOAT32
    # when the logits exist, this micro-batch has no gradients yet
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
    gpu_bytes: int,
) -> MemoryEstimate:
    """Memory of a step that trains an adapter; `parameters` includes the frozen weights.

    Args:
        tokens: Tokens of a micro-batch on one device.
    """
    tensor, shards = sizes["tensor"], sizes["fsdp"] * sizes["tensor"]
    own, matrices = num_adapter_parameters(c, lora) / shards, c.num_layers * num_block_parameters(c)
    others = num_parameters(c) - matrices
    plain = FLOAT32 if lora.lora_base_dtype == "float32" else BF16
    frozen = matrices * BASE_BYTES[lora.lora_base_dtype] + others * plain
    block, saved = _block_bytes(c, tensor, remat)
    # The forward pass of a block is repeated with its weights dense, and those of the next.
    dense = BF16 * (2 if sizes["fsdp"] > 1 else 1) * num_block_parameters(c) / tensor
    at_block = tokens * (
        (0 if remat == "none" else block) + BF16 * 2 * (c.mlp_dim / tensor + c.hidden_dim)
    )
    at_head = _head_bytes(c, tokens, tensor, gpu_bytes, is_frozen=True)
    return MemoryEstimate(
        parameters=int(own * FLOAT32 + frozen / shards),
        moments=int(own * moment_bytes),
        gradients=int(own * FLOAT32),
        activations=int(tokens * c.num_layers * saved),
        working=int(max(at_head, at_block + dense)),
    )


def num_adapter_parameters(c: ModelConfig, lora: LoraOptions) -> int:
    """Parameters of an adapter.

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
    """Bytes of one block's activations per token: all of them, and those that `remat` saves."""
    query, key, feed_forward = (
        c.num_heads * c.head_dim / tensor,
        c.num_kv_heads * c.head_dim / tensor,
        c.mlp_dim / tensor,
    )
    # two inputs and their norms; queries and keys raw, normed and rotated; values and attention's
    # output; gate, up and their product
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
    c: ModelConfig, tokens: float, tensor: int, gpu_bytes: int, is_frozen: bool = False
) -> float:
    """Memory of the loss: a chunk of logits, the head with its gradient, and the hidden states."""
    words = c.padded_vocab_size // tensor
    at_once = LOGITS_AT_ONCE
    if tensor == 1:
        at_once = logits_at_once(BF16 * words * c.hidden_dim, words=words, gpu_bytes=gpu_bytes)
    logits = words * chunk_tokens(max(1, round(tokens)), words, at_once)
    logit_bytes, stream_bytes = (
        (LOGIT_BYTES, BF16) if tensor == 1 else (LOGIT_BYTES_WITHOUT_KERNEL, FLOAT32)
    )
    head = c.padded_vocab_size * c.hidden_dim / tensor
    weights = 0 if is_frozen else head * (BF16 + FLOAT32)  # cast, and its gradient
    return logit_bytes * logits + weights + tokens * c.hidden_dim * stream_bytes
