"""Read curves from the metrics of a run, smooth them, and thin them for drawing."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from consyn_jax.training.logging.metrics import LARGEST_NUMBER

Metrics = Sequence[Mapping[str, Any]]  # lines of `metrics.jsonl`


@dataclass(frozen=True)
class Point:
    """A value at a step, with the tokens and seconds from the run's start to this step."""

    step: int
    tokens: int
    value: float
    time_s: float = 0.0


def curve(metrics: Metrics, key: str) -> list[Point]:
    """The finite values of a metric, in order; values above 1e300 count as infinite.

    Events are left out, because they may repeat a value.
    """
    lines = (
        line
        for line in metrics
        if "event" not in line
        and isinstance(line.get(key), (int, float))
        and abs(line[key]) < LARGEST_NUMBER
    )
    return [
        Point(line["step"], line["tokens"], float(line[key]), float(line["time_s"]))
        for line in lines
    ]


def smooth(points: Sequence[Point]) -> list[Point]:
    """Smooth a curve by a centred moving average.

    The window is a twentieth of the curve, and smaller near the beginning. An average of past
    values alone would show the steep fall at the beginning much too late.
    """
    sums = [0.0, *itertools.accumulate(point.value for point in points)]
    half = max(1, len(points) // 40)
    smoothed = []
    for i, point in enumerate(points):
        reach = min(half, i // 2)
        first, end = i - reach, min(i + reach + 1, len(points))
        smoothed.append(dataclasses.replace(point, value=(sums[end] - sums[first]) / (end - first)))
    return smoothed


def thin(points: Sequence[Point], buckets: int = 300) -> list[Point]:
    """Thin a curve to the lowest and the highest point of each bucket; spikes stay visible.

    Args:
        buckets: number of groups of consecutive points.
    """
    if len(points) <= 2 * buckets:
        return list(points)
    size = math.ceil(len(points) / buckets)
    kept = []
    for start in range(0, len(points), size):
        bucket = range(start, min(start + size, len(points)))
        lowest = min(bucket, key=lambda i: points[i].value)
        highest = max(bucket, key=lambda i: points[i].value)
        kept += [points[i] for i in sorted({lowest, highest})]
    return kept


def best(points: Sequence[Point]) -> Point | None:
    """The lowest point, the first one if there are several; None if there is no point."""
    return min(points, key=lambda point: point.value, default=None)


def loss_limits(train: Sequence[Point], evaluation: Sequence[Point]) -> tuple[float, float]:
    """The range of losses to show.

    The first fiftieth of the training losses is ignored, because its steep fall would compress the
    rest of the curve.
    """
    shown = [point.value for point in [*train[len(train) // 50 :], *evaluation]]
    if not shown:
        return 0.0, 1.0
    low, high = min(shown), max(shown)
    margin = 0.05 * (high - low) or max(0.05 * abs(high), 1e-3)
    return low - margin, high + margin
