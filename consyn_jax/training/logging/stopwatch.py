"""Measure the throughput of training between two lines of metrics."""

from __future__ import annotations

import time
from typing import NamedTuple


class Lap(NamedTuple):
    """Throughput since the previous lap.

    Attributes:
        data_wait_fraction: share of the time spent waiting for data.
        mfu: model FLOP/s as a share of the device's peak; None if the peak is unknown.
    """

    step_time_s: float
    tokens_per_s: float
    data_wait_fraction: float
    mfu: float | None


class Stopwatch:
    """Counts steps, tokens and time since the last lap, without pauses.

    Args:
        step_flops: FLOPs that the model needs for one step on one device.
        peak_flops: peak FLOP/s of a device; None if unknown.
    """

    def __init__(self, step_flops: float = 0.0, peak_flops: float | None = None) -> None:
        self._step_flops, self._peak_flops = step_flops, peak_flops
        self._steps = self._tokens = 0
        self._began, self._waited_s = time.perf_counter(), 0.0

    def count(self, tokens: int) -> None:
        """Count one step with this many tokens."""
        self._steps += 1
        self._tokens += tokens

    def lap(self, waited_s: float) -> Lap:
        """End the lap, and return its throughput.

        Args:
            waited_s: seconds spent waiting for data in all laps so far.
        """
        now = time.perf_counter()
        elapsed = max(now - self._began, 1e-9)
        step_time_s = elapsed / max(self._steps, 1)
        mfu = self._peak_flops and self._step_flops / (step_time_s * self._peak_flops)
        waiting = min(1.0, (waited_s - self._waited_s) / elapsed)
        lap = Lap(step_time_s, self._tokens / elapsed, waiting, mfu)
        self._steps = self._tokens = 0
        self._began, self._waited_s = now, waited_s
        return lap

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second since the last lap."""
        return self._tokens / max(time.perf_counter() - self._began, 1e-9)

    def pause(self, seconds: float) -> None:
        """Leave these seconds out of the current lap."""
        self._began += seconds
