"""How long a train step takes, from arithmetic: products, memory traffic and network, each at a stated rate.

A step is the time of its kernels one after the other, stretched by one factor for what no rate explains, plus the exchanges that do not
hide behind them, plus the optimizer. Every rate that is not in the table of GPUs is a constant here; docs/design/planning.md has the
sources, and docs/planning.md what the estimate gives for runs that others have published.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from consyn_jax.config import ModelConfig, RunConfig
from consyn_jax.model.arithmetic import BF16, FLOAT32, MemoryEstimate, estimate_memory, num_block_parameters, num_parameters, train_flops_per_token
from consyn_jax.planning.compiled import Collective
from consyn_jax.planning.topology import Topology
from consyn_jax.training.optimizer import moment_bytes

# Of the specified memory bandwidth, what streaming kernels reach (BabelStream on A100 and H100: 0.88 to 0.94).
MEMORY_EFFICIENCY = 0.9
# Of the specified bandwidth of a link, what NCCL reaches with large messages (nccl-tests all-gather on eight H100: 360 of 450 GB/s).
LINK_EFFICIENCY = 0.8
# Of `bf16_flops`, what fused causal attention reaches, forward and backward together, by width of a head (FlashAttention-3 on H100,
# sequences of 2k to 8k, backward taking 5 of 7 products: about 0.45 for heads of 128, 0.33 for heads of 64).
ATTENTION_EFFICIENCY = {64: 0.33, 128: 0.45}
# Of that, what the kernel for documents (model/document_attention.py) reaches: 0.82 for heads of 64 and 0.79 for 128, measured on an H200.
DOCUMENT_SHARE = 0.8
# Seconds that one hop of a ring adds to an exchange (NCCL, src/graph/tuning.cc: ring, protocol Simple): inside a host, to another.
HOP_SECONDS = (3.4e-6, 14e-6)
# Share of the kernels' time behind which exchanges of weights and gradients can hide; those of activations hide behind nothing.
OVERLAP = 0.8
# Share of an exchange's time by which the kernels that hide it are slowed: NCCL takes multiprocessors and memory bandwidth from them.
# Judged, with the runs of docs/planning.md in view.
CONTENTION = 0.3
# Kernels together take so much longer than one by one at their rates: launches, gaps, tails of waves, and a clock that the power limit
# lowers. Fitted to the runs of others that are marked so in docs/planning.md; this package's program on one GPU has been measured itself.
STRETCH, ALONE_STRETCH = 1.36, 1.09
# Bytes that an optimizer step reads and writes for one parameter beside its moments: the gradient twice (its norm first), the weight both ways.
UPDATE_BYTES = 16
# Products of 8-bit numbers against those of bfloat16: what data sheets say of Ada, Hopper and Blackwell. Not measured.
FP8_SPEEDUP = 2
LOGIT_BYTES = 16  # of one logit: float32 written, read twice; its bfloat16 gradient written, read twice; rounded up

Number = int | float
Axes = tuple[str, ...]
HOST: Axes = ("host",)  # in place of axes: the host's memory


@dataclass(frozen=True)
class Workload:
    """What is trained in one step, and how it is split.

    Args:
        sizes: of the mesh's axes.
        batch_size: sequences of one micro-batch over all GPUs.
        accumulation: micro-batches in a step.
        length: tokens of a sequence.
        remat: what the backward pass recomputes, a name of `--gradient_checkpointing`.
        moment_bytes: of all moments of a parameter together.
        host_moments: the moments lie in the host's memory, and travel to the GPU and back in each step.
        fp8: the products of the blocks are of 8-bit numbers.
        own: this package's program, with attention inside documents by a kernel of its own; they are taken to be as long as the sequence.
    """

    model: ModelConfig
    sizes: Mapping[str, int]
    batch_size: int
    accumulation: int
    length: int
    remat: str = "none"
    moment_bytes: int = 8
    host_moments: bool = False
    fp8: bool = False
    own: bool = True

    @property
    def tokens(self) -> int:
        """Of a step, over all GPUs."""
        return self.batch_size * self.accumulation * self.length

    @property
    def local_tokens(self) -> float:
        """Of a micro-batch, on one GPU."""
        return self.batch_size * self.length / (self.sizes["data"] * self.sizes["fsdp"] * self.sizes["context"])

    @property
    def flops(self) -> float:
        """Of a step, over all GPUs, as they are counted for model FLOP utilisation: causal, nothing recomputed."""
        return self.tokens * train_flops_per_token(self.model, self.length)

    @property
    def memory(self) -> MemoryEstimate:
        """Of one GPU, by arithmetic."""
        moments = 0 if self.host_moments else self.moment_bytes
        return estimate_memory(self.model, self.sizes, self.batch_size, self.accumulation, self.length, self.remat, moments)


def workload(model: ModelConfig, run: RunConfig, sizes: Mapping[str, int]) -> Workload:
    """Of a resolved run."""
    budget, remat, on_host = run.budget, run.hardware.gradient_checkpointing, run.hardware.optimizer_memory == "host"
    moments, fp8 = moment_bytes(run.optimizer), run.hardware.mixed_precision == "fp8"
    return Workload(model, sizes, budget.batch_size, budget.gradient_accumulation_steps, run.length, remat, moments, on_host, fp8)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on every GPU.

    Attributes:
        products, attention, memory: matrix products, attention kernels and memory-bound kernels, stretched.
        optimizer: the update, adding up the gradients of micro-batches, and the journey of moments that lie with the host.
        network: exchanges by axes of the mesh, and those with the host's memory, if nothing hid them.
        exposed: what of the network does not hide behind the kernels.
    """

    products: float
    attention: float
    memory: float
    optimizer: float
    network: dict[Axes, float]
    exposed: float

    @property
    def total(self) -> float:
        """The step."""
        return self.products + self.attention + self.memory + self.optimizer + self.exposed


