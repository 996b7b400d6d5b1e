import itertools
import math
import random
from typing import Any

import pytest
from logged_runs import run

from consyn_jax.training.logging.curves import Point, curve, smooth
from consyn_jax.training.logging.live.activities import ACTIVITIES, ActivityClock, key
from consyn_jax.training.logging.live.history import (
    MOST_MOMENTS,
    BoundedCurve,
    History,
    earlier_activities,
)
from consyn_jax.training.runtime.watchdog import COMPILING, EVALUATING, FINISHING, STEPPING, WAITING


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_a_bounded_curve_keeps_extremes_and_means(count: int) -> None:
    draw = random.Random(count)
    points = [Point(i, 10 * i, draw.random(), 0.5 * i) for i in range(count)]
    kept = BoundedCurve(most=8)
    for point in points:
        kept.add(point)
    found = kept.points()
    assert len(found) <= 16
    assert found == sorted(found, key=lambda point: point.step)
    assert set(found) <= set(points)
    if points:
        values = [point.value for point in points]
        assert {min(values), max(values)} <= {point.value for point in found}
        assert (kept.count, kept.last) == (count, points[-1])
    if count <= 8:
        assert found == points
        assert [p.value for p in kept.smooth()] == pytest.approx([p.value for p in smooth(points)])
    assert all(0 <= point.value <= 1 for point in kept.smooth())


def test_the_history_has_the_curves_of_the_log() -> None:
    lines = run(30)
    history = History(lines)
    assert history.points("train/loss") == curve(lines, "train/loss")
    assert history.points("eval/accuracy") == curve(lines, "eval/accuracy")
    assert history.points("never/logged") == []
    assert history.at_best is not None
    assert history.at_best["step"] == 15
    assert [event["event"] for event in history.events] == ["start", "resume"]
    assert not history.is_thinned
    broken = History([{"step": 1, "tokens": 1, "time_s": 1.0, "eval/loss": math.nan}])
    assert broken.at_best is None
    assert broken.points("eval/loss") == []


def test_moments_stay_few_and_evenly_spread() -> None:
    history = History()
    for step in range(1, 2_001):
        times = {key(name): float(step) for name in ACTIVITIES}
        history.add({"step": step, "tokens": step, "time_s": float(step), **times})
    steps = [place.step for place, _ in history.moments]
    assert MOST_MOMENTS / 2 <= len(steps) <= MOST_MOMENTS
    assert len({b - a for a, b in itertools.pairwise(steps)}) == 1


def test_activities_add_up_to_the_time_that_passed() -> None:
    now = 5.0
    clock = ActivityClock(lambda: now)
    clock.begin({"saving": 2.0})
    for phase, seconds in (
        (COMPILING, 10.0),
        (WAITING, 1.0),
        (STEPPING, 4.0),
        (WAITING, 0.5),
        (EVALUATING, 3.0),
        (FINISHING, 0.25),
    ):
        clock.enter(phase)
        now += seconds
    assert clock.values() == {
        "time/compute_s": 4.0,
        "time/data_s": 1.5,
        "time/evaluation_s": 3.0,
        "time/saving_s": 2.0,
        "time/compiling_s": 10.0,
        "time/other_s": 0.25,
    }


def test_a_resumed_run_goes_on_with_its_time_by_activity() -> None:
    told: dict[str, Any] = {key(name): 0.0 for name in ACTIVITIES} | {"time/compute_s": 6.0}
    lines = [
        {"step": 4, "tokens": 1, "time_s": 6.0, **told},
        {"step": 4, "tokens": 1, "time_s": 9.0, "eval/loss": 1.0},
    ]
    assert earlier_activities(lines) == dict.fromkeys(ACTIVITIES, 0.0) | {
        "compute": 6.0,
        "evaluation": 3.0,
    }
    assert earlier_activities(lines[1:]) == {"other": 9.0}
    assert earlier_activities([]) == {"other": 0.0}
