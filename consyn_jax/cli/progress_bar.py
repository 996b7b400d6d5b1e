"""A progress bar for the preparation of data."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any


class Bar:
    """Progress by stages on stderr: a bar on a terminal, otherwise a line every `every_s` seconds.

    It is a context manager and a `Progress` (`data/preparation/preparation_spec`): call it with the
    stage, the bytes done and the total bytes (0 if unknown).

    Args:
        introduce: called once, when the stage after hashing begins. It is not called if the hashes
            show that the store is complete, or that it was made from other data.
        clock: clock in seconds, with any starting point.
    """

    def __init__(
        self,
        introduce: Callable[[], None] = lambda: None,
        *,
        quiet: bool = False,
        every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._introduce, self._introduced = introduce, False
        from consyn_jax.training.logging.console import LastingStream

        self._stream = LastingStream(sys.stderr)
        self._quiet = quiet
        self._every_s, self._clock = every_s, clock
        self._stage = ""
        self._first = (0.0, 0)  # time at which the stage began, and the bytes done before
        self._printed = 0.0
        self._rich: Any = None
        self._task: Any = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report `done` of `total` bytes of a stage."""
        if self._quiet:
            return
        if stage != self._stage:
            self._begin(stage, done, total)
        if self._rich is not None:
            self._rich.update(self._task, completed=done, total=total or None)
        elif self._clock() - self._printed >= self._every_s:
            self._printed = self._clock()
            self._stream.write(self._line(done, total) + "\n")
            self._stream.flush()

    def _begin(self, stage: str, done: int, total: int) -> None:
        if stage != "hash" and not self._introduced:
            self.close()  # two bars on one terminal would overwrite each other
            self._introduced = True
            self._introduce()
        self._stage, self._printed = stage, self._clock()
        self._first = (self._printed, done)
        if not self._stream.isatty():
            return
        if self._rich is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            terminal: Any = self._stream
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            self._rich = Progress(
                *columns,
                console=Console(file=terminal, force_terminal=True),
                transient=True,
            )
            self._rich.start()
        # Start at the bytes done by an earlier start of the command; they must not count as speed.
        self._task = self._rich.add_task(stage, completed=done, total=total or None)

    def _line(self, done: int, total: int) -> str:
        from consyn_jax.data.preparation.corpus_page import size
        from consyn_jax.training.logging.formats import duration

        began, before = self._first
        rate = (done - before) / max(self._printed - began, 1e-3)
        if not total:
            return f"{self._stage}: {size(done)}, {size(rate)}/s"
        left = duration((total - done) / rate if rate > 0 else None)
        return f"{self._stage}: {size(done)} of {size(total)}, {size(rate)}/s, {left} left"

    def close(self) -> None:
        """Remove the bar from the terminal. Safe to call twice."""
        if self._rich is not None:
            self._rich.stop()
            self._rich = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
