"""`--mesh auto`: choose a mesh from the number of devices and the memory that a step needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from consyn_jax.integers import divisors

# Usable share of a device's memory. The rest is for the driver, NCCL and fragmentation.
FITS = 0.9
GROUP_HOSTS = 8  # a larger ring gathers no faster and has more latency

Sizes = dict[str, int]  # by axis


@dataclass(frozen=True)
class Machine:
    """Number of hosts, devices per host, and usable bytes of memory per device.

    A host is a group of devices with fast links, whether one or more processes use it. For TPUs, a
    slice counts as a host. A slice has many devices, so weights are split over several slices only
    if one slice has too little memory.
    """

    hosts: int
    per_host: int
    memory_bytes: int
    name_of_host: str = "host"

    @property
    def group_hosts(self) -> int:
        """Number of hosts that may share a copy of the weights, if they have enough memory."""
        return GROUP_HOSTS if self.name_of_host == "host" else 1


class MeshChoice(NamedTuple):
    """A chosen mesh: the sizes of the four axes, and the reason for them as text."""

    sizes: Sizes
    reason: str


def choose_mesh(
    machine: Machine,
    hidden_dim: int,
    needs: Callable[[Sizes], int],
    batch_size: int,
    splits: Mapping[str, int],
) -> MeshChoice:
    """Choose the axis sizes of the mesh: fsdp shards the weights, data replicates them.

    - A model that would fit on one device is sharded inside each host, where the links are fast
      and the gathers are small. Each host has a replica.
    - A larger model is sharded over groups of up to 8 hosts, because gathering its weights over the
      network is faster than summing its gradients over more replicas.
    - A model that does not fit in such a group is sharded over as many hosts as it needs.

    With fewer sequences than devices, several devices of one host share each sequence. The axis
    `context` splits the tokens of the sequence, and each of these devices has the same weights. If
    these weights do not fit, the axis `tensor` splits attention heads and feed-forward layers
    instead.

    Args:
        hidden_dim: Width of the model; the size of fsdp must divide it.
        needs: Function that estimates the bytes of memory per device, given the sizes of the axes.
        batch_size: Sequences per micro-batch; the product of data and fsdp must divide it.
        splits: Name of each axis that may split a sequence -> a number that the size of the axis
            must divide. The preferred axis comes first.

    >>> splits, needs = {"context": 2048, "tensor": 8}, lambda sizes: 64 // sizes["fsdp"]
    >>> choose_mesh(Machine(4, 8, 80), 4096, needs, 32, splits)
    MeshChoice(sizes={'data': 4, 'fsdp': 8, 'context': 1, 'tensor': 1}, reason='each of 4 hosts
    has a copy of the weights, split over its devices')
    >>> choose_mesh(Machine(16, 8, 20), 4096, needs, 128, splits).reason
    'weights split over groups of 8 hosts, because one device could not hold them, and copied
    across 2 such groups'
    >>> choose_mesh(Machine(1, 8, 80), 4096, needs, 4, splits)
    MeshChoice(sizes={'data': 1, 'fsdp': 4, 'context': 2, 'tensor': 1}, reason='weights split over 4
    devices, each sequence over 2 (context)')
    """
    devices = machine.hosts * machine.per_host
    share = devices // math.gcd(devices, batch_size) if batch_size < devices else 1
    axes = [
        axis for axis, size in splits.items() if size % share == 0 and machine.per_host % share == 0
    ]
    if share == 1 or not axes:  # if the batch is not divisible, `check_batch` refuses it later
        return _split_weights(machine, hidden_dim, needs)
    choices = [_share_sequences(machine, hidden_dim, needs, axis, share) for axis in axes]
    fitting = (choice for choice in choices if needs(choice.sizes) <= FITS * machine.memory_bytes)
    return next(fitting, choices[0])


def _share_sequences(
    machine: Machine, hidden_dim: int, needs: Callable[[Sizes], int], axis: str, share: int
) -> MeshChoice:
    """Split each sequence over `share` devices by the mesh axis `axis`, and shard the weights."""
    shared = {axis: share}
    weights = _split_weights(
        replace(machine, per_host=machine.per_host // share),
        hidden_dim,
        lambda sizes: needs(sizes | shared),
    )
    reason = f"{weights.reason}, each sequence over {share} ({axis})"
    return MeshChoice(weights.sizes | shared, reason)


def _split_weights(machine: Machine, hidden_dim: int, needs: Callable[[Sizes], int]) -> MeshChoice:
    hosts, per_host = machine.hosts, machine.per_host

    def fits(sizes: Sizes) -> bool:
        return needs(sizes) <= FITS * machine.memory_bytes

    groups = [n for n in divisors(hosts) if hidden_dim % (n * per_host) == 0] or [hosts]
    alone = fits(_sizes(hosts * per_host, 1))
    wide = [n for n in groups if n <= machine.group_hosts] or groups[:1]
    first = groups[0] if alone else wide[-1]
    meshes = [_sizes(hosts // n, n * per_host) for n in groups if n >= first]
    sizes = next(filter(fits, meshes), meshes[-1])
    return MeshChoice(sizes, _reason(machine, sizes["data"], alone))


def _reason(machine: Machine, copies: int, alone: bool) -> str:
    hosts, per_host, name = machine.hosts, machine.per_host, f"{machine.name_of_host}s"
    if hosts == 1:
        return f"weights split over {per_host} devices" if per_host > 1 else "one device"
    if copies == hosts:
        return f"each of {hosts} {name} has a copy of the weights, split over its devices"
    requires = alone or machine.group_hosts == 1
    why = "as the memory requires" if requires else "because one device could not hold them"
    if copies == 1:
        return f"weights split over all {hosts} {name}, {why}"
    return (
        f"weights split over groups of {hosts // copies} {name}, {why}, "
        f"and copied across {copies} such groups"
    )


def _sizes(data: int, fsdp: int) -> Sizes:
    return {"data": data, "fsdp": fsdp, "context": 1, "tensor": 1}
