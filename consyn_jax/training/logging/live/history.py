"""The history of a run's metrics in bounded memory, from which `report.html` is made.

It is updated during the run, and read from `metrics.jsonl` when the run resumes. Its size is
bounded, so making the page takes milliseconds even after many steps.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from consyn_jax.training.logging.curves import Point
from consyn_jax.training.logging.live.activities import ACTIVITIES, key

MOST_BUCKETS = 1500  # per curve; a bucket stores its lowest and its highest point
MOST_MOMENTS = 240  # points in time for which the time by activity is stored
MOST_EVENTS = 2000  # the newest events are kept
SPREAD = (  # metrics whose median and range are shown
    "throughput/tokens_per_s",
    "throughput/step_time_s",
    "throughput/mfu",
    "throughput/data_wait_fraction",
    "memory/peak_bytes",
)
CURVES = ("train/loss", "train/learning_rate", "train/grad_norm", *SPREAD)


class BoundedCurve:
    """A curve stored as the lowest and the highest point of each bucket of consecutive points.

    All buckets have the same number of points. When there are too many buckets, neighbours are
    merged in pairs. Spikes stay visible, because they are the highest points of their buckets.

    Attributes:
        size: number of points in a bucket; 1 as long as every point is stored.
        count: number of points added.
        last: the newest point.
    """

    def __init__(self, most: int = MOST_BUCKETS) -> None:
        self._most, self.size, self.count = most, 1, 0
        self._pairs: list[tuple[Point, Point]] = []
        self._sums: list[tuple[float, int]] = []
        self.last: Point | None = None

    def add(self, point: Point) -> None:
        """Add the next point."""
        self.last, self.count = point, self.count + 1
        if self._sums and self._sums[-1][1] < self.size:
            self._join(len(self._sums) - 1, (point, point), (point.value, 1))
            return
        if len(self._sums) == self._most:
            self._halve()
        self._pairs.append((point, point))
        self._sums.append((point.value, 1))

    def _join(self, at: int, pair: tuple[Point, Point], total: tuple[float, int]) -> None:
        (low, high), (value, count) = self._pairs[at], self._sums[at]
        low = pair[0] if pair[0].value < low.value else low
        high = pair[1] if pair[1].value > high.value else high
        self._pairs[at], self._sums[at] = (low, high), (value + total[0], count + total[1])

    def _halve(self) -> None:
        pairs, sums = self._pairs, self._sums
        self._pairs, self._sums = pairs[::2], sums[::2]
        for i, (pair, total) in enumerate(zip(pairs[1::2], sums[1::2], strict=True)):
            self._join(i, pair, total)
        self.size *= 2

    def points(self) -> list[Point]:
        """The lowest and the highest point of each bucket, in order."""
        found = []
        for low, high in self._pairs:
            first, second = (low, high) if low.step <= high.step else (high, low)
            found += [first] if first is second else [first, second]
        return found

    def smooth(self) -> list[Point]:
        """A centred moving average of the curve, with one point per bucket.

        The window is a twentieth of the curve, and smaller near the beginning.
        """
        sums, counts = [0.0], [0]
        for value, count in self._sums:
            sums.append(sums[-1] + value)
            counts.append(counts[-1] + count)
        half, total, means = max(1, len(self._sums) // 40), len(self._sums), []
        for i, (low, high) in enumerate(self._pairs):
            reach = min(half, i // 2)
            first, end = i - reach, min(i + reach + 1, total)
            mean = (sums[end] - sums[first]) / (counts[end] - counts[first])
            place = high if high.step > low.step else low
            means.append(Point(place.step, place.tokens, mean, place.time_s))
        return means


class History:
    """The content of `metrics.jsonl`, reduced to what the page of a run shows.

    Attributes:
        curves: curve of each metric, including all `eval/` metrics.
        values: all values of the metrics whose median is shown.
        events: the newest events.
        num_events: number of all events.
        moments: points in time, each with the seconds spent on each activity until then.
        last: the newest line.
        at_best: line of the evaluation with the lowest loss; None before the first evaluation.
    """

    def __init__(self, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        self.curves: dict[str, BoundedCurve] = {}
        self.values = {name: array("d") for name in SPREAD}
        self.events: list[Mapping[str, Any]] = []
        self.num_events = 0
        self.moments: list[tuple[Point, tuple[float, ...]]] = []
        self.last: Mapping[str, Any] = {"step": 0, "tokens": 0, "time_s": 0.0}
        self.at_best: Mapping[str, Any] | None = None
        self._stride = self._skipped = 0
        for line in lines:
            self.add(line)

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a line returned by `MetricsLog.write`; non-finite values are left out."""
        self.last = line
        if "event" in line:
            self.num_events += 1
            self.events.append(line)
            if len(self.events) > 2 * MOST_EVENTS:
                del self.events[:MOST_EVENTS]
            return
        step, tokens, time_s = line["step"], line["tokens"], float(line["time_s"])
        for name in [*CURVES, *(name for name in line if name.startswith("eval/"))]:
            value = line.get(name)
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                continue
            curve = self.curves.setdefault(name, BoundedCurve())
            curve.add(Point(step, tokens, float(value), time_s))
            if name in self.values:
                self.values[name].append(value)
        loss = line.get("eval/loss")
        lowest = math.inf if self.at_best is None else self.at_best["eval/loss"]
        if isinstance(loss, (int, float)) and loss < lowest:
            self.at_best = line
        self._add_moment(line)

    def _add_moment(self, line: Mapping[str, Any]) -> None:
        """Store the line's time by activity; `_stride` lines are skipped after each stored line."""
        if key(ACTIVITIES[0]) not in line:
            return
        if self._skipped:
            self._skipped -= 1
            return
        if len(self.moments) == MOST_MOMENTS:
            self.moments = self.moments[::2]
            self._stride = 2 * self._stride + 1
        self._skipped = self._stride
        place = Point(line["step"], line["tokens"], 0.0, float(line["time_s"]))
        self.moments.append((place, tuple(line.get(key(name), 0.0) for name in ACTIVITIES)))

    def points(self, name: str) -> list[Point]:
        """The stored points of a metric; an empty list if it was not logged."""
        return self.curves[name].points() if name in self.curves else []

    @property
    def is_thinned(self) -> bool:
        """Whether any curve has points that are not stored."""
        return any(curve.size > 1 for curve in self.curves.values())


def earlier_activities(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Compute the seconds spent on each activity in a whole log, for `ActivityClock.begin`.

    Lines of training metrics have the seconds spent on each activity so far. The time after the
    last such line counts as evaluation if the log has an evaluation at the same step, and otherwise
    as saving. Older logs have no seconds by activity; all of their time counts as `other`.
    """
    time_s = max((line["time_s"] for line in lines), default=0.0)
    told = next((line for line in reversed(lines) if key(ACTIVITIES[0]) in line), None)
    if told is None:
        return {"other": time_s}
    seconds = {name: float(told.get(key(name), 0.0)) for name in ACTIVITIES}
    after = [line for line in lines if line["step"] == told["step"] and "eval/loss" in line]
    rest = time_s - sum(seconds.values())
    seconds["evaluation" if after else "saving"] += max(0.0, rest)
    return seconds
