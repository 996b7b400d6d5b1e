"""Described machines: number of hosts, GPUs in each, and their model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from consyn_jax.distributed.auto_mesh import Machine
from consyn_jax.distributed.hardware import DESCRIBED, DescribedGpu
from consyn_jax.errors import UserError, nearest

# `stream_executor.GpuTargetConfigProto` as text.
_TARGET = """
    platform_name: "CUDA"
    device_description_str: "{kind}"
    runtime_version {{ major: 13 minor: 0 patch: 0 }}
    dnn_version_info {{ major: 9 minor: 12 }}
    gpu_device_info {{
      cuda_compute_capability {{ {capability} }}
      core_count: {cores}
      fpus_per_core: {fpus_per_core}
      clock_rate_ghz: {clock_rate_ghz}
      device_memory_size: {memory_bytes}
      memory_bandwidth: {memory_bandwidth:.0f}
      l2_cache_size: {l2_bytes}
      threads_per_warp: 32
      threads_per_block_limit: 1024
      threads_per_core_limit: {threads_per_core}
      registers_per_block_limit: 65536
      registers_per_core_limit: 65536
      shared_memory_per_block: 49152
      shared_memory_per_block_optin: {shared_memory_per_block}
      shared_memory_per_core: {shared_memory_per_core}
      block_dim_limit_x: 2147483647
      block_dim_limit_y: 65535
      block_dim_limit_z: 65535
    }}
"""


@dataclass(frozen=True)
class Topology:
    """`hosts` machines with `gpus_per_host` GPUs of one model each."""

    gpu: DescribedGpu
    hosts: int
    gpus_per_host: int

    @property
    def num_devices(self) -> int:
        """GPUs in all."""
        return self.hosts * self.gpus_per_host

    @property
    def machine(self) -> Machine:
        """The hosts and memory that `--mesh auto` chooses a mesh for."""
        return Machine(self.hosts, self.gpus_per_host, self.gpu.memory_bytes)

    def described_devices(self) -> Sequence[Any]:
        """Devices that JAX can compile for ahead of time though none is present.

        The process must have started with `aot.environment()`.
        """
        from jax.experimental import topologies

        return topologies.get_topology_desc(
            platform="cuda",
            target_config=_TARGET.format(**vars(self.gpu)),
            topology=f"1x{self.hosts}x{self.gpus_per_host}",  # slices x hosts x GPUs per host
        ).devices


def parse_topology(text: str) -> Topology:
    """Parse a `--topology` such as "h200:2x8": the GPU's name, hosts x GPUs in each.

    A single number is the GPUs of one host; without a number, it is one GPU. Spaces and capitals do
    not count.

    Raises:
        UserError: the text has another form, or names a GPU that is not described.

    >>> parse_topology("h200:2x8").num_devices
    16
    >>> parse_topology("RTX 4090:2") == parse_topology("rtx4090:1x2")
    True
    """
    plain = "".join(text.lower().split())
    match = re.fullmatch(r"(\w+)(?::(?:([1-9]\d{0,7})x)?([1-9]\d{0,7}))?", plain)
    if match is None:
        raise UserError(
            f"The topology {text!r} is not of the form GPU:HOSTSxGPUS. Write it as h200:2x8, "
            f"two hosts with eight H200 each, or as rtx4090:1, one GPU."
        )
    name, hosts, gpus_per_host = match.groups()
    if name not in DESCRIBED:
        raise UserError(
            f"The topology {text!r} names a GPU that is not in the table{nearest(name, DESCRIBED)} "
            f"Known: {', '.join(DESCRIBED)}."
        )
    return Topology(DESCRIBED[name], int(hosts or 1), int(gpus_per_host or 1))
