"""How far the preparation of data is, for whoever waits for it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any


class Bar:
    """Progress by stages on stderr: a bar on a terminal, elsewhere a line every `every_s` seconds. A context manager.

    Calling it is a `Progress` of consyn_jax.data.job: (stage, bytes done, bytes to do; 0 where nobody knows).

    Args:
        introduce: called once, when reading begins: until the data are hashed, a store that is another one or complete may turn up.
        clock: seconds, from any beginning.
    """

    def __init__(
        self, introduce: Callable[[], None] = lambda: None, *, quiet: bool = False, every_s: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._introduce, self._introduced = introduce, False
        self._quiet = quiet
        self._every_s, self._clock = every_s, clock
        self._stage = ""
        self._first = (0.0, 0)  # when this stage began here, and the bytes that had been done before
        self._told = 0.0
        self._rich: Any = None
        self._task: Any = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._quiet:
            return
        if stage != self._stage:
            self._begin(stage, done, total)
        if self._rich is not None:
            self._rich.update(self._task, completed=done, total=total or None)
        elif self._clock() - self._told >= self._every_s:
            self._told = self._clock()
            print(self._line(done, total), file=sys.stderr, flush=True)

    def _begin(self, stage: str, done: int, total: int) -> None:
        if stage != "hash" and not self._introduced:
            self.close()  # two that draw on one terminal draw over each other
            self._introduced = True
            self._introduce()
        self._stage, self._told = stage, self._clock()
        self._first = (self._told, done)
        if not sys.stderr.isatty():
            return
        if self._rich is None:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._rich = Progress(*columns, console=Console(stderr=True), transient=True)
            self._rich.start()
        # What an earlier start of the command did is where the bar begins, and no part of the speed.
        self._task = self._rich.add_task(stage, completed=done, total=total or None)

    def _line(self, done: int, total: int) -> str:
        from consyn_jax.data.report_page import size
        from consyn_jax.training.console import duration

        began, before = self._first
        rate = (done - before) / max(self._told - began, 1e-3)
        end = f" of {size(total)}, {size(rate)}/s, {duration((total - done) / rate if rate > 0 else None)} left" if total else f", {size(rate)}/s"
        return f"{self._stage}: {size(done)}{end}"

    def close(self) -> None:
        """Give the terminal back. Safe to call twice."""
        if self._rich is not None:
            self._rich.stop()
            self._rich = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
