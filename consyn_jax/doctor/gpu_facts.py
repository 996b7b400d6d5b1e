"""Read the state of driver and GPUs from NVML; without NVML, from /proc, /dev and /sys."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from consyn_jax.distributed.gpu_clocks import open_nvml

NVIDIA_VENDOR, DISPLAY_CLASSES = "0x10de", ("0x0300", "0x0302")  # PCI codes: VGA and 3D


@dataclass(frozen=True)
class GpuState:
    """State of one GPU; a value is None if the GPU or its driver does not report it.

    Attributes:
        memory_used: bytes that other processes use, read before this process uses the GPU.
        ecc: whether ECC, the correction of memory errors, is on.
        uncorrected: number of uncorrected memory errors since the driver was loaded.
        remap_pending: whether the next reset will replace a damaged row of memory.
        remap_failed: whether a damaged row of memory could not be replaced.
        links_up: number of NVLinks that work.
        links_down: number of the GPU's NVLinks that do not work.
    """

    name: str
    memory_bytes: int
    memory_used: int
    max_clock_mhz: int | None = None
    temperature_c: int | None = None
    ecc: bool | None = None
    uncorrected: int | None = None
    remap_pending: bool | None = None
    remap_failed: bool | None = None
    links_up: int = 0
    links_down: int = 0


@dataclass(frozen=True)
class DriverState:
    """State of the NVIDIA driver.

    Attributes:
        version: as in "580.65.06"; empty if no driver is loaded.
        cuda: the newest CUDA that the driver's library supports; None if unknown.
        problem: why NVML could not be queried; empty if it could be.
        devices: number of device files of GPUs (`/dev/nvidia0` and so on).
        on_the_bus: number of NVIDIA GPUs on the PCI bus; a container also sees GPUs that it cannot
            use.
    """

    version: str = ""
    cuda: tuple[int, int] | None = None
    gpus: tuple[GpuState, ...] = ()
    problem: str = ""
    devices: int = 0
    on_the_bus: int = 0

    @property
    def count(self) -> int:
        """Number of GPUs that NVML reports; if it reports none, the number of device files."""
        return len(self.gpus) or self.devices


def read_driver(root: Path = Path("/")) -> DriverState:
    """Read the state of the driver and of all GPUs that it shows to this process.

    Args:
        root: the directory that contains `proc`, `dev` and `sys`.
    """
    state = DriverState(
        _version_of_the_kernel_module(root / "proc/driver/nvidia/version"),
        devices=len(list((root / "dev").glob("nvidia[0-9]*"))),
        on_the_bus=_on_the_bus(root / "sys/bus/pci/devices"),
    )
    nvml = open_nvml()
    if isinstance(nvml, str):
        return replace(state, problem=nvml)
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        gpus = tuple(_gpu(nvml, handle) for handle in handles)
        cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()
        version = _text(nvml.nvmlSystemGetDriverVersion())
    except nvml.NVMLError as error:
        return replace(state, problem=str(error))
    finally:
        nvml.nvmlShutdown()
    supported = (cuda // 1000, cuda % 1000 // 10)
    return replace(state, version=version, cuda=supported, gpus=gpus)


def _gpu(nvml: Any, handle: Any) -> GpuState:
    def ask(function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(handle, *args)
        except nvml.NVMLError:  # not every GPU supports every query
            return None

    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    ecc = ask(nvml.nvmlDeviceGetEccMode)  # (the mode now, the mode after a restart)
    remapped = ask(nvml.nvmlDeviceGetRemappedRows) or (None,) * 4
    links = [ask(nvml.nvmlDeviceGetNvLinkState, i) for i in range(nvml.NVML_NVLINK_MAX_LINKS)]
    return GpuState(
        _text(nvml.nvmlDeviceGetName(handle)),
        memory.total,
        memory.used,
        ask(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM),
        ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        None if ecc is None else bool(ecc[0]),
        ask(
            nvml.nvmlDeviceGetTotalEccErrors,
            nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
            nvml.NVML_VOLATILE_ECC,
        ),
        None if remapped[2] is None else bool(remapped[2]),
        None if remapped[3] is None else bool(remapped[3]),
        links.count(1),
        links.count(0),
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _version_of_the_kernel_module(file: Path) -> str:
    """Read the driver's version; empty if the driver is not loaded."""
    try:
        found = re.search(r"Kernel Module\D*([\d.]+)", file.read_text())
    except OSError:
        return ""
    return found[1] if found else ""


def _on_the_bus(directory: Path) -> int:
    def read(file: Path) -> str:
        try:
            return file.read_text().strip()
        except OSError:
            return ""

    devices = directory.glob("*")
    return sum(
        read(device / "vendor") == NVIDIA_VENDOR
        and read(device / "class").startswith(DISPLAY_CLASSES)
        for device in devices
    )
