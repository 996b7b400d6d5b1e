"""Tables of GPUs and TPUs for memory planning, compiling and model FLOP utilisation.

docs/design/planning.md has the source of each number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """A GPU for which only the peak FLOP/s are known.

    Attributes:
        name: Part of the device kind, which is the name that the driver reports. If several entries
            match a device, the one with the longest name is used.
        bf16_flops: Specified FLOP/s of dense bf16 matmuls with float32 accumulation.
    """

    name: str
    bf16_flops: float

    @property
    def key(self) -> str:
        """Name of the GPU in `--topology`, such as "rtx4090"."""
        return self.name.lower().replace(" ", "")


@dataclass(frozen=True)
class DescribedGpu(Gpu):
    """A GPU with all numbers that planning and compiling need on a machine without this GPU.

    Rates are per second and per GPU. The default values hold for Hopper and Blackwell.

    Attributes:
        kind: Full name of the device that the driver reports.
        memory_bytes: Device memory that the driver reports.
        memory_bandwidth: Specified bytes/s from and to device memory.
        matmul_flops: Best measured FLOP/s of a dense bf16 matmul with float32 accumulation.
        link_bandwidth: Specified bytes/s to other GPUs of the host, in one direction.
        network_bandwidth: Specified bytes/s to other hosts, in one direction, as this GPU's share
            of a network port.
        host_bandwidth: Specified bytes/s to or from host memory.
        capability: CUDA compute capability, as in XLA's text format.
        cores: Number of streaming multiprocessors; fields ending in `_per_core` are per
            multiprocessor.
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
    def compute_capability(self) -> str:
        """Compute capability in the form of JAX, such as "9.0" for Hopper."""
        return ".".join([*re.findall(r"\d+", self.capability), "0"][:2])


# Ampere and Ada cards with GDDR memory, on PCIe 4.0 x16. Eight cards share one port of 100 Gb/s.
_ONE_OF_EIGHT_ON_PCIE: Any = {
    "network_bandwidth": 1.5625e9,
    "host_bandwidth": 32e9,
    "threads_per_core": 1536,
    "shared_memory_per_block": 101_376,
    "shared_memory_per_core": 102_400,
}

