"""Memory of a train step, by arithmetic from the configuration alone.

What XLA holds at the peak of a step was read from programs compiled for GPUs
(docs/design/planning.md). tests/planning/test_aot.py compares the estimates with the compiler's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from consyn_jax.model.arithmetic import (
    BASE_BYTES,
    BF16,
    CPU_LOGITS,
    FLOAT32,
    GPU_UNROLLED_LAYERS,
    LOGIT_BYTES_WITHOUT_KERNEL,
    LOGITS_AT_ONCE,
    chunk_tokens,
    logit_bytes,
    logits_at_once,
    num_adapter_parameters,
    num_block_parameters,
    num_parameters,
    query_blocks,
)
from consyn_jax.model_config import NO_LORA, LoraOptions, ModelConfig

BATCH_BYTES = 16  # per token: its id, label, document and weight
GAPS = 0.005  # between arrays, as a share of the activations; at most 0.5 % in compiled programs


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
    (tests/cli/choices/test_machine_fit.py). Dropout needs more, which it leaves out. It is the sum
    of:

    - the parameters and the optimizer's moments;
    - three arrays as large as the trained parameters, or four with gradient accumulation;
    - two arrays as large as the logits of one chunk;
    - the activations of all blocks, and two [T, T] matrices per head, without the keys after each
      block of queries: of n blocks, 1/2 + 1/2n of a matrix. Rematerialisation saves nothing,
      because XLA on CPUs merges the repeated computation with the first one;
    - for LoRA, a float32 copy of each frozen matrix and of each matrix product's output.

    Args:
        batch_size: Sequences per micro-batch.
        accumulation: Micro-batches per train step.
        length: Tokens per sequence.
        moment_bytes: Bytes of the optimizer's moments per trained parameter.
    """
    c, tokens = config, batch_size * length
    block, _ = _block_bytes(c, 1, "none", fused=False)
    attended = (1 + 1 / query_blocks(length)) * c.num_heads * length * FLOAT32
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
        working: Bytes of other temporary memory at the peak of the step. The peak is in the
            backward pass of one block, or in the loss, where a micro-batch has logits but no
            gradients yet.
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
    """Estimate a train step's memory on one device.

    For the shipped recipes on GPUs, the estimate is at most 2 % above the compiler's figure and
    never below it.

    Args:
        sizes: Number of devices along each mesh axis.
        batch_size: Sequences per micro-batch, over all devices.
        accumulation: Micro-batches per train step.
        length: Tokens per sequence.
        remat: A value of `--gradient_checkpointing`.
        moment_bytes: Bytes of the optimizer's moments per trained parameter.
        gpu_bytes: Memory of the GPU; 0 if it is not known, or if the device is not a GPU.
        logit: Bytes of a logit, by `--logits_dtype`.
    """
    c, devices = config, sizes["data"] * sizes["fsdp"] * sizes["context"]
    tokens, fused = batch_size * length / devices, gpu_bytes > 0
    in_loss = _head_bytes(
        c, tokens, sizes["tensor"], accumulation, gpu_bytes, logit, is_frozen=lora.is_used
    )
    if lora.is_used:
        return _adapter_memory(c, sizes, tokens, remat, moment_bytes, lora, in_loss)
    return _full_memory(c, sizes, tokens, accumulation, remat, moment_bytes, in_loss, fused)


def _full_memory(
    c: ModelConfig,
    sizes: Mapping[str, int],
    tokens: float,
    accumulation: int,
    remat: str,
    moment_bytes: int | float,
    in_loss: float,
    fused: bool,
) -> MemoryEstimate:
    """Estimate the memory of a train step of all weights.

    Args:
        tokens: Tokens per micro-batch on one device.
        in_loss: Temporary bytes of the loss, mostly its logits.
        fused: Whether the kernels for GPUs run.
    """
    tensor, fsdp = sizes["tensor"], sizes["fsdp"]
    own, (_, saved) = num_parameters(c) / (fsdp * tensor), _block_bytes(c, tensor, remat, fused)
    unrolled = fused and remat == "none" and c.num_layers <= GPU_UNROLLED_LAYERS
    if remat == "none" and not unrolled:  # a loop also keeps the output of attention's branch
        saved += BF16 * c.hidden_dim
    activations, gradients = tokens * c.num_layers * saved, own * FLOAT32
    head = c.padded_vocab_size * c.hidden_dim / tensor * FLOAT32
    at_head, at_block = in_loss, _backward_bytes(c, tokens, fsdp, tensor, remat, fused)
    if fsdp > 1:  # the input embedding's gradient is sharded only at the end
        at_block += head
    if accumulation > 1:  # added to the accumulated gradients in place, except for embeddings
        at_head += gradients
        at_block += gradients + head / fsdp
    elif unrolled:  # the gradients of a block take the place of its activations
        at_block += max(head, gradients - activations)
    else:
        at_block += gradients
    # At the peak of the loss, this micro-batch has no gradients yet.
    summed = int(gradients) if accumulation > 1 or (at_block >= at_head and not unrolled) else 0
    peak = max(at_head, at_block) + _weight_copies(c, fsdp, tensor, unrolled, accumulation)
    peak += tokens * (c.head_dim * FLOAT32 + accumulation * BATCH_BYTES)  # rotations, and the batch
    if moment_bytes == 0:  # in host memory; old and new ones of the embeddings meet on the device
        moments = head / fsdp * (2 if c.tie_embeddings else 6)
        peak = max(peak, gradients + moments - activations)
    return MemoryEstimate(
        parameters=int(own * FLOAT32),
        moments=int(own * moment_bytes),
        gradients=summed,
        activations=int(activations),
        working=int(peak + GAPS * activations) - summed,
    )


