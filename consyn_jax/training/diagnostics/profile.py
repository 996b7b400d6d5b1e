"""`--profile_steps A:B`: trace the steps from A to B, and summarise the trace on one page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData, StepTraceAnnotation, TraceAnnotation

from consyn_jax.distributed.hardware import bf16_peak, described_gpu
from consyn_jax.errors import UserError
from consyn_jax.files import write_whole
from consyn_jax.training.diagnostics.operation_costs import operation_costs
from consyn_jax.training.diagnostics.trace import (
    COLLECTIVES,
    STEP,
    Least,
    Summary,
    scopes_of,
    summarise,
)
from consyn_jax.training.runtime.watchdog import WAITING
from consyn_jax.training.step import Batch
from consyn_jax.validation import parse_profile_steps

SUMMARY = "summary.txt"


def check_profile(steps: str | None, total_steps: int) -> None:
    """Check that the first step of `--profile_steps` is not after the end of the run.

    Raises:
        UserError: The profile would begin after the end of the run.
    """
    traced = parse_profile_steps(steps)
    if traced is not None and traced[0] > total_steps:
        raise UserError(
            f"--profile_steps {traced[0]}:{traced[1]} begins after the end of the run, which has "
            f"{total_steps:,} steps. Choose steps up to {total_steps}."
        )


@dataclass(frozen=True)
class CompiledStep:
    """The compiled train step that is traced.

    Attributes:
        text: Function that returns the text of the compiled program.
        flops: FLOPs that the model needs per step on one device.
        device_kind: JAX's name of the device, whose rates are looked up.
    """

    text: Callable[[], str]
    flops: float
    device_kind: str


def page(summary: Summary, program: CompiledStep, steps: tuple[int, int]) -> str:
    """Compose the content of `summary.txt`."""
    first, last = steps
    step_s, idle = summary.total_s / summary.steps, sum(summary.idle.values())
    achieved = program.flops / step_s
    possible = "the peak of this device is unknown"
    if (peak := bf16_peak(program.device_kind)) is not None:
        possible = (
            f"{achieved / peak:.1%} of the device's peak of {peak / 1e12:,.0f} TFLOP/s in bf16"
        )
    together = sum(summary.parts.values())
    lines = [
        f"Steps {first:,} to {last:,} on {summary.device}, {step_s * 1e3:,.1f} ms each.",
        "",
        f"  busy       {summary.busy_s / summary.total_s:6.1%}",
        f"  idle       {idle / summary.total_s:6.1%}  {_idle(summary)}",
        f"  achieved   {achieved / 1e12:,.3g} TFLOP/s: {possible}",
        "",
        "Busy time by part of the model:",
        *(
            f"  {part:<12}{_share(spent, together, summary.steps)} per step"
            f"{_hidden_or_least(summary, part, spent)}"
            for part, spent in summary.parts.items()
        ),
        *_what_would_help(summary),
        "",
        f"The {len(summary.largest)} largest kernels:",
        *(
            f"  {_share(each.total_s, together, summary.steps)} in "
            f"{each.times / summary.steps:,.0f} per step{_least(each.least, summary.steps)}"
            f"  {each.name} ({each.part})"
            for each in summary.largest
        ),
    ]
    return "\n".join(lines) + "\n"


def _share(spent: float, together: float, steps: int) -> str:
    return f"{spent / together:6.1%}  {spent / steps * 1e3:10,.2f} ms"


def _hidden_or_least(summary: Summary, part: str, spent: float) -> str:
    """Describe the lower bound of a part's time on this device; "" if the bound is unknown.

    Collectives have no bound. For them, the text is the share that overlaps other operations.
    """
    if part == COLLECTIVES and summary.hidden_share is not None:
        return f"; {summary.hidden_share:.0%} of it overlaps other operations"
    return _least(summary.least.get(part), summary.steps) if spent else ""


def _least(least: Least | None, steps: int) -> str:
    if least is None:
        return ""
    bound = "compute" if least.compute_s > least.memory_s else "memory"
    return f"; at least {least.total_s / steps * 1e3:,.2f} ms, bound by {bound}"


def _what_would_help(summary: Summary) -> list[str]:
    """Name the part whose time exceeds its lower bound the most, and the cause.

    The list is empty if no lower bound is known.
    """
    above = {
        part: spent - summary.least[part].total_s
        for part, spent in summary.parts.items()
        if part in summary.least
    }
    if not above:
        return []
    part = max(above, key=lambda name: above[name])
    least, each = summary.least[part], above[part] / summary.steps * 1e3
    cause = (
        "its matmuls run below the device's peak rate"
        if least.compute_s > least.memory_s
        else "its kernels read and write more slowly than the device's memory allows"
    )
    return [f"{part} loses the most time: {each:,.2f} ms per step, because {cause}."]


def _idle(summary: Summary) -> str:
    causes = ", ".join(
        f"{cause} {spent / summary.total_s:.1%}"
        for cause, spent in summary.idle.items()
        if spent >= 5e-4 * summary.total_s
    )
    return f"({causes})" if causes else ""


class Profile:
    """Traces the requested steps, and writes a summary page at the end.

    Failures are reported by `warn`, and do not end the run.

    Args:
        steps: First and last step, counted from 1; None for no trace.
        directory: Directory for the trace and the page.
        tell: Function for messages about the result.
        warn: Function for warnings about failures.

    Attributes:
        program: The compiled train step; must be set before the trace ends.
    """

    def __init__(
        self,
        steps: tuple[int, int] | None,
        directory: Path,
        tell: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self._wanted, self._directory, self._tell, self._warn = steps, directory, tell, warn
        self.program: CompiledStep | None = None
        self._traced: list[int] = []
        self._is_tracing = False
        self._last: Any = None

    def step(self, number: int, before: Any) -> AbstractContextManager[Any]:
        """Return a context manager for the dispatch of step `number`.

        It traces the step if the user requested this step.

        Args:
            before: State before the step. The trace begins when this state has been computed.
        """
        if self._wanted is None or not self._wanted[0] <= number <= self._wanted[1]:
            return nullcontext()
        if not self._is_tracing:
            jax.block_until_ready(before)  # keep earlier steps out of the trace
            self._guard(self._start)
        if not self._is_tracing:
            return nullcontext()
        self._traced.append(number)
        return StepTraceAnnotation(STEP, step_num=number)

    def ended(self, number: int, after: Any) -> None:
        """Stop the trace if `number` is its last step; call this after the dispatch of every step.

        Args:
            after: Results of the step. The trace stops when the results have been computed.
        """
        if self._is_tracing and self._wanted is not None:
            self._last = after
            if number >= self._wanted[1]:
                self._guard(self._stop)

    def close(self) -> None:
        """Stop a running trace, and write the page."""
        if self._is_tracing:
            self._guard(self._stop)
        if self._wanted is not None and self._traced:
            self._guard(self._summarise)
        elif self._wanted is not None:
            first, last = self._wanted
            self._tell(
                f"No step of --profile_steps {first}:{last} was run, so there is no profile."
            )
        self._wanted = None

    def _start(self) -> None:
        options: Any = jax.profiler.ProfileOptions()
        # Tracing every call of a function would make the trace large and the step slow.
        options.python_tracer_level = 0
        self._directory.mkdir(parents=True, exist_ok=True)
        jax.profiler.start_trace(self._directory, profiler_options=options)
        self._is_tracing = True

    def _stop(self) -> None:
        self._is_tracing = False
        try:
            jax.block_until_ready(self._last)
        finally:
            jax.profiler.stop_trace()

    def _summarise(self) -> None:
        assert self.program is not None
        newest = max(self._directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        text, gpu = self.program.text(), described_gpu(self.program.device_kind)
        trace = ProfileData.from_file(str(newest))
        summary = summarise(trace, scopes_of(text), operation_costs(text), gpu)
        text = page(summary, self.program, (self._traced[0], self._traced[-1]))
        write_whole(self._directory / SUMMARY, text)
        together = sum(summary.parts.values())
        shares = ", ".join(
            f"{part} {spent / together:.0%}" for part, spent in summary.parts.items()
        )
        idle = _idle(summary).replace("(", "(idle: ")
        self._tell(text.splitlines()[0])
        self._tell(f"Busy {summary.busy_s / summary.total_s:.0%} {idle}. Busy time: {shares}.")
        self._tell(f"The summary is {self._directory / SUMMARY}; the trace is in the same folder.")

    def _guard(self, do: Callable[[], None]) -> None:
        try:
            do()
        # Profilers, drivers and disks may raise any error, and no such error may end a run.
        except Exception as error:  # noqa: BLE001
            self._wanted = None
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            self._warn(f"Profiling failed; the run continues. {reason}")


def activity(name: str) -> TraceAnnotation:
    """Return a context manager that names the host's activity in a trace.

    It costs a microsecond.
    """
    return TraceAnnotation(name)


def trace_waits(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield `batches`, and record the time of waiting for each batch in the trace."""
    while True:
        with activity(WAITING):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch
