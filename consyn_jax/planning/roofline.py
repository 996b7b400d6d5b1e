"""Time of a train step, by arithmetic: matmuls, memory traffic and network at stated rates.

A step is the time of its kernels one after the other, stretched by one factor for what the rates do
not explain, plus the collectives that the kernels do not hide, plus the optimizer. Rates that are
not in the table of GPUs are constants here and in planning/network.py. docs/design/planning.md has
their sources, and docs/planning.md compares estimates with runs that others have published.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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

# The share of the specified memory bandwidth that streaming kernels reach (BabelStream on A100 and
# H100: 0.88 to 0.94).
MEMORY_EFFICIENCY = 0.9
# The share of `bf16_flops` that fused causal attention reaches, forward and backward together, by
# the width of a head (FlashAttention-3 on H100, sequences of 2k to 8k, backward taking 5 of 7
# matmuls: about 0.45 for heads of 128, 0.33 for heads of 64).
ATTENTION_EFFICIENCY = {64: 0.33, 128: 0.45}
# The share of ATTENTION_EFFICIENCY that the kernel for documents reaches
# (model/kernels/document_attention.py): 0.82 for heads of 64, 0.79 for 128, measured on an H200.
DOCUMENT_SHARE = 0.8
# The share of the kernels' time that collectives of weights and gradients can overlap with; others
# (of activations) overlap with nothing.
OVERLAP = 0.8
# The share of a collective's time by which it slows the kernels that it overlaps with, because NCCL
# takes multiprocessors and memory bandwidth from them. An estimate, not measured, made with the
# runs of docs/planning.md in view.
CONTENTION = 0.3
# How much longer all kernels take together than one by one at their rates: launches, gaps, tails of
# waves, and a clock lowered by the power limit. STRETCH is fitted to the runs of others that
# docs/planning.md marks; ALONE_STRETCH is measured, for this package's program on one GPU.
STRETCH, ALONE_STRETCH = 1.36, 1.09
# Bytes that an optimizer step reads and writes for each parameter besides its moments: the gradient
# is read twice (first for its norm), the weight read and written.
UPDATE_BYTES = 16
# Matmul rate of 8-bit numbers relative to bfloat16: from data sheets of Ada, Hopper and Blackwell,
# not measured.
FP8_SPEEDUP = 2
# Bytes read and written per logit: float32 written and read twice, its bfloat16 gradient likewise,
# rounded up.
LOGIT_BYTES = 16
HOST: Axes = ("host",)  # in place of mesh axes: host memory


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on every GPU.

    Attributes:
        matmuls, attention, memory: matmuls, attention kernels and memory-bound kernels, stretched.
        optimizer: the update, adding up the gradients of micro-batches, and the transfer of moments
            in host memory.
        network: collectives by mesh axes, and transfers of activations to host memory, as if the
            kernels hid none.
        exposed: the part of the network's time that the kernels do not hide.
    """

    matmuls: float
    attention: float
    memory: float
    optimizer: float
    network: dict[Axes, float]
    exposed: float

    @property
    def total(self) -> float:
        """The whole step."""
        return self.matmuls + self.attention + self.memory + self.optimizer + self.exposed


def estimate_step(
    work: Workload, topology: GpuTopology, communicated: Iterable[Collective] | None = None
) -> StepTime:
    """Estimate the time of a step on a topology.

    Args:
        communicated: the collectives of the compiled step; None to estimate them, too.
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
    """Factor by which all kernels together take longer than their rates say."""
    return ALONE_STRETCH if work.this_package and topology.num_devices == 1 else STRETCH


def _bandwidth(gpu: DescribedGpu) -> float:
    return gpu.memory_bandwidth * MEMORY_EFFICIENCY


# ------------------------------------------------------------------------------------------ matmuls


def _matmul_seconds(work: Workload, gpu: DescribedGpu) -> float:
    """Seconds of the matmuls of a step: forward, backward with twice the work, and recomputation.

    The policy minimal recomputes no matmul, and no policy recomputes the last one of a block. Under
    an adapter, the backward pass has no gradients of the weights.
    """
    passes = 2 if work.lora.is_used else 3
    speedup = FP8_SPEEDUP if work.fp8 else 1

    def seconds(matmuls: Iterable[tuple[Number, Number]], speedup: Number = 1) -> Number:
        return sum(
            max(flops / (gpu.matmul_flops * speedup), size / _bandwidth(gpu))
            for flops, size in matmuls
        )

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
    """FLOPs and bytes of the logits' matmul."""
    words = work.model.padded_vocab_size / work.sizes["tensor"]
    return _matmul(work.local_tokens, work.model.hidden_dim, words)


def _matmul(rows: Number, inputs: Number, outputs: Number) -> tuple[Number, Number]:
    return 2 * rows * inputs * outputs, BF16 * (rows * inputs + inputs * outputs + rows * outputs)


