"""Machines that need not be there: how many hosts, how many GPUs in each, and what the compiler must know of a GPU."""

from __future__ import annotations

import re
from dataclasses import dataclass

from consyn_jax.config import UserError, nearest


@dataclass(frozen=True)
class Gpu:
    """A GPU model.

    Attributes:
        kind: the name that the driver gives the device.
        memory_bytes: what the driver reports as the device's memory.
        target_config: `stream_executor.GpuTargetConfigProto` as text, which XLA compiles for when no device is there.
    """

    kind: str
    memory_bytes: int
    target_config: str


_H200_MEMORY_BYTES = 150_754_820_096

GPUS = {
    "h200": Gpu(
        kind="NVIDIA H200",
        memory_bytes=_H200_MEMORY_BYTES,
        target_config=f"""
            platform_name: "CUDA"
            device_description_str: "NVIDIA H200"
            runtime_version {{ major: 13 minor: 0 patch: 0 }}
            dnn_version_info {{ major: 9 minor: 12 }}
            gpu_device_info {{
              cuda_compute_capability {{ major: 9 }}
              core_count: 132
              fpus_per_core: 128
              clock_rate_ghz: 1.98
              device_memory_size: {_H200_MEMORY_BYTES}
              memory_bandwidth: 4800000000000
              l2_cache_size: 62914560
              threads_per_warp: 32
              threads_per_block_limit: 1024
              threads_per_core_limit: 2048
              registers_per_block_limit: 65536
              registers_per_core_limit: 65536
              shared_memory_per_block: 49152
              shared_memory_per_block_optin: 232448
              shared_memory_per_core: 233472
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
            }}
        """,
    ),
}


@dataclass(frozen=True)
class Topology:
    """`hosts` machines with `gpus_per_host` GPUs of one model each."""

    gpu: Gpu
    hosts: int
    gpus_per_host: int

    @property
    def num_devices(self) -> int:
        """GPUs in all."""
        return self.hosts * self.gpus_per_host


def parse_topology(text: str) -> Topology:
    """The machines that "h200:1x8" describes: the GPU's name, hosts x GPUs in each.

    Raises:
        UserError: not of that form, or a GPU that is not in the table.

    >>> parse_topology("h200:2x8").num_devices
    16
    """
    match = re.fullmatch(r"(\w+):([1-9]\d*)x([1-9]\d*)", text.strip().lower())
    if match is None:
        raise UserError(f"The topology {text!r} is not of the form GPU:HOSTSxGPUS. Write it as h200:1x8, one host with eight H200.")
    name, hosts, gpus_per_host = match.groups()
    if name not in GPUS:
        raise UserError(f"The topology {text!r} names a GPU that is not in the table{nearest(name, GPUS)} Known: {', '.join(GPUS)}.")
    return Topology(GPUS[name], int(hosts), int(gpus_per_host))
