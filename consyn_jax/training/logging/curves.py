"""Curves of a run's metrics: points from `metrics.jsonl`, smoothed, and thinned for drawing."""

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
    """A value at a step, and the tokens and seconds until then."""

    step: int
    tokens: int
    value: float
    time_s: float = 0.0


def curve(metrics: Metrics, key: str) -> list[Point]:
    """The finite values of one key, in order; one above 1e300 counts as infinite.

    Details of events are left out, as they may repeat a value.
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
    """Means over a window around each point: a twentieth of the curve, less near its beginning.

    The usual moving average of the past would show the steep fall at the beginning much too late.
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
    """Keep the lowest and the highest point of each bucket, so that spikes stay visible."""
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
    """The first of the lowest points."""
    return min(points, key=lambda point: point.value, default=None)


def loss_limits(train: Sequence[Point], evaluation: Sequence[Point]) -> tuple[float, float]:
    """The range of losses to show.

    The first fiftieth of the training losses is left out, as its fall would flatten the rest.
    """
    shown = [point.value for point in [*train[len(train) // 50 :], *evaluation]]
    if not shown:
        return 0.0, 1.0
    low, high = min(shown), max(shown)
    margin = 0.05 * (high - low) or max(0.05 * abs(high), 1e-3)
    return low - margin, high + margin
