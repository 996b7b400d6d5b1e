"""NVML, played by a module with its functions, and Linux's own files."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from consyn_jax.distributed.gpu_clocks import ClockState, read_clocks
from consyn_jax.doctor.gpu_facts import DriverState, GpuState, read_driver


class NVMLError(Exception):
    """As in pynvml."""


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Two GPUs; the second one has neither ECC nor NVLink."""

    def only_first(value: Any) -> Any:
        def ask(handle: int, *_: Any) -> Any:
            if handle:
                raise NVMLError("Not Supported")
            return value

        return ask

    def link(handle: int, number: int) -> int:
        if handle or number > 3:
            raise NVMLError("Invalid Argument")
        return int(number != 3)

    module: Any = types.ModuleType("pynvml")
    module.__dict__.update(
        NVMLError=NVMLError,
        NVML_NVLINK_MAX_LINKS=18,
        NVML_CLOCK_SM=1,
        NVML_TEMPERATURE_GPU=0,
        NVML_MEMORY_ERROR_TYPE_UNCORRECTED=1,
        NVML_VOLATILE_ECC=0,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetHandleByUUID=lambda uuid: int(uuid[-1]),
        nvmlSystemGetCudaDriverVersion_v2=lambda: 12040,
        nvmlSystemGetDriverVersion=lambda: b"550.54.14",
        nvmlDeviceGetName=lambda handle: b"NVIDIA A100-SXM4-80GB",
        nvmlDeviceGetMemoryInfo=lambda handle: types.SimpleNamespace(total=80, used=handle),
        nvmlDeviceGetMaxClockInfo=lambda handle, kind: 1410,
        nvmlDeviceGetTemperature=lambda handle, kind: 40,
        nvmlDeviceGetEccMode=only_first([1, 1]),
        nvmlDeviceGetTotalEccErrors=only_first(7),
        nvmlDeviceGetRemappedRows=only_first((0, 1, 1, 0)),
        nvmlDeviceGetNvLinkState=link,
        nvmlDeviceGetClockInfo=lambda handle, kind: 1200,
        nvmlDeviceGetCurrentClocksThrottleReasons=only_first(0x24),
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def test_what_nvml_reports(nvml: Any, tmp_path: Path) -> None:
    name = "NVIDIA A100-SXM4-80GB"
    assert read_driver(tmp_path) == DriverState(
        "550.54.14",
        (12, 4),
        (
            GpuState(name, 80, 0, 1410, 40, True, 7, True, False, 3, 1),
            GpuState(name, 80, 1, 1410, 40),
        ),
    )
    assert read_clocks() == (ClockState(1200, 0x24), ClockState(None, 0))
    assert read_clocks(["GPU-1"]) == (ClockState(None, 0),)


def test_linux_says_something_without_nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it fails
    files = {
        "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05 "
        "Sat Aug 19\nGCC version: 12\n",
        "dev/nvidia0": "",
        "dev/nvidia1": "",
        "dev/nvidiactl": "",
        "sys/bus/pci/devices/a/vendor": "0x10de\n",
        "sys/bus/pci/devices/a/class": "0x030200\n",
        "sys/bus/pci/devices/b/vendor": "0x10de\n",
        "sys/bus/pci/devices/b/class": "0x040300\n",  # its sound
        "sys/bus/pci/devices/c/vendor": "0x8086\n",
        "sys/bus/pci/devices/c/class": "0x030000\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = read_driver(tmp_path)
    assert found == DriverState(
        "535.104.05",
        problem="the package nvidia-ml-py is missing",
        devices=2,
        on_the_bus=1,
    )
    assert read_clocks() == ()


def test_a_driver_that_does_not_answer(nvml: Any, tmp_path: Path) -> None:
    def fail() -> None:
        raise NVMLError("Driver/library version mismatch")

    nvml.nvmlInit = fail
    assert read_driver(tmp_path).problem == "Driver/library version mismatch"
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetCount = fail
    assert read_driver(tmp_path).problem == "Driver/library version mismatch"
    assert read_clocks() == ()
