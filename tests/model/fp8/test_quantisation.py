"""Scales of 8-bit arrays: of the array itself, and of the step before."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from consyn_jax.model.fp8.quantisation import (
    ACTIVATIONS,
    ARRAYS,
    FORWARD,
    GRADIENT,
    GRADIENTS,
    first_scales,
    narrowed,
    next_scales,
    quantise,
)


@pytest.mark.parametrize("dtype", [FORWARD, GRADIENT])
@pytest.mark.parametrize("largest", [1.0, 0.9, 1.1, 1e-30, 1e30, 0.0])
def test_the_scale_is_the_smallest_power_of_two_that_holds_all(dtype: Any, largest: float) -> None:
    top = float(jnp.finfo(dtype).max)
    x = np.float32(largest * top) * jnp.asarray([0.1, -1.0, 0.0])
    found, _ = quantise(x, dtype)
    values, scale = np.asarray(found.values, np.float64), float(found.scale)
    assert math.frexp(scale)[0] == 0.5
    assert np.all(np.isfinite(values))
    assert largest == 0 or scale == 2.0**-60 or top / 2 <= np.abs(values).max() <= top
    np.testing.assert_allclose(
        values * scale, x, rtol=1 / 16 if dtype == FORWARD else 1 / 8, atol=1e-20
    )


TYPES = [FORWARD] * len(ACTIVATIONS) + [GRADIENT] * len(GRADIENTS)
ROOM = [2] * len(ACTIVATIONS) + [16] * len(GRADIENTS)


def test_the_next_scale_is_a_power_of_two_with_room_for_growth() -> None:
    largest = np.exp(np.random.default_rng(0).normal(size=(3, len(ARRAYS)))).astype(np.float32)
    found = np.asarray(next_scales(first_scales(3), jnp.asarray(largest)), np.float64)
    tops = np.array([float(jnp.finfo(dtype).max) for dtype in TYPES])
    np.testing.assert_array_equal(found, 2.0 ** np.ceil(np.log2(largest / tops)) * ROOM)


@pytest.mark.parametrize("largest", [0.0, math.inf, math.nan])
def test_an_array_without_a_size_keeps_its_scale(largest: float) -> None:
    """All its elements are zero, or some are not finite."""
    scales = first_scales(2) * 3
    np.testing.assert_array_equal(next_scales(scales, jnp.full_like(scales, largest)), scales)


def test_scales_of_tiny_and_of_huge_arrays_and_their_inverses_are_finite() -> None:
    for largest in (1e-38, 3e38):
        found = next_scales(first_scales(1), jnp.full((1, len(ARRAYS)), largest, jnp.float32))
        assert bool(jnp.all((found >= 2.0**-60) & jnp.isfinite(found) & (1 / found > 0)))


@pytest.mark.parametrize("dtype", [FORWARD, GRADIENT])
def test_too_large_values_are_clipped_and_nonfinite_ones_are_not_hidden(dtype: Any) -> None:
    top = float(jnp.finfo(dtype).max)
    x = jnp.asarray([2 * top, -3 * top, 2 * top / 3, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    found = np.asarray(jax.jit(lambda x: narrowed(x, jnp.float32(1), dtype))(x), np.float32)
    np.testing.assert_array_equal(found[:2], [top, -top])
    assert abs(found[2] / (2 * top / 3) - 1) < 1 / 8
    assert np.isnan(found[3:]).all()


@pytest.mark.parametrize("dtype", [FORWARD, GRADIENT])
def test_values_whose_quotient_overflows_are_clipped(dtype: Any) -> None:
    top = float(jnp.finfo(dtype).max)
    x = jnp.asarray([3e38, -3e38, 0, 2.0**-61, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    narrow = jax.jit(lambda inverse: narrowed(x, inverse, dtype).astype(jnp.float32))
    np.testing.assert_array_equal(narrow(jnp.float32(2.0**60)), [top, -top, 0, 0.5, *[np.nan] * 3])
    assert np.isnan(narrow(jnp.float32(np.nan))).all()
