"""The noise scale of a problem whose gradient and covariance are known."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from consyn_jax.training.diagnostics.gradient_noise import (
    GradientNoise,
    gradient_noise,
    squared_norms,
)

DIM, SPREAD, TOKENS = 50, 2.0, 8
MEAN = np.linspace(-0.3, 0.3, DIM)
SIGNAL, NOISE = float(MEAN @ MEAN), DIM * SPREAD**2  # |G|^2, and the trace of the covariance


class Sums(NamedTuple):
    terms: jax.Array


def objective(params: Any, batch: Any) -> tuple[jax.Array, Sums]:
    """A sum over tokens, whose gradients are the tokens themselves."""
    return (batch["x"] @ params["w"]).sum(), Sums(jnp.float32(len(batch["x"])))


def estimates(micro_batches: int, repeats: int) -> list[GradientNoise]:
    random, found = np.random.default_rng(0), []
    measure = jax.jit(lambda params, batch: squared_norms(objective, params, batch))  # type: ignore[arg-type]
    for _ in range(repeats):
        x = random.normal(MEAN, SPREAD, (micro_batches, TOKENS, DIM))
        batch = {"x": jnp.asarray(x, jnp.float32)}
        squares = map(float, measure({"w": jnp.zeros(DIM)}, batch))
        mean_square, square_of_mean, tokens = squares
        assert tokens == TOKENS
        found.append(gradient_noise(mean_square, square_of_mean, micro_batches, tokens))
    return found


@pytest.mark.parametrize("micro_batches", [2, 32])
def test_both_estimates_have_no_bias(micro_batches: int) -> None:
    found = estimates(micro_batches, 1000)
    for name, truth in (("signal", SIGNAL), ("noise", NOISE)):
        values = np.array([getattr(one, name) for one in found])
        error = values.std() / np.sqrt(len(values))
        assert abs(values.mean() - truth) < 4 * error
        assert error < 0.3 * truth


def test_many_micro_batches_give_the_scale() -> None:
    (found,) = estimates(4096, 1)
    assert found.scale == pytest.approx(NOISE / SIGNAL, rel=0.1)


@pytest.mark.parametrize(("signal", "noise"), [(-0.1, 1.0), (0.1, 0.0), (0.1, -1e-9)])
def test_a_signal_or_noise_that_is_not_above_zero_gives_no_scale(
    signal: float, noise: float
) -> None:
    assert GradientNoise(signal, noise).scale is None
