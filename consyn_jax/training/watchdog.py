"""A run that no longer moves ends, says where it stands, and names the process that is behind."""

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

from consyn_jax.distributed.peers import AGAIN, LOST, Peers

STEPS = 20  # as many times the median step may pass without one
PATIENCE = 6  # what is compiled, saved or exported may take so many times longer
POLL_S = 5.0
STEPPING, WAITING, EVALUATING, SAVING, COMPILING, FINISHING = "stepping", "waiting for data", "evaluating", "saving", "compiling", "finishing"
BRISK = (STEPPING, WAITING, EVALUATING)


class Watchdog:
    """Looks, from a thread of its own, whether the run moves.

    When it has not for too long, the stacks of all threads of every process are in `stacks/` of the run directory, and each process ends
    with `LOST`. Time in which this process was stopped itself, or its computer slept, does not count.

    Args:
        directory: of the run.
        minutes: that must pass at least; 0 to look on for ever.
        peers: the processes of this run, where it has several.
        beat: called every few seconds.
    """

    def __init__(self, directory: Path, minutes: float, peers: Peers | None = None, beat: Callable[[], None] = lambda: None) -> None:
        self._directory, self._minutes, self._peers, self._beat = directory / "stacks", minutes, peers, beat
        self._rank = 0 if peers is None else peers.process_id
        self._phase, self._step, self._moves, self._still_s = "beginning", 0, 0, 0.0
        self._steps_s: deque[float] = deque(maxlen=101)
        self._stepped_at: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)
        if peers is not None:
            peers.describe, peers.before_end = self._compare, self._before_end
        self._thread.start()

    def at(self, phase: str, step: int) -> None:
        """The run has come this far.

        Args:
            phase: what it does now.
            step: in which it does it.
        """
        self._phase, self._step = phase, step
        if phase == STEPPING:
            now = time.monotonic()
            if self._stepped_at is not None:
                self._steps_s.append(now - self._stepped_at)
            self._stepped_at = now
        self.moved()

    def moved(self) -> None:
        """Still in the same phase, but further."""
        self._moves += 1
        if self._peers is not None:
            self._peers.progress = {"phase": self._phase, "step": self._step}

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def limit_s(self) -> float:
        """How long nothing may move here."""
        least = max(60 * self._minutes, STEPS * self._median_s)
        return least if self._phase in BRISK and len(self._steps_s) > 1 else PATIENCE * least

    @property
    def _median_s(self) -> float:
        return statistics.median(list(self._steps_s)) if self._steps_s else 0.0

    def _look(self) -> None:
        poll_s = min(POLL_S, 6 * self._minutes or POLL_S)
        seen, last = -1, time.monotonic()
        while not self._stop.wait(poll_s):
            now = time.monotonic()
            self._still_s = 0.0 if seen != self._moves else self._still_s + min(now - last, 2 * poll_s)
            seen, last = self._moves, now
            self._beat()
            if self._minutes and self._still_s > self.limit_s:
                self._end()

    def _end(self) -> None:
        if self._peers is not None:
            self._peers.stuck()
        self._write_stacks()
        sys.stdout.flush()
        os.write(2, f"\nconsyn-train: {self._sentence()}: the run is {self._phase} at step {self._step:,}. {self._hint()}\n".encode())
        os._exit(LOST)

    def _sentence(self) -> str:
        usual = f", where a step takes {self._median_s:.3g} s" if self._steps_s else ""
        return f"Nothing has moved for {self._still_s:.0f} s{usual}"

    def _hint(self) -> str:
        return f"The stacks are in {self._directory}. {AGAIN}"

    def _compare(self, everyone: list[dict[str, Any]]) -> str:
        """Who is behind, for all to read. Process 0 is asked."""
        assert self._peers is not None
        late = behind(everyone)
        if len(late) == len(everyone):
            return f"{self._sentence()}: all processes are {_place(everyone[0])}. {self._hint()}"
        named = "; ".join(f"{self._peers.names[number]}, {_place(everyone[number])}" for number in late[:3])
        ahead = next(each for number, each in enumerate(everyone) if number not in late)
        return f"{self._sentence()}. Behind is {named}, and others are {_place(ahead)}. {self._hint()}"

    def _before_end(self, stuck: bool) -> None:
        if stuck:
            self._write_stacks()

    def _write_stacks(self) -> None:
        about = {"process": self._rank, "pid": os.getpid(), "phase": self._phase, "step": self._step, "still_s": self._still_s, "median_step_s": self._median_s}
        with suppress(OSError):  # no place to write to; the sentence on stderr is left
            self._directory.mkdir(parents=True, exist_ok=True)
            (self._directory / f"rank-{self._rank}.json").write_text(json.dumps(about) + "\n")
            with (self._directory / f"rank-{self._rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)


def _place(progress: dict[str, Any]) -> str:
    return f"{progress.get('phase', 'beginning')} at step {progress.get('step', 0):,}"


def behind(everyone: list[dict[str, Any]]) -> list[int]:
    """Which processes the others wait for: those at the earliest step, and of these, if some wait for the devices, the ones that do not.

    >>> behind([{"step": 7, "phase": "stepping"}, {"step": 6, "phase": "stepping"}, {"step": 7, "phase": "waiting for data"}])
    [1]
    >>> behind([{"step": 7, "phase": "stepping"}, {"step": 7, "phase": "waiting for data"}])
    [1]
    """
    first = min(each.get("step", 0) for each in everyone)
    late = [number for number, each in enumerate(everyone) if each.get("step", 0) == first]
    busy = [number for number in late if everyone[number].get("phase") != STEPPING]
    return busy or late
