import jax
import jax.numpy as jnp
import numpy as np
import pytest

from consyn_jax.model.embedding import BLOCK, scatter_rows, sum_rows_in_order


@pytest.mark.parametrize(
    ("tokens", "rows", "dtype"),
    [
        (1, 5, jnp.float32),
        (300, 5000, jnp.float32),  # almost all rows are empty
        (BLOCK * BLOCK + 1, 3, jnp.bfloat16),  # runs over many blocks, on three levels
        (2 * BLOCK, 1, jnp.float16),  # one run
        (5000, 700, jnp.bfloat16),
    ],
)
def test_sums_in_order_are_those_of_a_scatter(tokens: int, rows: int, dtype: jnp.dtype) -> None:
    """Both in float32, against float64; a place of `rows` is dropped."""
    rng = np.random.default_rng(tokens)
    at = np.minimum(rng.zipf(1.3, tokens) - 1, rows)
    x = jnp.asarray(rng.standard_normal((tokens, 16)), dtype)
    exact, sizes = np.zeros((rows + 1, 16)), np.zeros((rows + 1, 16))
    np.add.at(exact, at, np.asarray(x, np.float64))
    np.add.at(sizes, at, np.abs(np.asarray(x, np.float64)))
    ours = jax.jit(sum_rows_in_order, static_argnums=2)(x, jnp.asarray(at, jnp.int32), rows)
    theirs = scatter_rows(x, jnp.asarray(at, jnp.int32), rows)
    assert ours.dtype == theirs.dtype == jnp.float32
    bound = 1e-7 * (sizes[:rows] + 1e-30)
    assert np.all(np.abs(ours - exact[:rows]) <= 4 * bound)
    assert np.all(np.abs(theirs - exact[:rows]) <= 400 * bound)
