"""What do the log, the page and the live line cost a step of haiku, with a line for every step?

The run is the quickstart's, in a pseudo-terminal. Its steps take turns with steps for which nothing
is recorded and drawn (on, off, off, on), and the medians are compared. Independently of them, the
functions that record, draw and write the page are timed inside the process, in processor time of
their thread; that sees less noise. Times of first calls, which import libraries, are left out.

    python benchmarks/logging_cost.py --steps 300 --out benchmarks/results/NAME.json
"""

from __future__ import annotations

import fcntl
import functools
import os
import pty
import statistics
import struct
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any

from harness import parser, report

from consyn_jax.cli import train
from consyn_jax.training.logging.console import Console
from consyn_jax.training.run.live_report import LiveReport
from consyn_jax.training.run.recording import Recorder

WARM_UP = 20  # steps
RECIPE = ["--config", "configs/quickstart.yaml", "--logging_steps", "1"]
Moment = tuple[float, float]  # processor time of the process, wall time


class Turns:
    """Records every other pair of steps, and the time of each step."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}  # processor seconds of each call
        self.steps: dict[bool, list[Moment]] = {True: [], False: []}
        self._step, self._since = 0, (0.0, 0.0)

    @property
    def is_on(self) -> bool:
        return self._step < WARM_UP or self._step % 4 in (0, 3)

    def count(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function that counts a step, where the next turn begins."""

        @functools.wraps(function)
        def counted(recorder: Recorder, *args: Any) -> Any:
            moment = time.process_time(), time.perf_counter()
            if self._step >= WARM_UP:
                took = moment[0] - self._since[0], moment[1] - self._since[1]
                self.steps[self.is_on].append(took)
            self._since, self._step = moment, self._step + 1
            return function(recorder, *args)

        return counted

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which does nothing in a turn without recording."""

        @functools.wraps(function)
        def measured(*args: Any, **options: Any) -> Any:
            if not self.is_on:
                return ""
            began = time.thread_time()
            try:
                return function(*args, **options)
            finally:
                self.spent.setdefault(name, []).append(time.thread_time() - began)

        return measured


def in_a_terminal(run: Callable[[], int]) -> int:
    """Call the function with a terminal of 80 columns as stderr, which nobody reads."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))

    def drain() -> None:
        try:
            while os.read(ours, 1 << 16):
                pass
        except OSError:  # the other side is closed
            return

    reader = threading.Thread(target=drain, daemon=True)
    reader.start()
    os.environ["TERM"] = "xterm-256color"
    with os.fdopen(theirs, "w") as terminal, redirect_stderr(terminal):
        return run()


def measure(tiny: bool = False, steps: int = 300) -> dict[str, Any]:
    """Train, and compare the steps with and without a record."""
    turns = Turns()
    Recorder.count = turns.count(Recorder.count)  # type: ignore[method-assign]
    Recorder.step = turns.timed("recording a step", Recorder.step)  # type: ignore[method-assign]
    Console._render = turns.timed("live line", Console._render)  # type: ignore[method-assign]
    LiveReport._write = turns.timed("page", LiveReport._write)  # type: ignore[method-assign]
    steps = 60 if tiny else steps
    with tempfile.TemporaryDirectory() as output:
        flags = [*RECIPE, "--max_steps", str(steps), "--eval_steps", str(10 * steps)]
        flags += ["--save_steps", str(10 * steps), "--output", f"{output}/run"]
        code = in_a_terminal(lambda: train.main(flags))
    if code:
        sys.exit(f"The run ended with {code}.")
    on, off = turns.steps[True], turns.steps[False]
    rows: list[dict[str, Any]] = [
        {
            "compared": f"steps with a record against steps without, {name}",
            "calls": len(on) + len(off),
            "ms of a step without": 1e3 * statistics.median(x[i] for x in off),
            "share": statistics.median(x[i] for x in on) / statistics.median(x[i] for x in off) - 1,
        }
        for i, name in enumerate(("processor time", "wall time"))
    ]
    step_s = statistics.median(x[1] for x in off)
    rows += [
        {
            "compared": f"{name}, processor time of its thread",
            "calls": len(calls),
            "ms of a call": 1e3 * statistics.median(calls[1:] or calls),
            "share": sum(calls[1:]) / (len(on) * step_s),
        }
        for name, calls in turns.spent.items()
    ]
    together = sum(float(row["share"]) for row in rows[2:])
    rows.append({"compared": "together, of the wall time of a step", "share": together})
    return {"steps": steps, "rows": rows}


def main() -> None:
    """Run the script."""
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=300, help="steps of the run")
    options = arguments.parse_args()
    report(measure(options.tiny, options.steps), options.out)


if __name__ == "__main__":
    main()
