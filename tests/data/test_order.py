import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consyn_jax.data.order import ids_at


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 2**30))
def test_every_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    ids = ids_at(seed, np.arange(epoch * n, (epoch + 1) * n), n)
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(np.sort(ids), np.arange(n))


@given(
    n=st.integers(1, 10**15),
    seed=st.integers(0, 2**32 - 1),
    start=st.integers(0, 2**60),
    count=st.integers(0, 50),
)
def test_any_position_can_be_computed_alone(n: int, seed: int, start: int, count: int) -> None:
    ids = ids_at(seed, np.arange(start, start + count), n)
    assert len(ids) == count
    assert ((ids >= 0) & (ids < n)).all()
    for i in range(0, count, 7):
        assert ids[i] == ids_at(seed, np.array([start + i]), n)[0]


def test_epochs_and_seeds_have_different_orders() -> None:
    n = 1000
    orders = [
        ids_at(seed, np.arange(epoch * n, (epoch + 1) * n), n)
        for seed in (0, 1, 2**32 - 1)
        for epoch in (0, 1, 2)
    ]
    for a, b in itertools.combinations(orders, 2):
        assert (a == b).sum() < 10  # two random permutations agree in one place on average


def test_the_order_never_changes() -> None:
    """A run that is resumed under a later version must read the same data."""
    assert ids_at(42, np.arange(8), 1000).tolist() == [448, 800, 375, 335, 748, 273, 280, 882]
    assert ids_at(7, 123_456_789_000 + np.arange(4), 10_000_019).tolist() == [
        3918055,
        6518053,
        6314596,
        123344,
    ]


def test_unshuffled_is_in_order_and_wraps() -> None:
    assert ids_at(0, np.arange(3, 8), 5, shuffle=False).tolist() == [3, 4, 0, 1, 2]


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        ids_at(0, np.arange(1), 0)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_of_few_samples_are_equally_frequent(n: int) -> None:
    epochs = 6000
    ids = ids_at(1, np.arange(n * epochs), n).reshape(epochs, n)
    _, counts = np.unique(ids @ (n ** np.arange(n)), return_counts=True)
    orders = int(np.prod(np.arange(1, n + 1)))
    assert len(counts) == orders
    chi2 = ((counts - epochs / orders) ** 2 / (epochs / orders)).sum()
    assert chi2 < orders - 1 + 5 * (2 * (orders - 1)) ** 0.5  # five standard deviations


@pytest.mark.parametrize("n", [257, 4096, 65_537])
def test_the_order_is_statistically_random(n: int) -> None:
    """Means, displacements, neighbours and runs as in random permutations, within five standard
    deviations."""
    epochs = max(1, 200_000 // n)
    ids = ids_at(3, np.arange(n * epochs), n).reshape(epochs, n)
    halves = (ids[:, : n // 2] < n // 2).sum() / epochs
    assert abs(halves - (n // 2) ** 2 / n) < 5 * (n / 16 / epochs) ** 0.5 + 0.01
    correlation = np.corrcoef(np.tile(np.arange(n), epochs), ids.reshape(-1))[0, 1]
    assert abs(correlation) < 5 / (n * epochs) ** 0.5
    neighbours = np.corrcoef(ids[:, :-1].reshape(-1), ids[:, 1:].reshape(-1))[0, 1]
    assert abs(neighbours) < 5 / (n * epochs) ** 0.5 + 2 / n
    rises = (ids[:, 1:] > ids[:, :-1]).mean()
    assert abs(rises - 0.5) < 5 * (1 / 12 / n / epochs) ** 0.5
    fixed_points = (ids == np.arange(n)).sum() / epochs
    assert abs(fixed_points - 1) < 5 / epochs**0.5
