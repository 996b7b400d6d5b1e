"""What XLA's compiler is told beside its defaults, in one table.

A setting is here because it was seen to change a compiled train step for the better; docs/design/compiled-programs.md has what was seen,
and what was tried and left out. They go with the program that is compiled and not into `XLA_FLAGS`, where a name that the installed XLA
does not know ends the process.
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

GENERATIONS = {"Ampere": ("8.0", "8.6", "8.7"), "Ada": ("8.9",), "Hopper": ("9.0",), "Blackwell": ("10.0", "10.3", "12.0", "12.1")}
CPU = "CPU"
Options = dict[str, bool | int | str]


@dataclass(frozen=True)
class Setting:
    """One setting of XLA.

    Attributes:
        name: as in `XLA_FLAGS`, without the dashes.
        reason: what is better with it.
        generations: of GPUs that get it, or CPU.
    """

    name: str
    value: bool | int | str
    reason: str
    generations: tuple[str, ...] = tuple(GENERATIONS)


SETTINGS = (
    Setting(
        "xla_gpu_reduce_scatter_combine_threshold_bytes",
        1,
        "A block's gradients are scattered as each is there, behind the products that follow. By default one exchange waits for the last of "
        "them, and nothing is left to hide it.",
    ),
    Setting(
        "xla_cpu_experimental_ynn_fusion_type",
        "",
        "Eigen multiplies the matrices of a block in three quarters of YNNPACK's time (docs/design/cpu.md).",
        (CPU,),
    ),
)


def compiler_options(devices: Sequence[Any]) -> Options:
    """For `jax.jit(..., compiler_options=)` of a program that `devices`, which need not be there, will run.

    What the user's `XLA_FLAGS` name is the user's. What the installed XLA does not know is left out.
    """
    device = next((each for each in devices if each.process_index == jax.process_index()), devices[0])
    generation = generation_of(device)
    wanted = {s.name: s.value for s in SETTINGS if generation in s.generations and s.name not in users_own()}
    return dict(_known(device, tuple(wanted.items()))) if wanted else {}


def generation_of(device: Any) -> str | None:
    """A name of `GENERATIONS`, or CPU; None for what is neither a CPU nor one of these GPUs."""
    if device.platform == "cpu":
        return CPU
    if device.platform not in ("gpu", "cuda"):
        return None
    capability = str(getattr(device, "compute_capability", ""))
    return next((name for name, capabilities in GENERATIONS.items() if capability in capabilities), None)


def users_own() -> set[str]:
    """Names that the environment sets in `XLA_FLAGS`: flags, or as XLA has it, a file of flags."""
    text = os.environ.get("XLA_FLAGS", "").strip()
    if text and not text.startswith("-"):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # XLA says so itself
            return set()
    return set(re.findall(r"(?:^|\s)--?(\w+)", text))


@cache
def _known(device: Any, options: tuple[tuple[str, bool | int | str], ...]) -> tuple[tuple[str, bool | int | str], ...]:
    """Those whose names the compiler knows. It is asked with a program of one addition, since it names one that it does not know and stops."""
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
