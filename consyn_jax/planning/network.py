"""Estimate the time of collectives between GPUs, over links inside a host and over a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache

import numpy as np

from consyn_jax.distributed.compiled import Collective
from consyn_jax.model.arithmetic import BF16, FLOAT32, num_block_parameters, num_parameters
from consyn_jax.planning.topology import GpuTopology
from consyn_jax.planning.workload import Workload

# The share of a link's specified bandwidth that NCCL reaches with large messages (nccl-tests,
# all-gather on eight H100: 360 of 450 GB/s).
LINK_EFFICIENCY = 0.8
# Seconds that one hop of a ring adds to a collective: (inside a host, between hosts). From NCCL,
# src/graph/tuning.cc, for rings with the protocol Simple.
HOP_SECONDS = (3.4e-6, 14e-6)

Number = int | float
Axes = tuple[str, ...]


def ring_seconds(
    payload: Number, axes: Axes, sizes: Mapping[str, int], topology: GpuTopology
) -> float:
    """Seconds of an all-gather or reduce-scatter along axes of the mesh, by a ring.

    Each of the n GPUs sends (n - 1) / n of the payload, and each hop adds a delay. If the ring
    crosses hosts, its GPUs on a host use their network ports in parallel. The rate is then the sum
    of these ports' rates, or the rate of a link inside a host, whichever is lower.

    Args:
        payload: bytes of the whole arrays.
    """
    size, hosts = _group(axes, tuple(sizes.items()), topology.gpus_per_host)
    between = hosts if hosts > 1 else 0
    delay = (size - 1 - between) * HOP_SECONDS[0] + between * HOP_SECONDS[1]
    return _transfer_seconds(payload, size, hosts, topology) + delay


def all_reduce_seconds(
    payload: Number, axes: Axes, sizes: Mapping[str, int], topology: GpuTopology
) -> float:
    """Seconds of an all-reduce of `payload` bytes along axes of the mesh.

    An all-reduce sends twice the bytes of an all-gather. Across hosts, the delay is computed for a
    tree, which NCCL has used since version 2.4.
    """
    size, hosts = _group(axes, tuple(sizes.items()), topology.gpus_per_host)
    delay = 2 * (
        (size // hosts - 1) * HOP_SECONDS[0] + math.ceil(math.log2(hosts)) * HOP_SECONDS[1]
    )
    return 2 * _transfer_seconds(payload, size, hosts, topology) + delay


def _transfer_seconds(payload: Number, size: int, hosts: int, topology: GpuTopology) -> float:
    link = topology.gpu.link_bandwidth if size > hosts else float("inf")
    ports = size / hosts * topology.gpu.network_bandwidth if hosts > 1 else float("inf")
    return (size - 1) / size * payload / (min(link, ports) * LINK_EFFICIENCY) if size > 1 else 0.0


@cache
def _group(axes: Axes, sizes: tuple[tuple[str, int], ...], gpus_per_host: int) -> tuple[int, int]:
    """Count the GPUs and the hosts of a group that communicates along `axes`.

    GPUs are numbered so that the last axis of the mesh varies fastest.
    """
    ids = np.arange(math.prod(size for _, size in sizes)).reshape([size for _, size in sizes])
    group = ids[tuple(slice(None) if axis in axes else 0 for axis, _ in sizes)]
    return group.size, len(np.unique(group // gpus_per_host))


def network_of(
    communicated: Iterable[Collective], sizes: Mapping[str, int], topology: GpuTopology
) -> dict[Axes, float]:
    """Estimate the seconds of collectives, summed for each set of mesh axes.

    A collective whose axes are unknown counts as one along all axes.
    """
    network: dict[Axes, float] = {}
    for found in communicated:
        axes = found.axes or tuple(axis for axis, size in sizes.items() if size > 1)
        seconds = all_reduce_seconds if found.kind == "all-reduce" else ring_seconds
        network[axes] = network.get(axes, 0.0) + found.count * seconds(
            found.payload_bytes / found.count, axes, sizes, topology
        )
    return network


def estimated_network(work: Workload, topology: GpuTopology) -> dict[Axes, float]:
    """Seconds of a step's collectives by mesh axes, estimated without a compiled program."""
    c, sizes, tensor = work.model, work.sizes, work.sizes["tensor"]
    parameters = num_parameters(c) / tensor
    parts = 2 + c.num_layers  # one collective per block and per embedding
    passes = 2 if work.remat == "none" else 3
    activations = BF16 * work.local_tokens * c.hidden_dim

    def in_parts(seconds: Callable[..., float], payload: Number, axis: str) -> float:
        return parts * seconds(payload / parts, (axis,), sizes, topology)

    # In fp8, the weights of blocks are gathered with 1 byte each instead of 2.
    narrower = c.num_layers * num_block_parameters(c) / tensor if work.fp8 else 0
    gathered = min(passes, 2) * in_parts(ring_seconds, BF16 * parameters - narrower, "fsdp")
    scattered = in_parts(ring_seconds, FLOAT32 * parameters, "fsdp")
    summed = in_parts(all_reduce_seconds, FLOAT32 * parameters / sizes["fsdp"], "data")
    keys = 2 * BF16 * work.local_tokens * sizes["context"] * c.num_kv_heads * c.head_dim / tensor
    # Context: keys and values are gathered in the forward pass and in recomputation, and their
    # gradients scattered. Tensor: each pass of a block sums the residual stream twice.
    context = c.num_layers * passes * ring_seconds(keys, ("context",), sizes, topology)
    sums = c.num_layers * 2 * passes * all_reduce_seconds(activations, ("tensor",), sizes, topology)
    found = {"data": summed, "fsdp": gathered + scattered, "context": context, "tensor": sums}
    return {
        (axis,): work.accumulation * seconds for axis, seconds in found.items() if sizes[axis] > 1
    }
