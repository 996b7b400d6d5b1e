"""Judge the driver and the GPUs.

docs/doctor.md names the source of each threshold.
"""

from __future__ import annotations

from collections.abc import Sequence

from consyn_jax.distributed.gpu_clocks import HALVED, HOT, ClockState, reasons_in_words
from consyn_jax.distributed.hardware import described_gpu
from consyn_jax.doctor.gpu_facts import DriverState, GpuState
from consyn_jax.doctor.machine_findings import FAIL, INFO, PASS, WARN, Finding, size
from consyn_jax.errors import counted, listed

# The oldest Linux driver that supports each major version of CUDA.
OLDEST_DRIVER = {12: (525, 60, 13), 13: (580,)}
BUSY_SHARE = 0.1  # share of a GPU's memory that other processes may use without a warning
LOW_CLOCK = 0.6  # share of its highest clock below which a loaded GPU counts as slow
SWITCHED = 200e9  # bytes per second; in the table, only links of GPUs with NVLink are faster


def check_driver(driver: DriverState, cuda: int | None) -> list[Finding]:
    """Judge the driver, and whether it supports the CUDA version of JAX's plugin.

    Args:
        cuda: major version of CUDA that JAX's plugin needs; None if JAX has no plugin for CUDA.
    """
    if not driver.count:
        return [_no_gpu(driver, cuda)]
    supports = "" if driver.cuda is None else f", up to CUDA {driver.cuda[0]}.{driver.cuda[1]}"
    findings = [_version(driver, cuda, supports)]
    if driver.problem:
        advice = (
            "Install it with pip install nvidia-ml-py."
            if "nvidia-ml-py" in driver.problem
            else "Run nvidia-smi, and reload or reinstall the driver if it fails too."
        )
        findings.append(
            Finding(
                "NVML",
                WARN,
                f"memory, clocks, ECC and NVLink are not known: {driver.problem}",
                advice,
            )
        )
    return findings


def _no_gpu(driver: DriverState, cuda: int | None) -> Finding:
    if not driver.on_the_bus and not driver.version:
        advice = "Train small models here, or plan for GPUs with consyn-train --dry_run --topology."
        return Finding("GPU", WARN, "this machine has no NVIDIA GPU", advice)
    found = f"{counted(driver.on_the_bus, 'GPU')} on the PCI bus, but no driver is loaded"
    if driver.version:
        found = f"{driver.version} is loaded, but shows no GPU"
    advice = "Install NVIDIA's driver, or start the container with --gpus all."
    return Finding("driver", WARN if cuda is None else FAIL, found, advice)


def _version(driver: DriverState, cuda: int | None, supports: str) -> Finding:
    found = f"{driver.version or 'of unknown version'}{supports}"
    if cuda is None:
        return Finding("driver", PASS, found)
    oldest = OLDEST_DRIVER.get(cuda, (0,))
    is_old = bool(driver.version) and _numbers(driver.version) < oldest
    is_pair = driver.cuda is None or driver.cuda[0] >= cuda
    other = next((major for major, version in OLDEST_DRIVER.items() if major < cuda), None)
    if not is_pair or (is_old and driver.cuda is None):
        needed = ".".join(map(str, oldest))
        choice = (
            f" or use CUDA {other}: pip install 'jax[cuda{other}]' and uninstall "
            f"jax-cuda{cuda}-plugin and jax-cuda{cuda}-pjrt"
            if other and _numbers(driver.version or "0") >= OLDEST_DRIVER[other]
            else ""
        )
        advice = f"Install driver {needed} or newer{',' if choice else ''}{choice}."
        return Finding("driver", FAIL, f"{found}, too old for JAX's CUDA {cuda}", advice)
    if is_old:
        advice = (
            "Update the driver when you can; until then keep CUDA's compat libraries installed."
        )
        return Finding("driver", WARN, f"{found}, through CUDA's forward compatibility", advice)
    return Finding("driver", PASS, f"{found}; JAX needs CUDA {cuda}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


# --------------------------------------------------------------------------------------------- GPUs


def check_gpus(gpus: Sequence[GpuState]) -> list[Finding]:
    """Judge the number, memory, ECC and NVLink of the GPUs; no findings without GPUs."""
    if not gpus:
        return []
    kinds = sorted({gpu.name for gpu in gpus})
    count = Finding("GPUs", PASS, f"{len(gpus)} x {kinds[0]}")
    if len(kinds) > 1:
        advice = (
            "Select GPUs of one kind with CUDA_VISIBLE_DEVICES; otherwise all wait for the slowest."
        )
        count = Finding("GPUs", WARN, f"{len(gpus)} of several kinds: {listed(kinds)}", advice)
    found = [count, _memory(gpus), _ecc(gpus)]
    if (links := _links(gpus)) is not None:
        found.append(links)
    return found


def _memory(gpus: Sequence[GpuState]) -> Finding:
    least = min(gpu.memory_bytes for gpu in gpus)
    used = [i for i, gpu in enumerate(gpus) if gpu.memory_used > BUSY_SHARE * gpu.memory_bytes]
    if used:
        each = [f"GPU {i}: {size(gpus[i].memory_used)}" for i in used]
        found = f"{size(least)} each, but other processes use {listed(each)}"
        advice = "Find the processes with nvidia-smi; end those that are yours, or use other GPUs."
        return Finding("GPU memory", WARN, found, advice)
    return Finding("GPU memory", PASS, f"{size(least)} each, and free")


def _ecc(gpus: Sequence[GpuState]) -> Finding:
    def numbers(chosen: list[bool]) -> str:
        return f"GPU {listed([i for i, is_chosen in enumerate(chosen) if is_chosen], 8)}"

    failed = [bool(gpu.remap_failed) for gpu in gpus]
    if any(failed):
        found = f"{numbers(failed)}: a damaged row of memory could not be replaced"
        return Finding("ECC", FAIL, found, "Take the GPU out of use and have it replaced.")
    wrong = [bool(gpu.uncorrected) for gpu in gpus]
    if any(wrong):
        count = sum(gpu.uncorrected or 0 for gpu in gpus)
        found = f"{numbers(wrong)}: {count:,} uncorrected memory error{'' if count == 1 else 's'}"
        advice = "Reset the GPU (nvidia-smi --gpu-reset) or reboot; replace it if errors return."
        return Finding("ECC", FAIL, found, advice)
    pending = [bool(gpu.remap_pending) for gpu in gpus]
    if any(pending):
        found = f"{numbers(pending)}: a damaged row of memory will be replaced at the next reset"
        return Finding("ECC", WARN, found, "Reset the GPU before a long run, or reboot.")
    off = [gpu.ecc is not True for gpu in gpus]
    if any(off):
        return Finding("ECC", INFO, f"{numbers(off)}: off or not supported")
    return Finding("ECC", PASS, "on, and no uncorrected error since the driver was loaded")


def _links(gpus: Sequence[GpuState]) -> Finding | None:
    if len(gpus) == 1:
        return None
    partly = [i for i, gpu in enumerate(gpus) if gpu.links_up and gpu.links_down]
    advice = (
        "Run nvidia-smi nvlink --status, and restart nvidia-fabricmanager. If links stay down, "
        "have the hardware checked."
    )
    if partly:
        each = [f"GPU {i}: {gpus[i].links_down} of {_all(gpus[i])} down" for i in partly]
        return Finding("NVLink", FAIL, listed(each), advice)
    least, most = (pick(gpu.links_up for gpu in gpus) for pick in (min, max))
    if least != most:
        each = [f"GPU {i}: {gpu.links_up}" for i, gpu in enumerate(gpus)]
        return Finding("NVLink", FAIL, f"links differ: {listed(each, 8)}", advice)
    if not most:
        known = described_gpu(gpus[0].name)
        if known is not None and known.link_bandwidth > SWITCHED:
            found = f"no link works, although {gpus[0].name} supports NVLink"
            return Finding("NVLink", FAIL, found, advice)
        return Finding("NVLink", INFO, "none; the GPUs communicate over PCIe")
    return Finding("NVLink", PASS, f"{most} links for each GPU, all up")


def _all(gpu: GpuState) -> int:
    return gpu.links_up + gpu.links_down


def check_clocks(gpus: Sequence[GpuState], clocks: Sequence[ClockState]) -> list[Finding]:
    """Judge clocks and throttling under load; no findings if clocks were not read."""
    if not clocks or len(clocks) != len(gpus):
        return []
    reasons = [clock.reasons for clock in clocks]
    shown = [
        f"GPU {i}: {clock.clock_mhz} of {gpu.max_clock_mhz} MHz"
        for i, (gpu, clock) in enumerate(zip(gpus, clocks, strict=True))
        if clock.clock_mhz and gpu.max_clock_mhz
    ]
    found = listed(shown, 8) if shown else "clocks are not reported"
    if any(bits & HALVED for bits in reasons):
        advice = "Check cooling and power supply; the GPU now runs at half its speed or less."
        return [Finding("throttling", FAIL, f"{found}: {reasons_in_words(clocks)}", advice)]
    slow = any(
        (clock.clock_mhz or 0) < LOW_CLOCK * (gpu.max_clock_mhz or 0)
        for gpu, clock in zip(gpus, clocks, strict=True)
        if clock.clock_mhz
    )
    if slow or any(bits & HOT for bits in reasons):
        named = reasons_in_words(clocks) or "no reason given"
        advice = "Check cooling, power limit and clock limits with nvidia-smi -q -d PERFORMANCE."
        return [Finding("throttling", WARN, f"{found}: {named}", advice)]
    named = reasons_in_words(clocks)
    return [Finding("throttling", PASS, f"{found}{f'; limited by {named}' if named else ''}")]
