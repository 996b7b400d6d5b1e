import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consyn_jax.data.loader import BatchLoader, Order, Shuffled
from consyn_jax.data.mixture import LONGEST_CYCLE, Joined, Mixture, part_seed, quotas
from consyn_jax.data.packing import Sequences

SEEDS = st.integers(0, 2**64 - 1)
WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


class Numbers:
    """A dataset whose rows hold their source and index."""

    def __init__(self, name: int, n: int) -> None:
        self.name, self.n = name, n

    def __len__(self) -> int:
        return self.n

    def rows(self, indices: np.ndarray) -> Sequences:
        ids = np.asarray(indices)
        assert ((ids >= 0) & (ids < self.n)).all()
        return {
            "labels": np.stack([np.full_like(ids, self.name), ids], axis=1),
            "loss_mask": np.ones((len(ids), 2), bool),
        }


def mixture(sizes: list[int], weights: list[float], seed: int = 1) -> Mixture:
    return Mixture({str(name): Numbers(name, n) for name, n in enumerate(sizes)}, weights, seed)


def rows_at(order: Order, positions: np.ndarray) -> list[tuple[int, int]]:
    return [tuple(row) for row in order.at(positions)["labels"].tolist()]


@given(weights=WEIGHTS, seed=SEEDS, start=st.integers(0, 10**12), data=st.data())
def test_the_sequence_at_a_position_depends_on_the_position_alone(
    weights: list[float], seed: int, start: int, data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 50), min_size=len(weights), max_size=len(weights)))
    at = np.arange(start, start + 40)
    whole = rows_at(mixture(sizes, weights, seed), at)
    order = data.draw(st.permutations(range(40)))
    one = mixture(sizes, weights, seed)
    assert [whole[i] for i in order] == [rows_at(one, at[[i]])[0] for i in order]


@given(sizes=st.lists(st.integers(1, 300), min_size=3, max_size=3), seed=SEEDS)
def test_every_source_keeps_the_order_that_it_has_alone(sizes: list[int], seed: int) -> None:
    """So every sequence of a source occurs once before any occurs again."""
    order = mixture(sizes, [5, 2, 1], seed)
    found = rows_at(order, np.arange(6000))
    for name, n in enumerate(sizes):
        own = [i for source, i in found if source == name]
        alone = Shuffled(Numbers(name, n), part_seed(seed, name + 1))
        assert own == [i for _, i in rows_at(alone, np.arange(len(own)))]
        for first in range(0, len(own) - n, n):
            assert sorted(own[first : first + n]) == list(range(n))


@given(weights=WEIGHTS, seed=SEEDS, position=st.integers(0, 20_000))
def test_counts_match_the_sequences_so_far(weights: list[float], seed: int, position: int) -> None:
    order = mixture([7] * len(weights), weights, seed)
    sources, _ = order.places(np.arange(position))
    assert (
        list(order.counts(position).values())
        == np.bincount(sources, minlength=len(weights)).tolist()
    )
    assert order.passes(position) == {
        name: count // 7 for name, count in order.counts(position).items()
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "weights",
    [
        [0.5, 0.5],
        [0.7, 0.2, 0.1],
        [3, 1, 1, 1],
        [0.9, 0.099, 0.001],
        [0.4375, 0.3127, 0.2498],
        [1.0, 1e-5],
    ],
)
def test_shares_are_met_to_a_thousandth_over_100_000_sequences(
    weights: list[float], seed: int
) -> None:
    counts = mixture([1000] * len(weights), weights, seed).counts(100_000)
    assert sum(counts.values()) == 100_000
    np.testing.assert_allclose(
        np.array(list(counts.values())) / 100_000,
        np.array(weights) / sum(weights),
        rtol=0,
        atol=1e-3,
    )


@given(weights=WEIGHTS, seed=SEEDS)
def test_shares_are_nearly_met_in_every_stretch(weights: list[float], seed: int) -> None:
    """No stretch of 500 sequences is off by more than 6 standard deviations and rounding."""
    order = mixture([3] * len(weights), weights, seed)
    sources, _ = order.places(np.arange(10_000))
    for source, share in enumerate(order.quotas / order.quotas.sum()):
        stretches = (sources == source).reshape(-1, 500).mean(1)
        assert (np.abs(stretches - share) <= 6 * np.sqrt(share * (1 - share) / 500) + 1 / 500).all()


@given(weights=st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=8))
def test_quotas_leave_no_source_out(weights: list[float]) -> None:
    found = quotas(weights)
    assert found.min() >= 1
    assert LONGEST_CYCLE / 2 <= found.sum() <= LONGEST_CYCLE
    wanted = np.array(weights) / sum(weights) * found.sum()
    assert (np.abs(found - wanted) < 1 + len(weights)).all()


def test_simple_ratios_are_exact() -> None:
    for weights in ([0.7, 0.2, 0.1], [0.999, 0.001], [1, 1, 1], [1 / 3, 2 / 3]):
        found = quotas(weights)
        np.testing.assert_allclose(
            found / found.sum(), np.array(weights) / sum(weights), rtol=1e-12
        )


def test_cycles_and_seeds_have_different_orders() -> None:
    order = mixture([5, 5], [1, 1])
    cycle = int(order.quotas.sum())
    first, second = (order.places(np.arange(at, at + 200))[0].tolist() for at in (0, cycle))
    other = mixture([5, 5], [1, 1], seed=2).places(np.arange(200))[0].tolist()
    assert first != second != other != first


def test_any_number_of_processes_reads_the_same_batches_of_a_mixture() -> None:
    whole = BatchLoader(mixture([30, 70], [1, 2]), 24, 2).batch(170)["labels"]
    for processes in (2, 3, 8):
        share = 24 // processes
        parts = [
            BatchLoader(mixture([30, 70], [1, 2]), 24, 2, slice(p * share, (p + 1) * share)).batch(
                170
            )["labels"]
            for p in range(processes)
        ]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize(
    "weights", [[], [1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]]
)
def test_invalid_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        mixture([5, 5], weights)


def test_an_empty_source_is_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        mixture([5, 0], [1, 1])


@given(sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5), data=st.data())
def test_joined_datasets_are_read_one_after_the_other(
    sizes: list[int], data: st.DataObject
) -> None:
    joined = Joined([Numbers(name, n) for name, n in enumerate(sizes)])
    rows = [(name, i) for name, n in enumerate(sizes) for i in range(n)]
    assert len(joined) == len(rows)
    if rows:
        wanted = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=20))
        assert [tuple(row) for row in joined.rows(wanted)["labels"].tolist()] == [
            rows[i] for i in wanted
        ]
