"""Format the live line: loss and its trend, speed, and other values if there is room."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from consyn_jax.training.logging.formats import compact

SMOOTHING = 0.95  # decay per step of the moving average: about 20 steps
TREND_STEPS = 100
SLOW_DATA = 0.05  # from this share of time on, the wait for data is shown first
WIDTH = 80  # columns, if the width of the terminal is unknown


class LossTrend:
    """Smooths the loss, and computes its change over the last `TREND_STEPS` steps."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0
        self._newest = math.nan
        self._recent: deque[float] = deque(maxlen=TREND_STEPS + 1)

    def add(self, loss: float) -> None:
        """Add the loss of a step; a non-finite loss does not change the average."""
        self._newest = loss
        if not math.isfinite(loss):
            return
        self._sum = SMOOTHING * self._sum + loss
        self._weight = SMOOTHING * self._weight + 1
        self._recent.append(self._sum / self._weight)

    def text(self) -> str:
        """The smoothed loss, and from ten steps on also its change.

        >>> trend = LossTrend()
        >>> for loss in (3.0, 2.0): trend.add(loss)
        >>> trend.text()
        'loss 2.4872'
        """
        if not self._recent or not math.isfinite(self._newest):
            return f"loss {self._newest:.4f}"
        change = self._recent[-1] - self._recent[0]
        trend = f" ({change:+.3f})" if len(self._recent) >= 10 else ""
        return f"loss {self._recent[-1]:.4f}{trend}"


def details(values: Mapping[str, Any]) -> list[str]:
    """Format MFU, the wait for data, and the peak memory; the most important comes first.

    Args:
        values: the newest line of metrics.
    """
    parts = []
    mfu, wait = values.get("throughput/mfu"), values.get("throughput/data_wait_fraction")
    memory = values.get("memory/peak_bytes")
    if mfu is not None:
        parts.append(f"MFU {mfu:.0%}")
    if wait is not None:
        parts.insert(0 if wait >= SLOW_DATA else len(parts), f"data wait {wait:.0%}")
    if memory is not None:
        parts.append(f"{memory / 2**30:.3g} GiB")
    return parts


def speed(tokens_per_s: float | int) -> str:
    """Format a number of tokens per second.

    >>> speed(12_345)
    '12.3k tokens/s'
    """
    return f"{compact(tokens_per_s)} tokens/s"


def fitted(first: Sequence[str], optional: Sequence[str], last: str, width: int = WIDTH) -> str:
    """Join parts into one line, with as many optional parts as fit in `width` columns.

    >>> fitted(["step 1/2", "loss 1.0"], ["MFU 41%", "a long detail", "2 GiB"], "left 0:01", 48)
    'step 1/2  loss 1.0  MFU 41%  2 GiB  left 0:01'
    """
    chosen = list(first)
    for part in optional:
        if len("  ".join([*chosen, part, last])) <= width:
            chosen.append(part)
    return "  ".join([*chosen, *([last] if last else [])])


def rows(parts: Sequence[str], width: int) -> list[str]:
    """Join parts into lines of at most `width` columns; lines after the first are indented.

    >>> rows(["step 10", "eval loss 3.2", "perplexity 24.5"], 24)
    ['step 10  eval loss 3.2', '  perplexity 24.5']
    """
    lines = [""]
    for part in parts:
        longer = f"{lines[-1]}  {part}" if lines[-1].strip() else lines[-1] + part
        if len(longer) <= width or not lines[-1].strip():
            lines[-1] = longer
        else:
            lines.append(f"  {part}")
    return lines


def now() -> str:
    """The time of day, as text."""
    return time.strftime("%H:%M:%S")
