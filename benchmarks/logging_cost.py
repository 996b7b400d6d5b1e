"""Measure how much of a run's time its log, its page and its live line take.

    python benchmarks/logging_cost.py --model haiku --data sample --max_steps 200 --logging_steps 1

The flags are those of consyn-train. The functions that record a step, draw the live line and write
the page are timed inside the process, in processor time of their thread, and compared with the time
of the steps: the wall time between the first and the last step without evaluations and saves.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from consyn_jax.cli import train
from consyn_jax.training.logging.console import Console
from consyn_jax.training.run.live_report import LiveReport
from consyn_jax.training.run.recording import Recorder

spent: dict[str, list[tuple[float, float]]] = {}


def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose processor and wall time is added up; calls inside others count once."""

    @functools.wraps(function)
    def measured(*args: Any, **options: Any) -> Any:
        began = time.thread_time(), time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            took = time.thread_time() - began[0], time.perf_counter() - began[1]
            spent.setdefault(name, []).append(took)

    return measured


def main() -> int:
    """Train with timers."""
    records: list[Recorder] = []
    begin = Recorder.__init__

    def keep(self: Recorder, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        records.append(self)

    Recorder.__init__ = keep  # type: ignore[method-assign]
    Recorder.step = timed("recording a step", Recorder.step)  # type: ignore[method-assign]
    Recorder.count = timed("counting a step", Recorder.count)  # type: ignore[method-assign]
    Console._render = timed("live line", Console._render)  # type: ignore[method-assign]
    LiveReport._write = timed("page", LiveReport._write)  # type: ignore[method-assign]
    code = train.main(sys.argv[1:])
    seconds = records[-1].activities.values()
    steps = seconds["time/compute_s"] + seconds["time/data_s"]
    print(f"steps: {steps:.2f} s; all activities: {sum(seconds.values()):.2f} s")
    together = 0.0
    for name, calls in spent.items():
        (first, _), cpu = calls[0], [call[0] for call in calls[1:] or calls]
        wall = statistics.median(call[1] for call in calls)
        together += sum(cpu)
        print(
            f"{name}: {len(calls)} calls, {1e3 * statistics.median(cpu):.3f} ms of processor "
            f"(the first {1e3 * first:.1f}), {1e3 * wall:.3f} ms of wall time; without the first "
            f"{sum(cpu) / steps:.3%} of the steps' time"
        )
    print(f"together, without first calls, which import libraries: {together / steps:.3%}")
    return code


if __name__ == "__main__":
    sys.exit(main())
