"""Compare measured speeds with the table of GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from consyn_jax.distributed.hardware import described_gpu
from consyn_jax.doctor.machine_findings import FAIL, INFO, PASS, WARN, Finding, size
from consyn_jax.doctor.speed_facts import Speed

# Thresholds as shares of the table's values, which are the best measured matmul rate and the
# specified memory bandwidth. They leave room, because one shape is rarely the fastest and good
# cards differ by some percent.
LOW, BROKEN = 0.75, 0.5
ADVICE = (
    "Look for other processes on the GPU (nvidia-smi), throttling, power and clock limits; if "
    "there are none, compare with another card."
)


def check_speeds(speeds: Sequence[Speed]) -> list[Finding]:
    """Judge the matmul rate and the copy rate of the slowest device."""
    if not speeds:
        return []
    problems = [f"device {i}: {each.problem}" for i, each in enumerate(speeds) if each.problem]
    if problems:
        advice = "Free the device's memory, see the lines above, and run consyn-doctor again."
        return [Finding("matmul and copy", FAIL, problems[0], advice)]
    gpu, dtype = described_gpu(speeds[0].kind), speeds[0].dtype
    return [
        _compared(
            "matmul",
            [each.matmul_flops for each in speeds],
            None if gpu is None else gpu.matmul_flops,
            _flops,
            f" in {dtype}",
        ),
        _compared(
            "copy",
            [each.copy_bandwidth for each in speeds],
            None if gpu is None else gpu.memory_bandwidth,
            _bandwidth,
            " in the device's memory",
        ),
    ]


def _compared(
    name: str,
    rates: Sequence[float],
    table: float | None,
    shown: Callable[[float], str],
    what: str,
) -> Finding:
    least, most = shown(min(rates)), shown(max(rates))
    found = (least if least == most else f"{least} to {most}") + what
    if table is None:
        return Finding(name, INFO, found)
    share = min(rates) / table
    found += f", {share:.0%} of the table's {shown(table)}"
    if share < LOW:
        return Finding(name, FAIL if share < BROKEN else WARN, found, ADVICE)
    return Finding(name, PASS, found)


def _flops(rate: float) -> str:
    return f"{rate / 1e12:.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.0f} GFLOP/s"


def _bandwidth(rate: float) -> str:
    return f"{size(rate)}/s"