def estimate_step(work: Workload, topology: Topology, exchanged: Iterable[Collective] | None = None) -> StepTime:
    """The roofline of a step on a topology.

    Args:
        exchanged: by the compiled step; None for arithmetic.
    """
    gpu, layers = topology.gpu, work.model.num_layers
    bandwidth = gpu.memory_bandwidth * MEMORY_EFFICIENCY

    def kernels(products: Iterable[tuple[Number, Number]], speedup: Number = 1) -> Number:
        return sum(max(flops / (gpu.matmul_flops * speedup), size / bandwidth) for flops, size in products)

    # forward, backward with twice the work, and recomputation: minimal repeats no product, and no policy the one that ends a block
    *needed, _ = _block(work)
    speedup = FP8_SPEEDUP if work.fp8 else 1
    again = 0 if work.remat in ("none", "minimal") else kernels(needed, speedup)
    memory_passes = 3.0 if work.remat == "none" else 4.0
    attention_passes = 4.5 if work.remat == "full" else 3.5  # backward: 5 products to forward's 2
    products = work.accumulation * (layers * (3 * kernels(_block(work), speedup) + again) + 3 * kernels(_head(work)))
    efficiency = ATTENTION_EFFICIENCY[128 if work.model.head_dim >= 96 else 64] * (DOCUMENT_SHARE if work.own else 1)
    attention = work.accumulation * attention_passes * layers * _attention_flops(work) / (gpu.bf16_flops * efficiency)
    memory = work.accumulation * (memory_passes * layers * _elementwise_bytes(work) + layers * _quantising_bytes(work) + _head_bytes(work)) / bandwidth
    network = _network(work, topology) if exchanged is None else network_of(exchanged, work.sizes, topology)
    optimizer = _optimizer_bytes(work) / bandwidth
    if work.host_moments:  # a layer at a time, after all gradients: nothing hides it
        optimizer += 2 * work.moment_bytes * _local_parameters(work) / (gpu.host_bandwidth * LINK_EFFICIENCY)
    if work.remat == "offload":
        network = network | {HOST: work.accumulation * layers * 2 * _offloaded_bytes(work) / (gpu.host_bandwidth * LINK_EFFICIENCY)}
    stretch = stretch_of(work, topology)
    busy = stretch * (products + attention + memory)
    of_weights = sum(seconds for axes, seconds in network.items() if set(axes) <= {"data", "fsdp", *HOST})
    hidden = min(of_weights, OVERLAP * busy)
    return StepTime(stretch * products, stretch * attention, stretch * memory, optimizer, network, sum(network.values()) - (1 - CONTENTION) * hidden)


def stretch_of(work: Workload, topology: Topology) -> float:
    """How much longer all kernels take than their rates say."""
    return ALONE_STRETCH if work.own and topology.num_devices == 1 else STRETCH


