"""Machines that need not be there: how many hosts, how many GPUs in each, and what the compiler and the estimates must know of a GPU.

Where each number is from: docs/design/planning.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from consyn_jax.config import UserError, nearest
from consyn_jax.distributed.auto_mesh import Machine
from consyn_jax.distributed.hardware import bf16_peak

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
class Gpu:
    """A GPU model, and the host that it usually stands in. Rates are per second and GPU.

    Attributes:
        kind: the name that the driver gives the device.
        memory_bytes: what the driver reports as the device's memory.
        memory_bandwidth: bytes to and from the device's memory, as specified.
        matmul_flops: of the best dense bf16 product summed in float32 that was measured.
        link_bandwidth: bytes to other GPUs of the host, one way, as specified.
        network_bandwidth: bytes to other hosts, one way, as specified; of several GPUs that share a port, its share.
        host_bandwidth: bytes to or from the host's memory, as specified.
        capability: of CUDA.
        cores: streaming multiprocessors. What one of them has is that of Hopper and Blackwell where nothing else is said.
    """

    kind: str
    memory_bytes: int
    memory_bandwidth: float
    matmul_flops: float
    link_bandwidth: float
    network_bandwidth: float
    host_bandwidth: float
    capability: str
    cores: int
    clock_rate_ghz: float
    l2_bytes: int
    fpus_per_core: int = 128
    threads_per_core: int = 2048
    shared_memory_per_block: int = 232_448
    shared_memory_per_core: int = 233_472

    @property
    def bf16_flops(self) -> float:
        """Of dense bf16 products summed in float32, as specified."""
        peak = bf16_peak(self.kind)
        assert peak is not None
        return peak

    @property
    def target_config(self) -> str:
        """`stream_executor.GpuTargetConfigProto` as text, which XLA compiles for when no device is there."""
        return _TARGET.format(**vars(self))


GPUS = {
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3",
        memory_bytes=84_942_979_072,
        memory_bandwidth=3.35e12,
        matmul_flops=794e12,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
        host_bandwidth=64e9,
        capability="major: 9",
        cores=132,
        clock_rate_ghz=1.98,
        l2_bytes=52_428_800,
    ),
    "h200": Gpu(
        "NVIDIA H200",
        memory_bytes=150_754_820_096,
        memory_bandwidth=4.8e12,
        matmul_flops=794e12,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
        host_bandwidth=64e9,
        capability="major: 9",
        cores=132,
        clock_rate_ghz=1.98,
        l2_bytes=62_914_560,
    ),
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB",
        memory_bytes=85_100_068_864,
        memory_bandwidth=2.039e12,
        matmul_flops=271e12,
        link_bandwidth=300e9,
        network_bandwidth=25e9,
        host_bandwidth=32e9,
        capability="major: 8",
        cores=108,
        clock_rate_ghz=1.41,
        l2_bytes=41_943_040,
        fpus_per_core=64,
        shared_memory_per_block=166_912,
        shared_memory_per_core=167_936,
    ),
    "b200": Gpu(
        "NVIDIA B200",
        memory_bytes=191_514_411_008,
        memory_bandwidth=7.7e12,
        matmul_flops=1745e12,
        link_bandwidth=900e9,
        network_bandwidth=50e9,
        host_bandwidth=64e9,
        capability="major: 10",
        cores=148,
        clock_rate_ghz=1.965,
        l2_bytes=132_644_864,
    ),
    "rtx4090": Gpu(
        "NVIDIA GeForce RTX 4090",
        memory_bytes=25_393_692_672,
        memory_bandwidth=1.008e12,
        matmul_flops=143e12,
        link_bandwidth=16e9,
        network_bandwidth=1.5625e9,
        host_bandwidth=32e9,
        capability="major: 8 minor: 9",
        cores=128,
        clock_rate_ghz=2.52,
        l2_bytes=75_497_472,
        threads_per_core=1536,
        shared_memory_per_block=101_376,
        shared_memory_per_core=102_400,
    ),
}


def known_gpu(kind: str) -> Gpu | None:
    """The GPU whose driver calls it so; None for one that is not in the table.

    >>> known_gpu("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    True
    """
    return next((gpu for gpu in GPUS.values() if gpu.kind == kind), None)


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

    @property
    def machine(self) -> Machine:
        """What a mesh is chosen for."""
        return Machine(self.hosts, self.gpus_per_host, self.gpu.memory_bytes)


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
