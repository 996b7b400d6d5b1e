"""Estimate the time of a train step from the rates of matmuls, memory and network.

The estimate is the sum of three times. The first is the total time of the kernels, multiplied by a
factor for delays that the rates do not explain. The second is the time of collectives that do not
overlap with kernels. The third is the time of the optimizer. Rates that are not in the table of
GPUs are constants here and in planning/network.py; docs/design/planning.md has their sources.
docs/planning.md compares estimates with published runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from consyn_jax.distributed.compiled import Collective
from consyn_jax.distributed.hardware import DescribedGpu
from consyn_jax.model.arithmetic import (
    BF16,
    FLOAT32,
    num_adapter_parameters,
    num_block_parameters,
    num_parameters,
)
from consyn_jax.planning.network import (
    LINK_EFFICIENCY,
    Axes,
    Number,
    estimated_network,
    network_of,
)
from consyn_jax.planning.topology import GpuTopology
from consyn_jax.planning.workload import Workload


@dataclass(frozen=True)
class Rates:
    """Shares of a GPU's rates that the kernels of a train step reach.

    Attributes:
        matmul: share of the best measured rate of a matmul, `DescribedGpu.matmul_flops`.
        memory: share of the specified memory bandwidth, in memory-bound kernels.
        attention: share of `bf16_flops` in causal attention, forward and backward pass together, by
            the size of a head. The backward pass has 5 of the 7 matmuls.
    """

    matmul: float
    memory: float
    attention: Mapping[int, float]


# The share of the specified memory bandwidth that streaming kernels reach (BabelStream on A100 and
# H100: 0.88 to 0.94).
MEMORY_EFFICIENCY = 0.9
# Programs of others. Attention is FlashAttention-3's on H100 with sequences of 2k to 8k.
OTHERS = Rates(1, MEMORY_EFFICIENCY, {64: 0.33, 128: 0.45})
# This package, measured on one H200: a large matmul that alternates with the step, so that both
# have the clock that the power limit allows (676 of 794 TFLOP/s); norms, sums, rotations, SwiGLU
# and softmax in a trace (4.0 of 4.8 TB/s); attention (291 and 351 of 989 TFLOP/s).
OWN = Rates(0.85, 0.83, {64: 0.294, 128: 0.355})
# Collectives of weights and gradients can overlap with this share of the kernels' time. Collectives
# of activations do not overlap with kernels.
OVERLAP = 0.8
# A collective prolongs the kernels that it overlaps with by this share of its own time, because
# NCCL uses multiprocessors and memory bandwidth. Not measured: estimated from the runs in
# docs/planning.md.
CONTENTION = 0.3
# The time of all kernels relative to the sum of their times at the rates above. Launches, gaps and
# kernels that are not counted make it longer, and with OTHERS also tails of waves and a clock
# lowered by the power limit. STRETCH is fitted to the published runs that docs/planning.md marks,
# OWN_STRETCH to three steps on one H200.
STRETCH, OWN_STRETCH = 1.36, 1.02
# Bytes per parameter that an optimizer step reads and writes, without the moments: it reads the
# gradient twice (first for the norm), and reads and writes the weight.
UPDATE_BYTES = 16
# Matmul rate in 8 bits relative to bfloat16, from the data sheets of Ada, Hopper and Blackwell; not
# measured.
FP8_SPEEDUP = 2
# Bytes read and written per float32 logit in programs of others, rounded up: the logit is written
# once and read twice, and so is its bfloat16 gradient.
LOGIT_BYTES, LOGIT_ACCESSES = 16, 3
# The same in this package if the vocabulary is split over devices: by the text of the program, 37
# bytes, of which 10 are those of the head's matmuls. Of a bfloat16 logit it is 8 bytes less.
SPLIT_LOGIT_BYTES, SPLIT_LOGIT_ACCESSES = 27, 4
HOST: Axes = ("host",)  # key for transfers to host memory, beside the mesh axes


@dataclass(frozen=True)
class StepTime:
    """Seconds that a GPU spends on one optimizer step; all GPUs take equally long.

    Attributes:
        matmuls: time of matmuls. This time and the next two include the factor of `stretch_of`.
        attention: time of attention kernels.
        memory: time of memory-bound kernels.
        optimizer: time of the update, including the summing of gradients over micro-batches, and
            the transfer of moments to and from host memory.
        network: time of collectives, by their mesh axes. The key `HOST` has the time of transfers
            of activations to and from host memory. Time that overlaps with kernels is included.
        exposed: the part of the network's time that adds to the step.
    """

    matmuls: float
    attention: float
    memory: float
    optimizer: float
    network: dict[Axes, float]
    exposed: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.matmuls + self.attention + self.memory + self.optimizer + self.exposed


def estimate_step(
    work: Workload, topology: GpuTopology, communicated: Iterable[Collective] | None = None
) -> StepTime:
    """Estimate the time of a step on a topology.

    Args:
        communicated: the collectives of the compiled step; if None, they are estimated, too.
    """
    gpu, stretch = topology.gpu, stretch_of(work, topology)
    matmuls, attention = _matmul_seconds(work, gpu), _attention_seconds(work, gpu)
    memory = _memory_seconds(work, gpu)
    busy = stretch * (matmuls + attention + memory)
    network = (
        estimated_network(work, topology)
        if communicated is None
        else network_of(communicated, work.sizes, topology)
    )
    if work.remat == "offload":
        network = network | {HOST: _offload_seconds(work, gpu)}
    hideable = {"data", "fsdp", *HOST}
    of_weights = sum(seconds for axes, seconds in network.items() if set(axes) <= hideable)
    hidden = min(of_weights, OVERLAP * busy)
    return StepTime(
        stretch * matmuls,
        stretch * attention,
        stretch * memory,
        _optimizer_seconds(work, gpu),
        network,
        sum(network.values()) - (1 - CONTENTION) * hidden,
    )


def stretch_of(work: Workload, topology: GpuTopology) -> float:
    """Return the factor by which the kernels take longer in total than their rates predict.

    This package has not been measured on several GPUs. There, its matmuls are assumed to take as
    long as those of other programs.
    """
    if not work.this_package:
        return STRETCH
    return OWN_STRETCH if topology.num_devices == 1 else STRETCH * OWN.matmul


def rates_of(work: Workload) -> Rates:
    """Return the rates of the program that runs the step."""
    return OWN if work.this_package else OTHERS


def _bandwidth(gpu: DescribedGpu) -> float:
    return gpu.memory_bandwidth * MEMORY_EFFICIENCY


# ------------------------------------------------------------------------------------------ matmuls


def _matmul_seconds(work: Workload, gpu: DescribedGpu) -> float:
    """Seconds of a step's matmuls: forward pass, backward pass (twice as long), recomputation.

    No policy recomputes the last matmul of a block, and `minimal` recomputes none. With LoRA, the
    backward pass computes no gradients of the frozen weights.
    """
    passes = 2 if work.lora.is_used else 3
    speedup, rate = FP8_SPEEDUP if work.fp8 else 1, gpu.matmul_flops * rates_of(work).matmul

    def seconds(matmuls: Iterable[tuple[Number, Number]], speedup: Number = 1) -> Number:
        return sum(max(flops / (rate * speedup), size / _bandwidth(gpu)) for flops, size in matmuls)

    *needed, _ = _block_matmuls(work)
    again = 0 if work.remat in ("none", "minimal") else seconds(needed, speedup)
    block, head = seconds(_block_matmuls(work), speedup), seconds([_head_matmul(work)])
    return work.accumulation * (work.model.num_layers * (passes * block + again) + passes * head)


def _block_matmuls(work: Workload) -> Iterator[tuple[Number, Number]]:
    """FLOPs and bytes of each matmul in a block's forward pass of a micro-batch, on one GPU."""
    d = work.model.hidden_dim
    q, kv, ff = _widths(work)
    for inputs, outputs in ((d, q), (d, kv), (d, kv), (q, d), (d, ff), (d, ff), (ff, d)):
        yield _matmul(work.local_tokens, inputs, outputs)