def _block(work: Workload) -> Iterator[tuple[Number, Number]]:
    """FLOPs and bytes of the products of one block's forward pass on one GPU, for one micro-batch; last what feed-forward ends with."""
    c, tensor = work.model, work.sizes["tensor"]
    q, kv, ff = c.num_heads * c.head_dim / tensor, c.num_kv_heads * c.head_dim / tensor, c.mlp_dim / tensor
    for inputs, outputs in ((c.hidden_dim, q), (c.hidden_dim, kv), (c.hidden_dim, kv), (q, c.hidden_dim), *2 * [(c.hidden_dim, ff)], (ff, c.hidden_dim)):
        yield _product(work.local_tokens, inputs, outputs)


def _head(work: Workload) -> Iterator[tuple[Number, Number]]:
    """The same of the logits."""
    yield _product(work.local_tokens, work.model.hidden_dim, work.model.padded_vocab_size / work.sizes["tensor"])


def _product(rows: Number, inputs: Number, outputs: Number) -> tuple[Number, Number]:
    return 2 * rows * inputs * outputs, BF16 * (rows * inputs + inputs * outputs + rows * outputs)


def _attention_flops(work: Workload) -> Number:
    """Of one block's forward pass on one GPU: two products over what the kernel computes of each sequence's square."""
    c = work.model
    window = work.length if c.sliding_window is None else min(work.length, c.sliding_window)
    seen = window - window * window / (2 * work.length)  # half of the square, or of a window all but its beginning
    return 4 * work.local_tokens * seen * c.num_heads * c.head_dim / work.sizes["tensor"]


def _elementwise_bytes(work: Workload) -> Number:
    """What a block's forward pass reads and writes outside its products: norms, residual sums, rotations, the gated unit."""
    c, tensor = work.model, work.sizes["tensor"]
    stream = 2 * 2 + 2 * 3  # two norms, each read and written; two sums, each two read and one written
    heads = 4 * (c.num_heads + c.num_kv_heads) * c.head_dim / tensor  # normed and rotated, read and written each
    return BF16 * work.local_tokens * (stream * c.hidden_dim + heads + 3 * c.mlp_dim / tensor)


def _quantising_bytes(work: Workload) -> Number:
    """What fp8 reads and writes beside its products, of one block in both directions: each array once for its maximum and once for its digits."""
    if not work.fp8:
        return 0
    c, tensor = work.model, work.sizes["tensor"]
    q, kv, ff = c.num_heads * c.head_dim / tensor, c.num_kv_heads * c.head_dim / tensor, c.mlp_dim / tensor
    inputs, gradients = 2 * c.hidden_dim + q + ff, 2 * c.hidden_dim + q + 2 * kv + 2 * ff
    weights = num_block_parameters(c) / (work.sizes["fsdp"] * tensor)
    return (2 * BF16 + 1) * work.local_tokens * (inputs + gradients) + (2 * FLOAT32 + 1) * weights


def _offloaded_bytes(work: Workload) -> Number:
    """What one block keeps in the host's memory: its input and attention's output, with the sums that its backward pass needs."""
    c, tensor = work.model, work.sizes["tensor"]
    return work.local_tokens * (BF16 * (c.hidden_dim + c.num_heads * c.head_dim / tensor) + FLOAT32 * c.num_heads / tensor)


def _head_bytes(work: Workload) -> Number:
    return LOGIT_BYTES * work.local_tokens * work.model.padded_vocab_size / work.sizes["tensor"]


def _optimizer_bytes(work: Workload) -> Number:
    added_up = 3 * FLOAT32 * work.accumulation if work.accumulation > 1 else 0
    return _local_parameters(work) * (UPDATE_BYTES + 2 * work.moment_bytes + added_up)


def _local_parameters(work: Workload) -> Number:
    """Of which one GPU updates the values."""
    return num_parameters(work.model) / (work.sizes["fsdp"] * work.sizes["tensor"])


# --------------------------------------------------------------------------------------------------------------------- network


