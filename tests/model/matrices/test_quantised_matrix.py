import jax
import jax.numpy as jnp
import numpy as np
import pytest

from consyn_jax.model.matrices.quantised_matrix import BLOCK, NF4, normal_floats, quantised


def matrix(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape)


def by_hand(w_IO: np.ndarray) -> np.ndarray:
    """Each output's inputs in blocks of 64, each number by the nearest of the table."""
    made = np.zeros_like(w_IO)
    for start in range(0, len(w_IO), BLOCK):
        block = w_IO[start : start + BLOCK]
        largest = np.abs(block).max(0)
        apart = np.abs((block / largest)[..., None] - np.array(NF4, np.float32))
        made[start : start + BLOCK] = np.array(NF4, np.float32)[apart.argmin(-1)] * largest
    return made


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "inputs"), [((128, 3, 5), 1), ((3, 32, 7), 2), ((100, 6), 1)])
def test_four_bits_are_the_nearest_of_the_table(shape: tuple[int, ...], inputs: int) -> None:
    w = matrix(*shape)
    found = normal_floats(w, inputs)
    assert found.shape == shape
    size = int(np.prod(shape[:inputs]))
    flat = np.asarray(w).reshape(size, -1)
    np.testing.assert_allclose(
        np.asarray(found.dense(jnp.float32)).reshape(size, -1), by_hand(flat), rtol=1e-6
    )


def test_four_bits_take_half_a_byte_and_a_factor_for_64() -> None:
    found = normal_floats(matrix(256, 64), 1)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(found)) == 256 * 64 // 2 + 256 * 64 // 16


def test_zeros_stay_zeros() -> None:
    for rounded in (normal_floats, quantised):
        assert not np.asarray(rounded(jnp.zeros((64, 4)), 1).dense(jnp.float32)).any()


def test_eight_bits_are_within_half_a_step() -> None:
    w = matrix(4, 16, 8)
    found = quantised(w, 2)
    step = np.abs(np.asarray(w)).max((0, 1)) / 127
    assert (np.abs(found.dense(jnp.float32) - w) <= step * 0.501).all()