def _head_matmul(work: Workload) -> tuple[Number, Number]:
    """FLOPs and bytes of the matmul that computes the logits, on one GPU."""
    words = work.model.padded_vocab_size / work.sizes["tensor"]
    return _matmul(work.local_tokens, work.model.hidden_dim, words)


def _matmul(rows: Number, inputs: Number, outputs: Number) -> tuple[Number, Number]:
    return 2 * rows * inputs * outputs, BF16 * (rows * inputs + inputs * outputs + rows * outputs)


def _widths(work: Workload) -> tuple[float, float, float]:
    """Widths of the queries, of the keys or values, and of the feed-forward layer, on one GPU."""
    c, tensor = work.model, work.sizes["tensor"]
    return (
        c.num_heads * c.head_dim / tensor,
        c.num_kv_heads * c.head_dim / tensor,
        c.mlp_dim / tensor,
    )


# ----------------------------------------------------------------------------- attention and memory


def _attention_seconds(work: Workload, gpu: DescribedGpu) -> float:
    """Seconds of the attention kernels of a step.

    The forward pass has 2 matmuls, the backward pass 5. With the policy `full`, the forward pass
    runs twice.
    """
    passes = 4.5 if work.remat == "full" else 3.5
    efficiency = rates_of(work).attention[128 if work.model.head_dim >= 96 else 64]
    flops = work.accumulation * passes * work.model.num_layers * _attention_flops(work)
    return flops / (gpu.bf16_flops * efficiency)


def _attention_flops(work: Workload) -> Number:
    """FLOPs of attention in a block's forward pass on one GPU: two matmuls.

    Masked scores are not counted. The result is the mean over all blocks, because some blocks may
    have a sliding window.
    """
    c = work.model
    windows = [min(work.length, window or work.length) for window in c.windows]
    # Keys per query. Causal: half of the sequence. Window w: w keys, fewer for the first w queries.
    seen = sum(w - w * w / (2 * work.length) for w in windows) / c.num_layers
    return 4 * work.local_tokens * seen * c.num_heads * c.head_dim / work.sizes["tensor"]


