"""Does a compiled train step fit the devices, and what would make it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import jax

from consyn_jax.config import RunConfig, UserError, with_flags

GIB = 2**30
Compiled = Any  # a jax.stages.Compiled; only its `memory_analysis` is looked at here


@dataclass(frozen=True)
class Memory:
    """What one device must hold for a step to run, in bytes.

    Attributes:
        state: parameters, optimizer state and one batch.
        temporary: all else that is alive at once: activations, gradients, gathered weights.
    """

    state: int
    temporary: int

    @property
    def total(self) -> int:
        """Both."""
        return self.state + self.temporary


def step_memory(compiled: Compiled) -> Memory:
    """As the compiler laid it out; the state is donated, so it counts once."""
    sizes: Any = compiled.memory_analysis()
    return Memory(sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes, sizes.temp_size_in_bytes)


def device_bytes() -> int:
    """What one device here may use: its own memory, or of simulated and real CPU devices their share of the machine's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(stats.get("bytes_limit", machine // jax.local_device_count()))


def fitting(run: RunConfig, compile: Callable[[RunConfig], Compiled]) -> tuple[RunConfig, Compiled]:
    """The train step of `run`, or with `--auto_batch` of the same run in micro-batches that fit: halved ones, and twice as many.

    Args:
        compile: the train step of a run.

    Raises:
        UserError: it does not fit. The message has what it needs, what there is, and what each way out would need.
    """
    compiled, limit = compile(run), device_bytes()
    while (needs := step_memory(compiled)).total > limit:
        smaller, halved = _in_halves(run), None
        if run.hardware.auto_batch and smaller is not None:
            with suppress(UserError):  # the mesh does not divide the smaller batch
                halved = compile(smaller)
        if smaller is None or halved is None:
            raise UserError(
                f"The train step needs {_gib(needs.total)} on each device ({_gib(needs.state)} of state, {_gib(needs.temporary)} of activations "
                f"and gradients), and there are {_gib(limit)}. {_ways_out(run, smaller, compile)}"
            )
        run, compiled = smaller, halved
    return run, compiled


def _in_halves(run: RunConfig) -> RunConfig | None:
    """The same steps in twice as many micro-batches of half the size; None where the size is odd."""
    budget = run.budget
    if budget.batch_size % 2:
        return None
    return with_flags(run, {"batch_size": budget.batch_size // 2, "gradient_accumulation_steps": 2 * budget.gradient_accumulation_steps})


def _ways_out(run: RunConfig, smaller: RunConfig | None, compile: Callable[[RunConfig], Compiled]) -> str:
    """What other flags would need, by compiling each."""
    tried = {}
    if smaller is not None:
        flags = f"--batch_size {smaller.budget.batch_size} --gradient_accumulation_steps {smaller.budget.gradient_accumulation_steps}"
        tried[f"{flags} (the same result; --auto_batch finds it)"] = smaller
    if run.hardware.gradient_checkpointing != "full":
        tried["--gradient_checkpointing (the same result, slower)"] = with_flags(run, {"gradient_checkpointing": "full"})
    if run.hardware.optimizer_memory == "device":
        tried["--optimizer_memory host (the same result, slower)"] = with_flags(run, {"optimizer_memory": "host"})
    if run.optimizer.moment_dtype == "float32":
        tried["--moment_dtype bfloat16"] = with_flags(run, {"moment_dtype": "bfloat16"})
    found = []
    for flags, other in tried.items():
        try:
            found.append(f"{flags} needs {_gib(step_memory(compile(other)).total)}")
        except UserError:  # a mesh that does not divide the smaller batch, an optimizer whose state cannot lie on the host
            continue
    return f"{'; '.join(found)}." if found else "Use a smaller model or more devices."


@contextmanager
def explaining_exhaustion() -> Iterator[None]:
    """A device that runs out of memory all the same, which a step that fits can do beside other programs, is a sentence."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"A device ran out of its {_gib(device_bytes())} of memory ({reason}). What is saved is whole: end other programs on it, or run again "
            f"with a smaller --batch_size and as much larger --gradient_accumulation_steps."
        ) from error


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size < 10 * GIB else f"{size / GIB:.1f} GiB"
