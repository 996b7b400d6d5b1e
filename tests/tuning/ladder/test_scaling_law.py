"""The fit finds the constants of a law from its losses, and says how sure it is."""

import itertools

import numpy as np
import pytest

from consyn_jax.tuning.ladder.scaling_law import (
    LossPoint,
    ScalingLaw,
    bootstrap,
    can_fit,
    fit,
    interval,
    long_enough,
)

CHINCHILLA = ScalingLaw(1.69, 406.4, 410.7, 0.34, 0.28)
SIZES = (1e6, 4e6, 16e6, 64e6)


def losses(law: ScalingLaw, noise: float = 0.0, seed: int = 1) -> list[LossPoint]:
    """Four sizes with four lengths each, and noise as a share of the loss."""
    random = np.random.default_rng(seed)
    return [
        LossPoint(n, n * ratio, law.loss(n, n * ratio) * np.exp(noise * random.normal()))
        for n, ratio in itertools.product(SIZES, (5, 10, 20, 40))
    ]


@pytest.mark.parametrize("law", [CHINCHILLA, ScalingLaw(0.6, 30.0, 900.0, 0.25, 0.5)])
def test_exact_losses_give_the_constants(law: ScalingLaw) -> None:
    found = fit(losses(law))
    assert vars(found) == pytest.approx(vars(law), rel=1e-3)


def test_noisy_losses_predict_a_larger_size() -> None:
    for seed in range(5):
        found = fit(losses(CHINCHILLA, 0.002, seed))
        at = 256e6, 256e6 * 20
        assert found.loss(*at) == pytest.approx(CHINCHILLA.loss(*at), rel=0.02)
        assert found.alpha == pytest.approx(CHINCHILLA.alpha, abs=0.1)
        assert found.beta == pytest.approx(CHINCHILLA.beta, abs=0.1)


def test_one_bad_run_does_not_bend_the_law() -> None:
    points = losses(CHINCHILLA)
    bad = LossPoint(points[5].parameters, points[5].tokens, 1.3 * points[5].loss)
    found = fit([*points[:5], bad, *points[6:]])
    assert found.loss(1e9, 2e10) == pytest.approx(CHINCHILLA.loss(1e9, 2e10), rel=0.01)


@pytest.mark.slow
def test_intervals_hold_the_truth_and_grow_with_noise_and_distance() -> None:
    def width(noise: float, size: float, seed: int) -> tuple[float, bool]:
        laws = bootstrap(losses(CHINCHILLA, noise, seed), draws=25)
        low, high = interval([law.loss(size, 20 * size) for law in laws])
        return high - low, low <= CHINCHILLA.loss(size, 20 * size) <= high

    near = [width(0.003, 128e6, seed) for seed in range(4)]
    far = [width(0.003, 1e10, seed) for seed in range(4)]
    calm = [width(0.0003, 1e10, seed) for seed in range(4)]
    assert sum(holds for _, holds in near) >= 2
    assert np.mean([w for w, _ in far]) > 2 * np.mean([w for w, _ in near])
    assert np.mean([w for w, _ in far]) > 2 * np.mean([w for w, _ in calm])


def test_runs_of_few_steps_are_left_out_if_enough_others_are_there() -> None:
    points = losses(CHINCHILLA)
    found = long_enough(points, 40_000)
    assert found == [point for point in points if point.tokens >= 1e7]
    assert 6 <= len(found) < len(points)
    assert long_enough(points, 10**9) == points
    assert len(long_enough(points, 640_000)) == 8
    assert long_enough(points[:-1], 640_000) == points[:-1], "7 would be left, which draws repeat"


def test_a_law_needs_three_sizes_and_three_lengths() -> None:
    points = losses(CHINCHILLA)
    assert can_fit(points)
    assert not can_fit([p for p in points if p.parameters < SIZES[2]])
    assert not can_fit([LossPoint(p.parameters, 1e8, p.loss) for p in points])
    assert not can_fit(points[:1] * 16)
