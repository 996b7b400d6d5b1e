from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from consyn_jax.model.linear import linear
from consyn_jax.model.matrices.frozen_matrix import FrozenMatrix, over_frozen
from consyn_jax.model.matrices.quantised_matrix import normal_floats, quantised

D, N, H, R = 128, 3, 8, 4
KINDS = {
    "array": lambda w: w,
    "int8": lambda w: quantised(w, 1),
    "nf4": lambda w: normal_floats(w, 1),
}


def parts() -> tuple[jax.Array, ...]:
    shapes = ((2, 5, D), (D, N, H), (D, R), (R, N, H))
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return tuple(jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_product_is_that_of_the_sum(kind: str) -> None:
    x, w, a, b = parts()
    base = KINDS[kind](w)
    dense = w if kind == "array" else base.dense(jnp.float32)

    def summed(x: Any, a: Any, b: Any) -> jax.Array:
        whole = dense.reshape(D, -1) + 0.5 * a @ b.reshape(R, -1)
        return jnp.sin(x @ whole).sum()

    def frozen(x: Any, a: Any, b: Any) -> jax.Array:
        matrix = FrozenMatrix(base, a, b, scale=0.5)
        assert matrix.shape == (D, N, H)
        return jnp.sin(over_frozen(linear)(x, matrix[...])).sum()

    wanted = jax.value_and_grad(summed, (0, 1, 2))(x, a, b)
    found = jax.value_and_grad(frozen, (0, 1, 2))(x, a, b)
    jax.tree.map(lambda f, w: np.testing.assert_allclose(f, w, rtol=2e-4, atol=2e-3), found, wanted)


def test_without_an_adapter_it_is_the_base() -> None:
    x, w, *_ = parts()
    np.testing.assert_allclose(FrozenMatrix(w).times(x), x @ w.reshape(D, -1), rtol=1e-5)
    np.testing.assert_array_equal(over_frozen(lambda x, w: x + 1)(x, w), x + 1)


def test_dropout_is_of_the_adapters_input() -> None:
    x, w, a, b = parts()
    kept = FrozenMatrix(w, a, b, jax.random.key(3), 1.0, 0.5).times(x) - FrozenMatrix(w).times(x)
    whole = FrozenMatrix(w, a, b).times(x) - FrozenMatrix(w).times(x)
    assert not np.allclose(kept, whole)
    draws = jax.vmap(
        lambda key: FrozenMatrix(w, a, b, key, 1.0, 0.5).times(x) - FrozenMatrix(w).times(x)
    )(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose(draws.mean(0), whole, atol=6 * float(draws.std(0).max()) / 4000**0.5)
