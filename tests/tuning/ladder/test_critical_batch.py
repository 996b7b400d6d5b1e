"""The critical batch by tokens: a power law through noisy measurements."""

import numpy as np
import pytest

from consyn_jax.tuning.ladder.critical_batch import BatchPoint, fit_batch


def test_the_law_is_found_in_noise() -> None:
    random = np.random.default_rng(3)
    tokens = np.geomspace(1e5, 1e8, 24)
    points = [BatchPoint(1e6, t, 5.0 * t**0.45 * np.exp(0.2 * random.normal())) for t in tokens]
    found = fit_batch(points)
    assert found is not None
    assert found.exponent == pytest.approx(0.45, abs=0.05)
    assert found.tokens(1e9) == pytest.approx(5.0 * 1e9**0.45, rel=0.4)


@pytest.mark.parametrize(("slope", "kept"), [(-0.5, 0.0), (1.7, 1.0)])
def test_noise_cannot_make_the_batch_shrink_or_explode(slope: float, kept: float) -> None:
    found = fit_batch([BatchPoint(1e6, t, t**slope) for t in (1e5, 1e6, 1e7)])
    assert found is not None
    assert found.exponent == kept


def test_too_few_measurements_give_no_law() -> None:
    assert fit_batch([BatchPoint(1e6, 1e5, 3e3)] * 2) is None