GPUS: tuple[Gpu, ...] = (
    DescribedGpu(
        "H100",
        989e12,
        kind="NVIDIA H100 80GB HBM3",
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
    DescribedGpu(
        "H200",
        989e12,
        kind="NVIDIA H200",
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
    DescribedGpu(
        "A100",
        312e12,
        kind="NVIDIA A100-SXM4-80GB",
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
    DescribedGpu(
        "B200",
        2250e12,
        kind="NVIDIA B200",
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
    DescribedGpu(
        "H20",
        148e12,
        kind="NVIDIA H20",
        memory_bytes=int(94.9 * 2**30),
        memory_bandwidth=4.0e12,
        matmul_flops=119e12,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
        host_bandwidth=64e9,
        capability="major: 9",
        cores=78,
        clock_rate_ghz=1.98,
        l2_bytes=62_914_560,
    ),
    DescribedGpu(
        "GB200",
        2500e12,
        kind="NVIDIA GB200",
        memory_bytes=197_897_748_480,
        memory_bandwidth=8.0e12,
        matmul_flops=1940e12,
        link_bandwidth=900e9,
        network_bandwidth=50e9,
        host_bandwidth=225e9,
        capability="major: 10",
        cores=152,
        clock_rate_ghz=2.062,
        l2_bytes=135_528_448,
    ),
    DescribedGpu(
        "RTX 4090",
        165e12,
        kind="NVIDIA GeForce RTX 4090",
        memory_bytes=25_393_692_672,
        memory_bandwidth=1.008e12,
        matmul_flops=143e12,
        link_bandwidth=16e9,
        capability="major: 8 minor: 9",
        cores=128,
        clock_rate_ghz=2.52,
        l2_bytes=75_497_472,
        **_ONE_OF_EIGHT_ON_PCIE,
    ),
    DescribedGpu(
        "RTX 3090",
        71e12,
        kind="NVIDIA GeForce RTX 3090",
        memory_bytes=int(23.69 * 2**30),
        memory_bandwidth=0.936e12,
        matmul_flops=62e12,
        link_bandwidth=16e9,
        capability="major: 8 minor: 6",
        cores=82,
        clock_rate_ghz=1.695,
        l2_bytes=6_291_456,
        **_ONE_OF_EIGHT_ON_PCIE,
    ),
    DescribedGpu(
        "A6000",
        155e12,
        kind="NVIDIA RTX A6000",
        memory_bytes=51_041_271_808,
        memory_bandwidth=0.768e12,
        matmul_flops=135e12,
        link_bandwidth=32e9,
        capability="major: 8 minor: 6",
        cores=84,
        clock_rate_ghz=1.8,
        l2_bytes=6_291_456,
        **_ONE_OF_EIGHT_ON_PCIE,
    ),
    DescribedGpu(
        "A10G",
        70e12,
        kind="NVIDIA A10G",
        memory_bytes=int(22.0 * 2**30),
        memory_bandwidth=0.6e12,
        matmul_flops=61e12,
        link_bandwidth=32e9,
        capability="major: 8 minor: 6",
        cores=80,
        clock_rate_ghz=1.71,
        l2_bytes=6_291_456,
        **_ONE_OF_EIGHT_ON_PCIE,
    ),
    DescribedGpu(
        "L4",
        121e12,
        kind="NVIDIA L4",
        memory_bytes=int(22.0 * 2**30),
        memory_bandwidth=0.3e12,
        matmul_flops=105e12,
        link_bandwidth=32e9,
        capability="major: 8 minor: 9",
        cores=58,
        clock_rate_ghz=2.04,
        l2_bytes=50_331_648,
        **_ONE_OF_EIGHT_ON_PCIE,
    ),
    DescribedGpu(
        "L40S",
        362e12,
        kind="NVIDIA L40S",
        memory_bytes=int(44.4 * 2**30),
        memory_bandwidth=0.864e12,
        matmul_flops=314e12,
        link_bandwidth=32e9,
        capability="major: 8 minor: 9",
        cores=142,
        clock_rate_ghz=2.52,
        l2_bytes=100_663_296,
        **_ONE_OF_EIGHT_ON_PCIE,
    ),
    Gpu("B300", 2250e12),
    Gpu("H100 PCIe", 756e12),
    Gpu("H100 NVL", 835e12),
    Gpu("H200 NVL", 836e12),
    Gpu("GH200", 989e12),
    Gpu("A800", 312e12),
    Gpu("A40", 149.7e12),
    Gpu("A30", 165e12),
    Gpu("A10", 125e12),
    Gpu("L40", 181e12),
    Gpu("RTX 5090", 209.5e12),
)
DESCRIBED = {gpu.key: gpu for gpu in GPUS if isinstance(gpu, DescribedGpu)}


# Words in the names of variants of the chips in the table, and of parts of a chip (MIG).
OTHER_CHIPS = re.compile(r"\b(D|Ti|SUPER|Laptop|Max-Q|MIG)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Tpu:
    """A generation of TPUs. Rates and bytes are per JAX device.

    A device is a chip, except for tpu7x, where a chip has two devices.

    Attributes:
        key: Name in a `--topology` and in libtpu.
        kind: Name of the device in JAX (`device_kind`).
        bf16_flops: Specified FLOP/s of dense bf16 matmuls with float32 accumulation.
        memory_bytes: Bytes that the compiler lets a program use.
        memory_bandwidth: Specified bytes per second to and from the device's memory.
        dimensions: Number of dimensions of a slice's network.
        max_chips: Largest number of chips of one slice.
        devices_per_chip: Number of devices of a chip.
    """

    key: str
    kind: str
    bf16_flops: float
    memory_bytes: int
    memory_bandwidth: float
    dimensions: int
    max_chips: int
    devices_per_chip: int = 1


TPUS = {
    tpu.key: tpu
    for tpu in (
        Tpu("v5e", "TPU v5 lite", 197e12, int(15.75 * 2**30), 819e9, 2, 256),
        Tpu("v6e", "TPU v6 lite", 918e12, int(31.25 * 2**30), 1638e9, 2, 256),
        Tpu("v5p", "TPU v5", 459e12, int(95.74 * 2**30), 2765e9, 3, 6144),
        Tpu("tpu7x", "TPU7x", 2307e12 / 2, int(94.75 * 2**30), 7380e9 / 2, 3, 9216, 2),
    )
}


def bf16_peak(device_kind: str) -> float | None:
    """Peak FLOP/s of a device in bf16; None if its kind is not in the tables.

    >>> bf16_peak("NVIDIA H100 80GB HBM3"), bf16_peak("NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    (989000000000000.0, None)
    >>> bf16_peak("TPU v5 lite")
    197000000000000.0
    """
    if OTHER_CHIPS.search(device_kind):
        return None
    for tpu in TPUS.values():
        if tpu.kind == device_kind:
            return tpu.bf16_flops
    found = [gpu for gpu in GPUS if re.search(rf"\b{gpu.name}\b", device_kind)]
    return max(found, key=lambda gpu: len(gpu.name)).bf16_flops if found else None


def described_gpu(device_kind: str) -> DescribedGpu | None:
    """The entry of `DESCRIBED` with exactly this device kind; None if there is none.

    >>> described_gpu("NVIDIA H100 80GB HBM3") is DESCRIBED["h100"]
    True
    """
    return next((gpu for gpu in DESCRIBED.values() if gpu.kind == device_kind), None)


def described_memory(device_kind: str) -> int:
    """Memory of a described GPU in bytes; 0 for any other device.

    >>> described_memory("NVIDIA H200"), described_memory("cpu")
    (150754820096, 0)
    """
    found = described_gpu(device_kind)
    return 0 if found is None else found.memory_bytes


def runs_triton(platform: str, compute_capability: str = "") -> bool:
    """Whether Triton kernels can be compiled for a device: an NVIDIA GPU of Ampere or newer.

    Args:
        platform: "cpu", "gpu", "cuda" or "rocm", as in `jax.Device.platform` and
            `jax.default_backend`.
        compute_capability: The GPU's compute capability, such as "9.0" for Hopper. Empty if
            unknown; the GPU then counts as recent.

    >>> runs_triton("gpu", "7.0"), runs_triton("cuda", "9.0"), runs_triton("gpu")
    (False, True, True)
    >>> runs_triton("rocm"), runs_triton("cpu")
    (False, False)
    """
    return platform in ("gpu", "cuda") and float(compute_capability or "8.0") >= 8.0
