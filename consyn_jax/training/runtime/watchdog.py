"""End a run that makes no progress, and name the process for which the others wait."""

from __future__ import annotations

import faulthandler
import json
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from consyn_jax.distributed.process_group import CONTINUE_ADVICE, LOST, ProcessGroup
from consyn_jax.errors import advised
from consyn_jax.files import open_regular, write_whole

STEP_TIMES = 20  # allowed time without progress, in median step times
SLOW_FACTOR = 6  # compiling, saving and exporting may take this many times longer
POLL_S = 5.0
STEPPING, WAITING, EVALUATING, SAVING, COMPILING, FINISHING = (
    "stepping",
    "waiting for data",
    "evaluating",
    "saving",
    "compiling",
    "finishing",
)
QUICK_PHASES = (STEPPING, WAITING, EVALUATING)


class Watchdog:
    """A thread that checks whether the run makes progress.

    If there is no progress for too long, every process writes the stack traces of all its threads
    to `stacks/` in the run directory, and exits with code `LOST`. Time in which the process or the
    computer was suspended does not count.

    Args:
        directory: The run directory.
        minutes: Minimum time without progress, in minutes, before the run is ended; 0 to never end
            it.
        process_group: The processes of this run; None if there is only one.
        beat: Function that is called every few seconds.

    Attributes:
        entered: Function that is called with the name of every phase that the run enters.
    """

    entered: Callable[[str], None]

    def __init__(
        self,
        directory: Path,
        minutes: float,
        process_group: ProcessGroup | None = None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self._directory, self._minutes, self._beat = directory / "stacks", minutes, beat
        self.entered = lambda phase: None
        self._process_group = process_group
        self._rank = 0 if process_group is None else process_group.process_id
        self._phase, self._step, self._moves, self._still_s = "beginning", 0, 0, 0.0
        self._step_times_s: deque[float] = deque(maxlen=101)
        self._stepped_at: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if process_group is not None:
            process_group.describe, process_group.before_end = self._compare, self._before_end
        self._thread.start()

    def at(self, phase: str, step: int) -> None:
        """Record progress: the run has entered a phase of a step."""
        self._phase, self._step = phase, step
        self.entered(phase)
        if phase == STEPPING:
            now = time.monotonic()
            if self._stepped_at is not None:
                self._step_times_s.append(now - self._stepped_at)
            self._stepped_at = now
        self.moved()

    def moved(self) -> None:
        """Record progress within the current phase."""
        self._moves += 1
        if self._process_group is not None:
            self._process_group.progress = {"phase": self._phase, "step": self._step}

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def limit_s(self) -> float:
        """Seconds that the run may currently spend without progress."""
        least = max(60 * self._minutes, STEP_TIMES * self._median_s)
        is_quick = self._phase in QUICK_PHASES and len(self._step_times_s) > 1
        return least if is_quick else SLOW_FACTOR * least

    @property
    def _median_s(self) -> float:
        return statistics.median(list(self._step_times_s)) if self._step_times_s else 0.0

    def _watch(self) -> None:
        poll_s = min(POLL_S, 6 * self._minutes or POLL_S)
        seen, last = -1, time.monotonic()
        while not self._stop.wait(poll_s):
            now = time.monotonic()
            self._still_s = (
                0.0 if seen != self._moves else self._still_s + min(now - last, 2 * poll_s)
            )
            seen, last = self._moves, now
            self._beat()
            if self._minutes and self._still_s > self.limit_s:
                self._end()

    def _end(self) -> None:
        if self._process_group is not None:
            self._process_group.stuck()
        self._write_stacks()
        sys.stdout.flush()
        where = f"the run is {self._phase} at step {self._step:,}"
        text = advised(f"consyn-train: {self._sentence()}: {where}. {self._hint()}")
        os.write(2, f"\n{text}\n".encode())
        os._exit(LOST)

    def _sentence(self) -> str:
        usual = f" (a step takes {self._median_s:.3g} s)" if self._step_times_s else ""
        return f"No progress for {self._still_s:.0f} s{usual}"

    def _hint(self) -> str:
        return f"The stack traces are in {self._directory}. {CONTINUE_ADVICE}"

    def _compare(self, everyone: list[dict[str, Any]]) -> str:
        """Describe the processes that all others wait for; called in process 0."""
        assert self._process_group is not None
        late = stragglers(everyone)
        if len(late) == len(everyone):
            return f"{self._sentence()}: all processes are {_place(everyone[0])}. {self._hint()}"
        named = "; ".join(
            f"{self._process_group.names[number]}, {_place(everyone[number])}"
            for number in late[:3]
        )
        ahead = next(each for number, each in enumerate(everyone) if number not in late)
        return (
            f"{self._sentence()}. The run waits for {named}. The others are {_place(ahead)}. "
            f"{self._hint()}"
        )

    def _before_end(self, stuck: bool) -> None:
        if stuck:
            self._write_stacks()

    def _write_stacks(self) -> None:
        about = {
            "process": self._rank,
            "pid": os.getpid(),
            "phase": self._phase,
            "step": self._step,
            "still_s": self._still_s,
            "median_step_s": self._median_s,
        }
        with suppress(OSError):  # the message on stderr must appear even if the disk is full
            self._directory.mkdir(parents=True, exist_ok=True)
            write_whole(self._directory / f"rank-{self._rank}.json", json.dumps(about) + "\n")
            stacks = self._directory / f"rank-{self._rank}.txt"
            with open(stacks, "w", opener=open_regular) as file:
                faulthandler.dump_traceback(file, all_threads=True)


def _place(progress: dict[str, Any]) -> str:
    return f"{progress.get('phase', 'beginning')} at step {progress.get('step', 0):,}"


def stragglers(everyone: list[dict[str, Any]]) -> list[int]:
    """Find the processes for which the others wait.

    These are the processes at the earliest step. A process in the phase "stepping" only waits for
    its devices, so it is left out if another process at the same step is in another phase.

    >>> stragglers([{"step": 7, "phase": "stepping"}, {"step": 6, "phase": "stepping"}])
    [1]
    >>> stragglers([{"step": 7, "phase": "stepping"}, {"step": 7, "phase": "waiting for data"}])
    [1]
    """
    first = min(each.get("step", 0) for each in everyone)
    late = [number for number, each in enumerate(everyone) if each.get("step", 0) == first]
    busy = [number for number in late if everyone[number].get("phase") != STEPPING]
    return busy or late
