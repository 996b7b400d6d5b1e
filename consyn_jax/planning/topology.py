"""Descriptions of machines for planning: hosts with GPUs of one model, or slices of TPUs."""

from __future__ import annotations

import importlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from consyn_jax.distributed.auto_mesh import Machine
from consyn_jax.distributed.hardware import DESCRIBED, TPUS, DescribedGpu, Tpu, described_gpu
from consyn_jax.errors import UserError, nearest

# A `stream_executor.GpuTargetConfigProto` in text format.
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


class Topology(ABC):
    """A machine for which JAX can compile, whether or not it is this machine.

    Attributes:
        compiler: a key of `aot.COMPILERS`.
    """

    compiler: str

    @property
    @abstractmethod
    def device(self) -> DescribedGpu | Tpu:
        """Row of the hardware table for the devices, which are all of one kind."""

    @property
    def compute_capability(self) -> str:
        """Compute capability of the GPUs, such as "9.0" for Hopper; empty for TPUs."""
        return self.device.compute_capability if isinstance(self.device, DescribedGpu) else ""

    @property
    @abstractmethod
    def machine(self) -> Machine:
        """Hosts, devices and memory, in the form that `--mesh auto` reads."""

    @property
    @abstractmethod
    def description(self) -> str:
        """The machine in a few words."""

    @abstractmethod
    def described_devices(self) -> Sequence[Any]:
        """Return descriptions of the devices, for which JAX can compile without the hardware.

        The process must have started with `aot.environment(self.compiler)`.
        """

    @property
    def num_devices(self) -> int:
        """Number of all devices, as JAX counts them."""
        return self.machine.hosts * self.machine.per_host


@dataclass(frozen=True)
class GpuTopology(Topology):
    """`hosts` machines, each with `gpus_per_host` GPUs, all of the same kind."""

    gpu: DescribedGpu
    hosts: int
    gpus_per_host: int
    compiler = "cuda"

    @property
    def device(self) -> DescribedGpu:
        """Row of the GPU in the hardware table."""
        return self.gpu

    @property
    def machine(self) -> Machine:
        """Hosts, GPUs per host, and memory of a GPU."""
        return Machine(self.hosts, self.gpus_per_host, self.gpu.memory_bytes)

    @property
    def description(self) -> str:
        """Number of hosts, GPUs per host, and the driver's name for the GPU."""
        return f"{self.hosts} x {self.gpus_per_host} {self.gpu.kind}"

    def described_devices(self) -> Sequence[Any]:
        """Return descriptions of the GPUs, for which XLA can compile without the hardware."""
        from jax.experimental import topologies

        _know_architectures()
        return topologies.get_topology_desc(
            platform="cuda",
            target_config=_TARGET.format(**vars(self.gpu)),
            topology=f"1x{self.hosts}x{self.gpus_per_host}",  # slices x hosts x GPUs per host
        ).devices


def _know_architectures() -> None:
    """Let JAX look up the architecture of a described GPU in this package's table.

    From 0.12 on, JAX compiles kernels in Triton for the architecture that its own table gives, and
    a GPU that the table lacks must be in the machine (jax-ml/jax pull request 39547): no RTX 3090
    or L40S could be compiled for.
    """
    try:
        gpu_info: Any = importlib.import_module("jax._src.pallas.triton.gpu_info")
    except ModuleNotFoundError:  # before 0.12
        return
    ask_device: Callable[[str], str] = gpu_info._get_device_arch_name

    def architecture(kind: str) -> str:
        gpu = described_gpu(kind)
        if gpu is None:
            return ask_device(kind)
        return gpu.compute_capability

    gpu_info._get_device_arch_name = architecture


