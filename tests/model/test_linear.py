from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from consyn_jax.model.linear import linear, linear_pair


@pytest.mark.parametrize("lead", [(7,), (2, 5), (2, 3, 4)])
def test_values_and_gradients_equal_the_plain_product(lead: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x, w, dy = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((*lead, 6), (6, 8), (*lead, 8))
    )
    ours, pull = jax.vjp(linear, x, w)
    plain, pull_plain = jax.vjp(lambda x, w: x @ w, x, w)
    np.testing.assert_allclose(ours, plain, atol=1e-6)
    for got, expected in zip(pull(dy), pull_plain(dy), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_in_bf16_the_weights_gradient_is_summed_in_float32() -> None:
    rng = np.random.default_rng(1)
    x, dy = (jnp.asarray(rng.normal(size=(4096, width)), jnp.bfloat16) for width in (6, 8))
    _, pull = jax.vjp(linear, x, jnp.ones((6, 8)))
    dx, dw = pull(dy)
    assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(
        dw, np.asarray(x, np.float64).T @ np.asarray(dy, np.float64), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("recast", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_pair_is_two_products(dtype: Any, recast: bool) -> None:
    """Outputs and gradients; that of the input is summed before it is rounded."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (2, 8, 16), dtype)
    w, v = (jax.random.normal(key, (16, 24)) for key in keys[1:3])
    dy = jax.random.normal(keys[3], (2, 8, 2, 24), dtype)
    both, pull = jax.vjp(lambda *given: linear_pair(*given, recast), x, w, v)
    expected, pull_each = jax.vjp(lambda x, w, v: (linear(x, w), linear(x, v)), x, w, v)
    found = both[..., 0, :], both[..., 1, :]
    gradients = zip(pull(dy), pull_each((dy[..., 0, :], dy[..., 1, :])), strict=True)
    bound = 1e-6 if dtype == jnp.float32 else 1e-2
    for a, b in (*zip(found, expected, strict=True), *gradients):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        error = jnp.linalg.norm((a - b).astype(jnp.float32))
        assert float(error / jnp.linalg.norm(b.astype(jnp.float32))) <= bound