def _memory_seconds(work: Workload, gpu: DescribedGpu) -> float:
    """Seconds of the memory-bound kernels of a step, without the kernels of the optimizer."""
    forward, backward = _elementwise_bytes(work)
    if work.remat != "none":
        backward += forward
    logits = work.local_tokens * work.model.padded_vocab_size / work.sizes["tensor"]
    size = (
        work.model.num_layers * (forward + backward + _quantising_bytes(work))
        + _logit_bytes(work) * logits
    )
    return work.accumulation * size / (gpu.memory_bandwidth * rates_of(work).memory)


def _logit_bytes(work: Workload) -> Number:
    """Bytes read and written per logit and its gradient, between the matmuls of the head.

    This package's softmax kernel reads a logit twice and writes its gradient once. The matmuls that
    write the logit and read the gradient are limited by their arithmetic.
    """
    narrower = FLOAT32 - work.logit_bytes
    if not work.this_package:
        return LOGIT_BYTES - LOGIT_ACCESSES * narrower
    if work.sizes["tensor"] > 1:
        return SPLIT_LOGIT_BYTES - SPLIT_LOGIT_ACCESSES * narrower
    return 2 * work.logit_bytes + BF16


def _elementwise_bytes(work: Workload) -> tuple[Number, Number]:
    """Bytes that a block reads and writes outside its matmuls: (forward pass, backward pass).

    These are the bytes of norms, residual sums, rotary embeddings and SwiGLU.
    """
    c, tensor = work.model, work.sizes["tensor"]
    width, mlp = c.hidden_dim, c.mlp_dim / tensor
    heads = (c.num_heads + c.num_kv_heads) * c.head_dim / tensor  # queries and keys
    stream = 2 * 2 + 2 * 3  # two norms: read, written; two sums: two arrays read, one written
    array = BF16 * work.local_tokens
    if not work.this_package:  # queries and keys are read and written for norm and for rotation
        forward = array * (stream * width + 4 * heads + 3 * mlp)
        return forward, 2 * forward
    # One kernel norms and rotates. In the backward pass, the norms' kernels also sum the gradients
    # of the 3 and 2 matmuls that read a norm, and add that of the stream: 6 and 5 arrays.
    return (
        array * (stream * width + 2 * heads + 3 * mlp),
        array * ((6 + 5) * width + 3 * heads + 5 * mlp),
    )


def _quantising_bytes(work: Workload) -> Number:
    """Bytes that fp8's quantisation reads and writes, for a block's forward and backward pass.

    Most kernels write two 8-bit arrays instead of a bfloat16 one, which takes as many bytes, so it
    is not counted. The norms' backward pass writes both for the gradients of o and down, beside 16
    bits, and this package's attention for its output and the gradient of v. Where blocks are
    recomputed or the sequence is split, XLA reads these two again and casts them. Weights are read
    twice, the first time for their maximum.
    """
    if not work.fp8:
        return 0
    q, kv, _ = _widths(work)
    in_attention = work.remat == "none" and work.sizes["context"] == 1
    casts = 2 if in_attention else BF16 + 2
    activations = 2 * 2 * work.model.hidden_dim + casts * (q + kv)
    shards = work.sizes["fsdp"] * work.sizes["tensor"]
    weights = num_block_parameters(work.model) / shards
    return work.local_tokens * activations + (2 * FLOAT32 + 1) * weights


# ------------------------------------------------------------------------ optimizer and host memory


def _optimizer_seconds(work: Workload, gpu: DescribedGpu) -> float:
    """Seconds of the update on one GPU, including the summing of gradients over micro-batches."""
    whole = num_parameters(work.model)
    trained = num_adapter_parameters(work.model, work.lora) if work.lora.is_used else whole
    parameters = trained / (work.sizes["fsdp"] * work.sizes["tensor"])
    added_up = 3 * FLOAT32 * work.accumulation if work.accumulation > 1 else 0
    seconds = parameters * (UPDATE_BYTES + 2 * work.moment_bytes + added_up) / _bandwidth(gpu)
    if work.host_moments:  # layer by layer, after all gradients, so no kernel hides the transfer
        transferred = 2 * work.moment_bytes * parameters
        seconds += transferred / (gpu.host_bandwidth * LINK_EFFICIENCY)
    return seconds


def _offload_seconds(work: Workload, gpu: DescribedGpu) -> float:
    """Seconds to move activations to host memory and back, with the policy `offload`.

    Each block moves its input, the output of attention, and the log-sum-exp of the softmax that the
    backward pass needs.
    """
    c, tensor = work.model, work.sizes["tensor"]
    kept = work.local_tokens * (
        BF16 * (c.hidden_dim + c.num_heads * c.head_dim / tensor) + FLOAT32 * c.num_heads / tensor
    )
    return work.accumulation * c.num_layers * 2 * kept / (gpu.host_bandwidth * LINK_EFFICIENCY)
