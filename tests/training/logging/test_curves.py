from logged_runs import NOT_FINITE, run

from consyn_jax.training.logging.curves import Point, best, curve, smooth, thin


def test_smoothing_keeps_a_straight_line_and_evens_out_noise() -> None:
    line = [Point(i, i, 100.0 - i) for i in range(100)]
    assert all(abs(a.value - b.value) < 1e-9 for a, b in zip(smooth(line)[:97], line, strict=False))
    noise = [Point(i, i, float(i % 2)) for i in range(400)]
    assert all(abs(point.value - 0.5) < 0.06 for point in smooth(noise)[20:])
    assert smooth([]) == []


def test_thinning_keeps_spikes_and_order() -> None:
    points = [Point(i, i, 9.0 if i == 777 else 1.0 + i / 1e6) for i in range(10_000)]
    few = thin(points, 100)
    assert len(few) <= 200
    assert Point(777, 777, 9.0) in few
    assert [p.step for p in few] == sorted(p.step for p in few)
    assert thin(points[:5]) == points[:5]


def test_the_best_is_the_first_of_the_lowest_and_nonfinite_values_are_left_out() -> None:
    assert best([]) is None
    assert best([Point(1, 1, 2.0), Point(2, 2, 1.0), Point(3, 3, 1.0)]) == Point(2, 2, 1.0)
    assert len(curve(run(10), "eval/loss")) == 2  # and not three: an event's details are no points
    assert curve(NOT_FINITE, "train/loss") == curve(NOT_FINITE, "eval/loss") == []