@dataclass(frozen=True)
class TpuTopology(Topology):
    """`slices` slices of TPUs; the chips of a slice form a torus of `shape`."""

    tpu: Tpu
    shape: tuple[int, ...]
    slices: int
    compiler = "tpu"

    @property
    def device(self) -> Tpu:
        """Row of the TPU generation in the hardware table."""
        return self.tpu

    @property
    def machine(self) -> Machine:
        """Slices (which count as hosts), devices per slice, and memory of a device."""
        devices = math.prod(self.shape) * self.tpu.devices_per_chip
        return Machine(self.slices, devices, self.tpu.memory_bytes, name_of_host="slice")

    @property
    def description(self) -> str:
        """Number and shape of the slices, and JAX's name for the device."""
        name, shape = f"{self.tpu.key} ({self.tpu.kind})", "x".join(map(str, self.shape))
        slices = "1 slice" if self.slices == 1 else f"{self.slices} slices"
        each = self.tpu.devices_per_chip
        devices = f", {each} devices a chip" if each > 1 else ""
        return f"{slices} of {shape} chips {name}{devices}"

    def described_devices(self) -> Sequence[Any]:
        """Return descriptions of the TPUs, for which libtpu can compile without the hardware."""
        from jax.experimental import topologies

        # By default libtpu assumes hosts of 2 x 2 chips, which one chip cannot fill.
        alone: Any = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(self.shape) == 1 else {}
        return topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{self.tpu.key}:{'x'.join(map(str, self.shape))}",
            num_slices=self.slices,
            **alone,
        ).devices


FORMS = (
    "Examples: h200:2x8 (two hosts with eight H200 each), rtx4090:1 (one GPU), v5e:2x4 (a slice of "
    "2 x 4 TPUs), v5e:2x4x2 (two such slices). Slices of v5p and tpu7x have three dimensions."
)


def parse_topology(text: str) -> Topology:
    """Parse a `--topology` such as "h200:2x8" (GPU:HOSTSxGPUS) or "v5e:2x4" (TPU:SHAPE[xSLICES]).

    A single number is the number of GPUs on one host; no number means one GPU. Spaces and upper
    case are ignored.

    Raises:
        UserError: the text has another form, or names a device that is not in the hardware table.

    >>> parse_topology("h200:2x8").num_devices
    16
    >>> parse_topology("RTX 4090:2") == parse_topology("rtx4090:1x2")
    True
    >>> parse_topology("v5e:2x4x2").num_devices, parse_topology("tpu7x:2x2x1").num_devices
    (16, 8)
    """
    plain = "".join(text.lower().split())
    match = re.fullmatch(r"(\w+)(?::([1-9]\d{0,7}(?:x[1-9]\d{0,7}){0,3}))?", plain)
    if match is None:
        raise UserError(f"The topology {text!r} is not of the form GPU:HOSTSxGPUS. {FORMS}")
    name, numbers = match[1], tuple(map(int, (match[2] or "1").split("x")))
    if name in TPUS:
        return _tpus(TPUS[name], numbers, text)
    if name not in DESCRIBED:
        known = (*DESCRIBED, *TPUS)
        raise UserError(
            f"The topology {text!r} names a device that is not in the table{nearest(name, known)} "
            f"Known: {', '.join(known)}."
        )
    if len(numbers) > 2:
        raise UserError(f"The topology {text!r} is not of the form GPU:HOSTSxGPUS. {FORMS}")
    return GpuTopology(DESCRIBED[name], *((1, *numbers)[-2:]))


def _tpus(tpu: Tpu, numbers: tuple[int, ...], text: str) -> TpuTopology:
    shape, rest = numbers[: tpu.dimensions], numbers[tpu.dimensions :]
    one = "2x4" if tpu.dimensions == 2 else "2x2x2"
    forms = f"{tpu.key}:{one}, or as {tpu.key}:{one}x2 for two slices"
    if len(shape) < tpu.dimensions or len(rest) > 1:
        raise UserError(
            f"The topology {text!r} is not a slice of {tpu.key}, which has {tpu.dimensions} "
            f"dimensions. Write it as {forms}."
        )
    chips = math.prod(shape)
    if chips > tpu.max_chips:
        raise UserError(
            f"The topology {text!r} has {chips:,} chips in a slice, and {tpu.key} has at most "
            f"{tpu.max_chips:,}. Use several slices, as in {tpu.key}:{one}x2 for two slices."
        )
    if chips > 1 and any(size % 2 for size in shape[:2]):
        raise UserError(
            f"The topology {text!r} cannot be made of hosts, which have 2 x 2 chips. Use even "
            f"numbers for the first two dimensions, as in {tpu.key}:{one}."
        )
    return TpuTopology(tpu, shape, *(rest or (1,)))
