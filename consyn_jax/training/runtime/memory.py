"""Check that a compiled train step fits the devices; if not, find options that make it fit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import jax

from consyn_jax.config import RunConfig
from consyn_jax.errors import UserError, brief
from consyn_jax.flags import with_flags

GIB = 2**30
Compiled = Any  # a jax.stages.Compiled; this module uses only its `memory_analysis`


@dataclass(frozen=True)
class Memory:
    """Bytes of memory that a step needs on one device.

    Attributes:
        state: Bytes of the parameters, the optimizer state and one batch.
        temporary: Bytes of everything else at the peak: activations, gradients, gathered weights.
    """

    state: int
    temporary: int

    @property
    def total(self) -> int:
        """Sum of state and temporary memory, in bytes."""
        return self.state + self.temporary


class StepTooLarge(UserError):
    """The train step of a run needs more memory than a device has, even an idle one."""


class OutOfMemory(UserError):
    """A device ran out of memory during a computation.

    Args:
        fact: what happened, as a sentence without its full stop.
    """

    def __init__(self, fact: str, advice: str = "") -> None:
        super().__init__(f"{fact}; {advice}" if advice else fact)
        self.fact = fact


def step_memory(compiled: Compiled) -> Memory:
    """Return the memory of a compiled step; the state counts once, because it is donated."""
    sizes: Any = compiled.memory_analysis()
    return Memory(
        sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        sizes.temp_size_in_bytes,
    )


def device_bytes() -> int:
    """Return the bytes that one local device may use; CPU devices share the machine's memory."""
    stats = jax.local_devices()[0].memory_stats() or {}
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(stats.get("bytes_limit", machine // jax.local_device_count()))


def compile_to_fit(
    run: RunConfig, compile: Callable[[RunConfig], Compiled]
) -> tuple[RunConfig, Compiled]:
    """Compile the train step of `run`, and check that it fits the devices.

    With `--auto_batch`, the size of micro-batches is halved, and their number doubled, until the
    step fits.

    Args:
        compile: Function that compiles the train step of a run.

    Returns:
        The run with micro-batches that fit, and its train step.

    Raises:
        StepTooLarge: The step does not fit. The message says how much memory it needs, how much
            there is, and how much each alternative would need.
    """
    compiled, limit = compile(run), device_bytes()
    while (needs := step_memory(compiled)).total > limit:
        smaller, halved = _with_half_batches(run), None
        if run.hardware.auto_batch and smaller is not None:
            with suppress(UserError):  # the smaller batch may not be divisible by the mesh
                halved = compile(smaller)
        if smaller is None or halved is None:
            raise StepTooLarge(
                f"The train step needs {_gib(needs.total)} on each device ({_gib(needs.state)} of "
                f"state, {_gib(needs.temporary)} of activations and gradients), but a device has "
                f"{_gib(limit)}. {_alternatives(run, smaller, compile)}"
            )
        run, compiled = smaller, halved
    return run, compiled


def _with_half_batches(run: RunConfig) -> RunConfig | None:
    """Return `run` with twice as many micro-batches of half the size; None if the size is odd."""
    budget = run.budget
    if budget.batch_size % 2:
        return None
    return with_flags(
        run,
        {
            "batch_size": budget.batch_size // 2,
            "gradient_accumulation_steps": 2 * budget.gradient_accumulation_steps,
        },
    )


def _alternatives(
    run: RunConfig, smaller: RunConfig | None, compile: Callable[[RunConfig], Compiled]
) -> str:
    """Describe the memory that the step would need with other flags, by compiling each variant."""
    candidates = {}
    if smaller is not None:
        budget = smaller.budget
        flags = (
            f"--batch_size {budget.batch_size} "
            f"--gradient_accumulation_steps {budget.gradient_accumulation_steps}"
        )
        candidates[f"{flags} (same result; --auto_batch finds it)"] = smaller
    if run.hardware.gradient_checkpointing != "full":
        candidates["--gradient_checkpointing (same result, slower)"] = with_flags(
            run, {"gradient_checkpointing": "full"}
        )
    if run.hardware.optimizer_memory == "device":
        candidates["--optimizer_memory host (same result, slower)"] = with_flags(
            run, {"optimizer_memory": "host"}
        )
    if run.optimizer.moment_dtype == "float32":
        candidates["--moment_dtype bfloat16"] = with_flags(run, {"moment_dtype": "bfloat16"})
    found = []
    for flags, other in candidates.items():
        # The batch may not be divisible by the mesh, and some optimizers cannot be offloaded.
        with suppress(UserError):
            found.append(f"{flags} needs {_gib(step_memory(compile(other)).total)}")
    return f"Instead, {'; '.join(found)}." if found else "Use a smaller model or more devices."


@contextmanager
def explain_out_of_memory(
    smaller: str = "a smaller --batch_size and a larger --gradient_accumulation_steps",
) -> Iterator[None]:
    """Convert a device's out-of-memory error to `OutOfMemory`.

    A step that fits can still run out of memory if other programs use the device.

    Args:
        smaller: Flags that reduce the memory of the program.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = brief(error)
        raise OutOfMemory(
            f"A device ran out of its {_gib(device_bytes())} of memory ({reason})",
            "saved checkpoints are intact. Stop other programs on the device, or run the same "
            f"command again with {smaller}.",
        ) from error


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size < 10 * GIB else f"{size / GIB:.1f} GiB"
