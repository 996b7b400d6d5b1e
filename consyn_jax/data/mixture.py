"""Mix several datasets by weight; a global position determines the source and the sequence.

Positions are grouped into cycles of a few thousand. Each source has the same number of sequences in
every cycle, and each cycle is shuffled anew (`order.ids_at`). So the shares hold from the first
cycle on, without any state. Within a source, the order is the same as without a mixture: all of its
sequences are read once before any is repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Int64, Integer

from consyn_jax.data.loader import Dataset, Shuffled
from consyn_jax.data.order import ids_at, mix
from consyn_jax.data.packing import Sequences

# A compromise: shares are exact only over whole cycles, so cycles should be short. But a source has
# at least one sequence per cycle, so small shares need long cycles.
LONGEST_CYCLE = 4096


class Mixture:
    """An endless order of sequences (`loader.Order`) from several sources.

    The length of an epoch is the number of sequences in all sources together. The weights decide
    how often each source is read in an epoch.

    Args:
        datasets: the sources by name, each with at least one sequence.
        weights: relative share of the sequences from each source, in the order of `datasets`.
        seed: seed of the order within cycles and within each source.

    Attributes:
        datasets, weights, seed: the arguments.
        quotas: number of sequences of each source in a cycle.

    Raises:
        ValueError: the numbers of weights and sources differ, a weight is not above 0, or there are
            more than `LONGEST_CYCLE` / 2 sources.
    """

    def __init__(
        self, datasets: Mapping[str, Dataset], weights: Sequence[float | int], seed: int
    ) -> None:
        if len(weights) != len(datasets):
            raise ValueError(f"There are {len(weights)} weights for {len(datasets)} sources.")
        self.datasets, self.weights, self.seed = dict(datasets), tuple(weights), seed
        self.quotas = quotas(weights)
        self._orders = [
            Shuffled(dataset, part_seed(seed, number))
            for number, dataset in enumerate(self.datasets.values(), 1)
        ]
        self._last: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        """Number of sequences in an epoch, the sum over all sources."""
        return sum(map(len, self.datasets.values()))

    def at(self, positions: Int64[np.ndarray, " n"]) -> Sequences:
        """Read the sequences at the given positions (at least 0), as arrays [n, T]."""
        sources, indices = self.places(positions)
        return _merged(sources, lambda number, at: self._orders[number].at(indices[at]))

    def places(
        self, positions: Int64[np.ndarray, " n"]
    ) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Return, for each position, the number of the source and the position in this source."""
        cycles, offsets = np.divmod(positions, self.quotas.sum())
        sources, indices = np.empty_like(positions), np.empty_like(positions)
        for cycle in np.unique(cycles):
            here = cycles == cycle
            source_of, nth = self._cycle(int(cycle))
            sources[here] = source_of[offsets[here]]
            indices[here] = cycle * self.quotas[sources[here]] + nth[offsets[here]]
        return sources, indices

    def counts(self, position: int) -> dict[str, int]:
        """Count the sequences of each source before `position`; the sum is `position`."""
        cycle, offset = divmod(position, int(self.quotas.sum()))
        partial = np.bincount(self._cycle(cycle)[0][:offset], minlength=len(self.quotas))
        return {
            name: int(count)
            for name, count in zip(self.datasets, cycle * self.quotas + partial, strict=True)
        }

    def passes(self, position: int) -> dict[str, int]:
        """Count the complete passes over each source before `position`, by name of the source."""
        return {
            name: count // len(self.datasets[name]) for name, count in self.counts(position).items()
        }

    def _cycle(self, cycle: int) -> tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"]]:
        """Return the source and the rank of each position in a cycle.

        The rank is the number of earlier positions in the cycle with the same source.
        """
        known = self._last  # read once: another thread may replace it
        if known is None or known[0] != cycle:
            ends = np.cumsum(self.quotas)
            size = int(ends[-1])
            slots = ids_at(
                part_seed(self.seed, 0),
                np.arange(cycle * size, (cycle + 1) * size, dtype=np.int64),
                size,
            )
            source_of = np.searchsorted(ends, slots, "right").astype(np.int64)
            nth = np.empty_like(source_of)
            nth[np.argsort(source_of, kind="stable")] = np.arange(size) - np.repeat(
                ends - self.quotas, self.quotas
            )
            self._last = known = (cycle, source_of, nth)
        return known[1], known[2]


class Joined:
    """The concatenation of several datasets."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self.datasets = tuple(datasets)
        self._ends = np.cumsum([len(dataset) for dataset in self.datasets], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def rows(self, indices: Sequence[int] | Integer[np.ndarray, " n"]) -> Sequences:
        """Read the sequences with the given `indices`, each in range(len), as arrays [n, T]."""
        wanted = np.asarray(indices, np.int64)
        first = self._ends - [len(dataset) for dataset in self.datasets]
        return _merged(
            np.searchsorted(self._ends, wanted, "right"),
            lambda number, at: self.datasets[number].rows(wanted[at] - first[number]),
        )


def _merged(
    sources: Int64[np.ndarray, " n"], read: Callable[[int, np.ndarray], Sequences]
) -> Sequences:
    """Read sequences from several sources into common arrays, in the order of `sources`.

    Args:
        sources: number of the source of each sequence.
        read: function that reads sequences, given the number of a source and the indices in
            `sources` where this source occurs.
    """
    merged: Sequences = {}
    for number in np.unique(sources):
        at = np.flatnonzero(sources == number)
        for name, values in read(number, at).items():
            if name not in merged:
                merged[name] = np.empty((len(sources), *values.shape[1:]), values.dtype)
            merged[name][at] = values
    return merged


def part_seed(seed: int, number: int) -> int:
    """Derive an independent seed for component `number` of a mixed order."""
    return int(mix(mix(np.array([seed % 2**64], np.uint64)) + np.array([number], np.uint64))[0])


def quotas(weights: Sequence[float | int]) -> Int64[np.ndarray, " sources"]:
    """Compute the number of sequences of each source in a cycle, in the ratios of `weights`.

    Each number is at least 1. The length of the cycle minimises the largest relative error of a
    share, so the ratios 7 : 2 : 1 are exact. Fractions are rounded by the largest-remainder method
    (Hamilton).

    Raises:
        ValueError: a weight is not above 0, or there are too many weights.

    >>> quotas([0.7, 0.2, 0.1]).tolist()
    [2863, 818, 409]
    """
    given = np.asarray(weights, np.float64)
    if (
        not len(given)
        or not (np.isfinite(given) & (given > 0)).all()
        or 2 * len(given) > LONGEST_CYCLE
    ):
        raise ValueError(
            f"A mixture needs 1 to {LONGEST_CYCLE // 2} weights above 0, not {list(weights)[:8]}."
        )
    sizes = np.arange(LONGEST_CYCLE, LONGEST_CYCLE // 2 - 1, -1)
    exact = sizes[:, None] * (given / given.sum())
    found = np.floor(exact + 1e-9).astype(np.int64)
    rank = np.argsort(np.argsort(found - exact, axis=1, kind="stable"), axis=1)
    found += rank < (sizes - found.sum(1))[:, None]
    found = np.maximum(found, 1)
    while len(over := np.flatnonzero(found.sum(1) > sizes)):
        found[over, np.argmax(found[over], axis=1)] -= 1
    # Round the errors: those of exact ratios differ only by floating-point noise.
    errors = np.abs(found / exact - 1).max(1).round(9)
    return found[np.argmin(errors)]
