"""`--mesh auto`: which mesh, from the machine and what a device would have to hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

FITS = 0.9  # of a device's memory: the rest is the driver's, NCCL's and what fragmentation leaves unused
GROUP_HOSTS = 8  # a wider ring gathers no faster, and its delay grows with it


@dataclass(frozen=True)
class Machine:
    """What a mesh is chosen for: hosts, devices in each, and the bytes that one device may use."""

    hosts: int
    per_host: int
    memory_bytes: int


class MeshChoice(NamedTuple):
    """Sizes of the four axes, and why these."""

    sizes: dict[str, int]
    reason: str


def choose_mesh(
    hosts: int, per_host: int, hidden_dim: int, memory_bytes: int, needs: Callable[[dict[str, int]], int], batch_size: int, splits: Mapping[str, int]
) -> MeshChoice:
    """Weights split over groups of hosts, and copied over the groups: data and fsdp.

    What one device could hold alone is split inside each host: its gathers are small, and stay on the links there. What is larger is split
    over up to 8 hosts, for the sum of its gradients over copies would take longer than gathers over the network. Then over as many as
    the memory asks for.

    Where there are fewer sequences than devices, neighbours in a host share each: its tokens (context), or where the weights that context
    copies do not fit, its heads and feed-forward (tensor).

    Args:
        hidden_dim: of the model, which fsdp must divide.
        memory_bytes: of one device.
        needs: bytes on one device by arithmetic, for sizes of the axes.
        batch_size: sequences of a micro-batch, which data x fsdp must divide.
        splits: context and tensor, the better one first, and what each must divide.

    >>> splits = {"context": 2048, "tensor": 8}
    >>> choose_mesh(4, 8, 4096, 80, lambda sizes: 64 // sizes["fsdp"], 32, splits)
    MeshChoice(sizes={'data': 4, 'fsdp': 8, 'context': 1, 'tensor': 1}, reason='weights split inside each of 4 hosts, and copied over them')
    >>> choose_mesh(16, 8, 4096, 20, lambda sizes: 64 // sizes["fsdp"], 128, splits).reason
    'weights split over groups of 8 hosts, for one device could not hold them, and copied over 2 such groups'
    >>> choose_mesh(1, 8, 4096, 80, lambda sizes: 64 // sizes["fsdp"], 4, splits)
    MeshChoice(sizes={'data': 1, 'fsdp': 4, 'context': 2, 'tensor': 1}, reason='weights split over 4 devices, each sequence over 2 (context)')
    """
    devices = hosts * per_host
    share = devices // math.gcd(devices, batch_size) if batch_size < devices else 1
    axes = [axis for axis, size in splits.items() if size % share == 0 and per_host % share == 0]
    if share == 1 or not axes:  # the check of the batch speaks where that does not divide
        return _of_weights(hosts, per_host, hidden_dim, memory_bytes, needs)
    choices = []
    for axis in axes:
        of_weights = _of_weights(hosts, per_host // share, hidden_dim, memory_bytes, _shared(needs, {axis: share}))
        choices.append(MeshChoice(of_weights.sizes | {axis: share}, f"{of_weights.reason}, each sequence over {share} ({axis})"))
    return next((choice for choice in choices if needs(choice.sizes) <= FITS * memory_bytes), choices[0])


def _shared(needs: Callable[[dict[str, int]], int], by: dict[str, int]) -> Callable[[dict[str, int]], int]:
    return lambda sizes: needs(sizes | by)


def _of_weights(hosts: int, per_host: int, hidden_dim: int, memory_bytes: int, needs: Callable[[dict[str, int]], int]) -> MeshChoice:
    def fits(sizes: dict[str, int]) -> bool:
        return needs(sizes) <= FITS * memory_bytes

    groups = [group for group in range(1, hosts + 1) if hosts % group == 0 and hidden_dim % (group * per_host) == 0] or [hosts]
    alone = fits(_sizes(hosts * per_host, 1))
    first = 0 if alone else max(i for i, group in enumerate(groups) if group <= GROUP_HOSTS or i == 0)
    meshes = [_sizes(hosts // group, group * per_host) for group in groups[first:]]
    sizes = next(filter(fits, meshes), meshes[-1])
    return MeshChoice(sizes, _reason(hosts, per_host, sizes["data"], alone))


def _reason(hosts: int, per_host: int, copies: int, alone: bool) -> str:
    if hosts == 1:
        return f"weights split over {per_host} devices" if per_host > 1 else "one device"
    if copies == hosts:
        return f"weights split inside each of {hosts} hosts, and copied over them"
    why = "which the memory asks for" if alone else "for one device could not hold them"
    if copies == 1:
        return f"weights split over all {hosts} hosts, {why}"
    return f"weights split over groups of {hosts // copies} hosts, {why}, and copied over {copies} such groups"


def _sizes(data: int, fsdp: int) -> dict[str, int]:
    return {"data": data, "fsdp": fsdp, "context": 1, "tensor": 1}