def _widths(work: Workload) -> tuple[float, float, float]:
    """The widths of queries, of keys or values, and of feed-forward on one GPU."""
    c, tensor = work.model, work.sizes["tensor"]
    return (
        c.num_heads * c.head_dim / tensor,
        c.num_kv_heads * c.head_dim / tensor,
        c.mlp_dim / tensor,
    )


# ----------------------------------------------------------------------------- attention and memory


def _attention_seconds(work: Workload, gpu: DescribedGpu) -> float:
    """Seconds of the attention kernels of a step.

    A backward pass does 5 matmuls to the forward pass's 2; the policy full repeats the latter.
    """
    passes = 4.5 if work.remat == "full" else 3.5
    efficiency = ATTENTION_EFFICIENCY[128 if work.model.head_dim >= 96 else 64] * (
        DOCUMENT_SHARE if work.this_package else 1
    )
    flops = work.accumulation * passes * work.model.num_layers * _attention_flops(work)
    return flops / (gpu.bf16_flops * efficiency)


def _attention_flops(work: Workload) -> Number:
    """FLOPs of a block's forward pass on one GPU: two matmuls over the computed scores.

    The value is the mean over the blocks, because only some may have a window.
    """
    c = work.model
    windows = [min(work.length, window or work.length) for window in c.windows]
    # Half of the square; with a window, w keys per query except for the first w queries.
    seen = sum(w - w * w / (2 * work.length) for w in windows) / c.num_layers
    return 4 * work.local_tokens * seen * c.num_heads * c.head_dim / work.sizes["tensor"]


def _memory_seconds(work: Workload, gpu: DescribedGpu) -> float:
    """Seconds of the memory-bound kernels of a step, without the optimizer's."""
    passes, layers = 3.0 if work.remat == "none" else 4.0, work.model.num_layers
    size = (
        passes * layers * _elementwise_bytes(work)
        + layers * _quantising_bytes(work)
        + LOGIT_BYTES * work.local_tokens * work.model.padded_vocab_size / work.sizes["tensor"]
    )
    return work.accumulation * size / _bandwidth(gpu)


def _elementwise_bytes(work: Workload) -> Number:
    """Bytes that a block's forward pass reads and writes outside its matmuls.

    These are norms, residual sums, rotations and the gated unit.
    """
    c, tensor = work.model, work.sizes["tensor"]
    stream = 2 * 2 + 2 * 3  # two norms: read, written; two sums: two arrays read, one written
    # Queries and keys are normed and rotated, each time read and written.
    heads = 4 * (c.num_heads + c.num_kv_heads) * c.head_dim / tensor
    return BF16 * work.local_tokens * (stream * c.hidden_dim + heads + 3 * c.mlp_dim / tensor)


def _quantising_bytes(work: Workload) -> Number:
    """Bytes that fp8 reads and writes besides its matmuls, for one block in both directions.

    Each array is read once for its maximum and once to be quantised.
    """
    if not work.fp8:
        return 0
    d = work.model.hidden_dim
    q, kv, ff = _widths(work)
    inputs, gradients = 2 * d + q + ff, 2 * d + q + 2 * kv + 2 * ff
    shards = work.sizes["fsdp"] * work.sizes["tensor"]
    weights = num_block_parameters(work.model) / shards
    return (2 * BF16 + 1) * work.local_tokens * (inputs + gradients) + (2 * FLOAT32 + 1) * weights


# ------------------------------------------------------------------------ optimizer and host memory


def _optimizer_seconds(work: Workload, gpu: DescribedGpu) -> float:
    """Seconds of the update on one GPU, with adding up the gradients of micro-batches."""
    whole = num_parameters(work.model)
    trained = num_adapter_parameters(work.model, work.lora) if work.lora.is_used else whole
    parameters = trained / (work.sizes["fsdp"] * work.sizes["tensor"])
    added_up = 3 * FLOAT32 * work.accumulation if work.accumulation > 1 else 0
    seconds = parameters * (UPDATE_BYTES + 2 * work.moment_bytes + added_up) / _bandwidth(gpu)
    if work.host_moments:  # one layer at a time, after all gradients: nothing hides the transfer
        transferred = 2 * work.moment_bytes * parameters
        seconds += transferred / (gpu.host_bandwidth * LINK_EFFICIENCY)
    return seconds


def _offload_seconds(work: Workload, gpu: DescribedGpu) -> float:
    """Seconds to move activations to host memory and back under the policy offload.

    For each block, these are its input, and attention's output with the softmax sums for the
    backward pass.
    """
    c, tensor = work.model, work.sizes["tensor"]
    kept = work.local_tokens * (
        BF16 * (c.hidden_dim + c.num_heads * c.head_dim / tensor) + FLOAT32 * c.num_heads / tensor
    )
    return work.accumulation * c.num_layers * 2 * kept / (gpu.host_bandwidth * LINK_EFFICIENCY)
