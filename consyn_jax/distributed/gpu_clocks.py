"""Read the clocks of GPUs, and the reasons for throttling, from NVML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Bits of NVML's mask of throttle reasons (nvml.h, NvmlClocksEventReasons), with descriptions.
REASONS: Mapping[int, str] = {
    0x8: "hardware slowdown",
    0x40: "the GPU is too hot, and the hardware has halved its clock or more",
    0x80: "the power supply demands a lower clock (power brake)",
    0x20: "the GPU or its memory is too hot",
    0x4: "the power limit",
    0x2: "a clock limit set by the user (application clocks)",
}
HALVED, HOT = 0x8 | 0x40 | 0x80, 0x20


@dataclass(frozen=True)
class ClockState:
    """Clock of a GPU under load, and NVML's bit mask of throttle reasons."""

    clock_mhz: int | None
    reasons: int


def open_nvml() -> Any:
    """Initialise NVML and return the module `pynvml`, or the reason for a failure as a string."""
    try:
        import pynvml
    except ImportError:
        return "the package nvidia-ml-py is missing"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return str(error)
    return pynvml


def read_clocks(gpus: Sequence[str] | None = None) -> tuple[ClockState, ...]:
    """Read the clocks and throttle reasons of GPUs under load; return () without NVML.

    Args:
        gpus: UUIDs of the GPUs, from `visible_gpus`; None for all GPUs of the host.
    """
    nvml = open_nvml()
    if isinstance(nvml, str):
        return ()
    try:
        handles: list[Any] = (
            [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
            if gpus is None
            else [nvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in gpus]
        )
        return tuple(_clock(nvml, handle) for handle in handles)
    except nvml.NVMLError:  # the caller does not need the clocks
        return ()
    finally:
        nvml.nvmlShutdown()


def _clock(nvml: Any, handle: Any) -> ClockState:
    try:
        clock = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
        return ClockState(clock, nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
    except nvml.NVMLError:  # virtual GPUs have no clock
        return ClockState(None, 0)


def reasons_in_words(clocks: Sequence[ClockState], bits: int = ~0) -> str:
    """Describe the throttle reasons in `bits` that hold for at least one GPU; "" if none does.

    >>> reasons_in_words([ClockState(345, 0x24)], HALVED | HOT)
    'the GPU or its memory is too hot'
    """
    return "; ".join(
        text for bit, text in REASONS.items() if any(c.reasons & bit & bits for c in clocks)
    )