def ring_seconds(payload: Number, axes: Axes, sizes: Mapping[str, int], topology: Topology) -> float:
    """Of an all-gather or a reduce-scatter of `payload` bytes, whole, along axes of the mesh.

    A ring of n GPUs moves (n - 1) / n of the payload through each. Where it goes over several hosts, all of its GPUs in a host share
    the host's ports, and the slower of link and ports counts. Each GPU on the way adds its delay.
    """
    size, hosts = _group(axes, tuple(sizes.items()), topology.gpus_per_host)
    between = hosts if hosts > 1 else 0
    delay = (size - 1 - between) * HOP_SECONDS[0] + between * HOP_SECONDS[1]
    return _transfer_seconds(payload, size, hosts, topology) + delay


def all_reduce_seconds(payload: Number, axes: Axes, sizes: Mapping[str, int], topology: Topology) -> float:
    """Of a sum of `payload` bytes: twice what a ring moves, and over hosts the delay of a tree, which NCCL takes instead (since 2.4)."""
    size, hosts = _group(axes, tuple(sizes.items()), topology.gpus_per_host)
    delay = 2 * ((size // hosts - 1) * HOP_SECONDS[0] + math.ceil(math.log2(hosts)) * HOP_SECONDS[1])
    return 2 * _transfer_seconds(payload, size, hosts, topology) + delay


def _transfer_seconds(payload: Number, size: int, hosts: int, topology: Topology) -> float:
    link = topology.gpu.link_bandwidth if size > hosts else float("inf")
    ports = size / hosts * topology.gpu.network_bandwidth if hosts > 1 else float("inf")
    return (size - 1) / size * payload / (min(link, ports) * LINK_EFFICIENCY) if size > 1 else 0.0


@cache
def _group(axes: Axes, sizes: tuple[tuple[str, int], ...], gpus_per_host: int) -> tuple[int, int]:
    """GPUs in a group along `axes`, and the hosts that they are in; GPUs are numbered with the last axis fastest."""
    ids = np.arange(math.prod(size for _, size in sizes)).reshape([size for _, size in sizes])
    group = ids[tuple(slice(None) if axis in axes else 0 for axis, _ in sizes)]
    return group.size, len(np.unique(group // gpus_per_host))


def network_of(exchanged: Iterable[Collective], sizes: Mapping[str, int], topology: Topology) -> dict[Axes, float]:
    """Seconds of a compiled step's exchanges by axes; those whose axes are not known go over all."""
    network: dict[Axes, float] = {}
    for found in exchanged:
        axes = found.axes or tuple(axis for axis, size in sizes.items() if size > 1)
        seconds = all_reduce_seconds if found.kind == "all-reduce" else ring_seconds
        network[axes] = network.get(axes, 0.0) + found.count * seconds(found.payload_bytes / found.count, axes, sizes, topology)
    return network


def _network(work: Workload, topology: Topology) -> dict[Axes, float]:
    """The same by arithmetic, as this program makes them."""
    c, sizes = work.model, work.sizes
    parameters = num_parameters(c) / sizes["tensor"]
    parts = 2 + c.num_layers  # the weights of each block and the two embeddings travel by themselves
    passes = 2 if work.remat == "none" else 3
    activations = BF16 * work.local_tokens * c.hidden_dim

    def each(seconds: Callable[..., float], payload: Number, axis: str) -> float:
        return parts * seconds(payload / parts, (axis,), sizes, topology)

    narrower = c.num_layers * num_block_parameters(c) / sizes["tensor"] if work.fp8 else 0  # they travel in 8 bits
    gathered = min(passes, 2) * each(ring_seconds, BF16 * parameters - narrower, "fsdp")
    scattered = each(ring_seconds, FLOAT32 * parameters, "fsdp")
    summed = each(all_reduce_seconds, FLOAT32 * parameters / sizes["fsdp"], "data")
    keys = 2 * BF16 * work.local_tokens * sizes["context"] * c.num_kv_heads * c.head_dim / sizes["tensor"]
    found = {
        "data": summed,
        "fsdp": gathered + scattered,
        # keys and values gathered, gathered again where they are recomputed, and their gradients scattered in the backward pass
        "context": c.num_layers * passes * ring_seconds(keys, ("context",), sizes, topology),
        # two sums of the residual stream in each direction and recomputation
        "tensor": c.num_layers * 2 * passes * all_reduce_seconds(activations, ("tensor",), sizes, topology),
    }
    return {(axis,): work.accumulation * seconds for axis, seconds in found.items() if sizes[axis] > 1}