def _adapter_memory(
    c: ModelConfig,
    sizes: Mapping[str, int],
    tokens: float,
    remat: str,
    moment_bytes: int | float,
    lora: LoraOptions,
    in_loss: float,
) -> MemoryEstimate:
    """Estimate the memory of a train step of an adapter, including the frozen weights.

    Args:
        tokens: Tokens per micro-batch on one device.
        in_loss: Temporary bytes of the loss, mostly its logits.
    """
    tensor, shards = sizes["tensor"], sizes["fsdp"] * sizes["tensor"]
    own, matrices = num_adapter_parameters(c, lora) / shards, c.num_layers * num_block_parameters(c)
    others = num_parameters(c) - matrices
    plain = FLOAT32 if lora.lora_base_dtype == "float32" else BF16
    frozen = matrices * BASE_BYTES[lora.lora_base_dtype] + others * plain
    block, saved = _block_bytes(c, tensor, remat, fused=False)  # not compared without recomputation
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
        working=int(max(in_loss, at_block + dense)),
    )


def _block_bytes(c: ModelConfig, tensor: int, remat: str, fused: bool) -> tuple[float, int | float]:
    """Bytes per token of one block's activations: (all, only those that `remat` saves).

    Args:
        fused: Whether the kernels for GPUs run. They keep no normed queries and keys, but attention
            keeps one float32 number per head.
    """
    query, key, feed_forward = (
        c.num_heads * c.head_dim / tensor,
        c.num_kv_heads * c.head_dim / tensor,
        c.mlp_dim / tensor,
    )
    # The inputs of both branches and their norms; queries and keys, raw and rotated; values; the
    # output of attention; gate, up and their product.
    block = BF16 * (4 * c.hidden_dim + 2 * query + 2 * key + key + query + 3 * feed_forward)
    sums = FLOAT32 * c.num_heads / tensor
    block += sums if fused else BF16 * (query + key)
    attended = BF16 * query + sums
    saved = {
        "none": block,
        "minimal": BF16 * (2 * c.hidden_dim + query + 2 * key + 2 * feed_forward) + attended,
        "attention": BF16 * c.hidden_dim + attended,
        "full": BF16 * c.hidden_dim,
        "offload": 0,
    }
    return block, saved[remat]


def _backward_bytes(
    c: ModelConfig, tokens: float, fsdp: int, tensor: int, remat: str, fused: bool
) -> float:
    """Temporary bytes of the backward pass of one block.

    The peak is where the feed-forward layer's arrays exist, or, with few tokens, later, at the
    gradients of the weights. With fsdp, these are scattered one after the other.
    """
    wide = tokens * BF16 * c.mlp_dim / tensor
    block, _ = _block_bytes(c, tensor, remat, fused)
    again, recomputed = (0, 0.0) if remat == "none" else (3, tokens * block)
    gradients = FLOAT32 * num_block_parameters(c) / tensor
    if fsdp > 1:  # of gate and up, and of the weights that are computed and scattered
        gradients = 2 * wide + 2 * FLOAT32 * c.hidden_dim * c.mlp_dim / tensor
    most = max((again + 2) * wide, gradients)
    return recomputed - again * wide + most + tokens * BF16 * c.hidden_dim


def _weight_copies(
    c: ModelConfig, fsdp: int, tensor: int, unrolled: bool, accumulation: int
) -> float:
    """Bytes of copies of the weights: in 16 bits, and in the layout in which they are gathered.

    An unrolled program casts all blocks at once. With fsdp it casts this device's shards, and
    gathers the weights of one block after the other.
    """
    block = BF16 * num_block_parameters(c) / tensor
    size = c.num_layers * block / fsdp if unrolled else 0.0
    if fsdp == 1:
        return size or block
    if unrolled and accumulation == 1:
        return size + block
    # What a loop uses again is transposed once, in float32: o, down and the embeddings.
    into_stream = c.num_layers * c.hidden_dim * (c.num_heads * c.head_dim + c.mlp_dim)
    embeddings = c.padded_vocab_size * c.hidden_dim * (1 if c.tie_embeddings else 2)
    return size + block + FLOAT32 * (into_stream + embeddings) / (fsdp * tensor)


def _head_bytes(
    c: ModelConfig,
    tokens: float,
    tensor: int,
    accumulation: int,
    gpu_bytes: int,
    logit: int,
    is_frozen: bool,
) -> float:
    """Bytes of the loss: one chunk of logits, the head, hidden states, and their gradients."""
    words, width = c.padded_vocab_size // tensor, c.hidden_dim
    at_once, stream_bytes = LOGITS_AT_ONCE, FLOAT32
    each = LOGIT_BYTES_WITHOUT_KERNEL - 2 * (FLOAT32 - logit)  # two arrays have the logits' dtype
    if tensor == 1:
        each, stream_bytes, head_bytes = logit_bytes(logit), BF16, BF16 * words * width
        at_once = logits_at_once(head_bytes, each, words=words, gpu_bytes=gpu_bytes)
    chunk = chunk_tokens(max(1, round(tokens)), words, at_once)
    head = 0 if is_frozen else c.padded_vocab_size * width / tensor
    gradients = tokens * width * stream_bytes + head * FLOAT32
    others = 2 * tokens * width * BF16 + head * BF16  # hidden states before and after the last norm
    if chunk >= tokens:  # the logits are no longer needed when their matmuls begin
        return others + max(each * words * chunk, BF16 * words * chunk + gradients)
    if accumulation == 1 and not c.tie_embeddings:
        # Both embeddings' gradients begin as the same zeros, which are kept for the input's.
        gradients += head * FLOAT32
    return others + each * words * chunk + chunk * width * BF16 + gradients
