"""XLA compiler settings that this package changes from their defaults.

Each setting improves a compiled train step. docs/design/compiled-programs.md lists the measurements
and the rejected settings. The settings are passed with each program and not in `XLA_FLAGS`, because
XLA ends the process if `XLA_FLAGS` contains an unknown name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

GENERATIONS = {
    "Ampere": ("8.0", "8.6", "8.7"),
    "Ada": ("8.9",),
    "Hopper": ("9.0",),
    "Blackwell": ("10.0", "10.3", "12.0", "12.1"),
}
CPU = "CPU"
Options = dict[str, bool | int | str]


@dataclass(frozen=True)
class Setting:
    """A setting of XLA.

    Attributes:
        name: Name of the setting, as in `XLA_FLAGS` but without dashes.
        reason: What the setting improves.
        generations: GPU generations for which the setting is used, or CPU.
    """

    name: str
    value: bool | int | str
    reason: str
    generations: tuple[str, ...] = tuple(GENERATIONS)


SETTINGS = (
    Setting(
        "xla_gpu_reduce_scatter_combine_threshold_bytes",
        1,
        "Reduce-scatter each gradient of a block as soon as it is computed, overlapped with the "
        "following matmuls. By default, XLA combines all of them into one exchange after the last "
        "gradient, when no compute is left to overlap with.",
    ),
    Setting(
        "xla_cpu_experimental_ynn_fusion_type",
        "",
        "Use Eigen for matmuls. With YNNPACK, the matmuls of a block take a third more time "
        "(docs/design/cpu.md).",
        (CPU,),
    ),
)


def compiler_options(devices: Sequence[Any]) -> Options:
    """Return the `compiler_options` of `jax.jit` for a program on `devices`.

    Settings that the user has set in `XLA_FLAGS` are left out. Settings that the installed XLA does
    not know are left out as well.

    Args:
        devices: Devices of this machine, or descriptions of devices (`Topology.described_devices`).
    """
    device = next(
        (each for each in devices if each.process_index == jax.process_index()), devices[0]
    )
    generation = generation_of(device)
    set_by_user = names_in_xla_flags()
    wanted = {
        s.name: s.value
        for s in SETTINGS
        if generation in s.generations and s.name not in set_by_user
    }
    return dict(_known(device, tuple(wanted.items()))) if wanted else {}


def traced_options(devices: Sequence[Any]) -> dict[str, bool | str]:
    """Compiler options that make a profiler's trace show the names of a program's operations.

    Only GPUs need options. By default, XLA launches most GPU kernels of a step as command buffers
    (CUDA graphs), and a trace shows the name of the buffer for each of its kernels.
    """
    name = "xla_gpu_enable_command_buffer"
    is_gpu = devices[0].platform in ("gpu", "cuda")
    if not is_gpu or name in names_in_xla_flags():
        return {}
    return {name: ""} if _known(devices[0], ((name, ""),)) else {}


def generation_of(device: Any) -> str | None:
    """The GPU generation of a device, one of `GENERATIONS`, or CPU; None for any other device."""
    if device.platform == "cpu":
        return CPU
    if device.platform not in ("gpu", "cuda"):
        return None
    capability = str(getattr(device, "compute_capability", ""))
    return next(
        (name for name, capabilities in GENERATIONS.items() if capability in capabilities), None
    )


def names_in_xla_flags() -> set[str]:
    """Names of the flags in the environment variable `XLA_FLAGS`, or in the file that it names."""
    text = os.environ.get("XLA_FLAGS", "").strip()
    if text and not text.startswith("-"):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # XLA reports the error
            return set()
    return set(re.findall(r"(?:^|\s)--?(\w+)", text))


@cache
def _known(
    device: Any, options: tuple[tuple[str, bool | int | str], ...]
) -> tuple[tuple[str, bool | int | str], ...]:
    """Return only the options that the installed XLA knows, found by compiling a trivial program.

    XLA reports the first name that it does not know, so unknown options are removed one by one.
    """
    like = jax.ShapeDtypeStruct((), "int32", sharding=SingleDeviceSharding(device))
    while options:
        try:
            jax.jit(lambda x: x + 1, compiler_options=dict(options)).lower(like).compile()
        except jax.errors.JaxRuntimeError as error:
            unknown = re.search(r"No such compile option: '(\w+)'", str(error))
            if unknown is None or unknown[1] not in dict(options):
                raise
            options = tuple((name, value) for name, value in options if name != unknown[1])
        else:
            break
    return options
