"""Several datasets as one, by weight: which source stands at a global position, and which of its sequences, is arithmetic.

Positions come in cycles of a few thousand. Every cycle holds the same number of sequences of each source, in an order of its own
(`order.ids_at`), so that shares hold from the start and nothing needs to be remembered. Within a source the sequences come in the
order that it would have alone: every one of them once before any comes again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer

from consyn_jax.data.loader import Dataset, Shuffled
from consyn_jax.data.order import ids_at, mix
from consyn_jax.data.packing import Batch

# Within a cycle shares only hold on average, so it is short; a share can be no finer than 1 in a cycle, so it is not shorter.
LONGEST_CYCLE = 4096


class Mixture:
    """An endless order of sequences (`loader.Order`) from several sources.

    An epoch of a mixture is as many sequences as all sources hold together; how often each source is passed in it is up to the
    weights.

    Args:
        datasets: the sources by name, each with at least one sequence.
        weights: share of the sequences that each gives, in the order of `datasets`; only their ratios count.
        seed: chooses the order of the cycles, and that of every source.

    Attributes:
        quotas: sequences of each source in a cycle.

    Raises:
        ValueError: as many weights as sources, all above 0, and no more sources than half a cycle: one of these is not so.
    """

    def __init__(self, datasets: Mapping[str, Dataset], weights: Sequence[float | int], seed: int) -> None:
        if len(weights) != len(datasets):
            raise ValueError(f"There are {len(weights)} weights for {len(datasets)} sources.")
        self.datasets, self.seed = dict(datasets), seed
        self.quotas = quotas(weights)
        self._orders = [Shuffled(dataset, part_seed(seed, number)) for number, dataset in enumerate(self.datasets.values(), 1)]
        self._last: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        """Sequences in an epoch: those of all sources together."""
        return sum(map(len, self.datasets.values()))

    def at(self, positions: Int64[np.ndarray, " n"]) -> Batch:
        """The sequences at any positions, each array [n, ...]."""
        sources, indices = self.places(positions)
        batch: Batch = {}
        for number in np.unique(sources):
            chosen = np.flatnonzero(sources == number)
            for name, values in self._orders[number].at(indices[chosen]).items():
                if name not in batch:
                    batch[name] = np.empty((len(positions), *values.shape[1:]), values.dtype)
                batch[name][chosen] = values
        return batch

    def places(self, positions: Int64[np.ndarray, " n"]) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """For every position the number of its source, and the position within that source."""
        cycles, offsets = np.divmod(positions, self.quotas.sum())
        sources, indices = np.empty_like(positions), np.empty_like(positions)
        for cycle in np.unique(cycles):
            here = cycles == cycle
            source_of, nth = self._cycle(int(cycle))
            sources[here] = source_of[offsets[here]]
            indices[here] = cycle * self.quotas[sources[here]] + nth[offsets[here]]
        return sources, indices

    def counts(self, position: int) -> dict[str, int]:
        """By source, how many of the sequences in front of `position` are its own. Together they are `position`."""
        cycle, offset = divmod(position, int(self.quotas.sum()))
        partial = np.bincount(self._cycle(cycle)[0][:offset], minlength=len(self.quotas))
        return {name: int(count) for name, count in zip(self.datasets, cycle * self.quotas + partial, strict=True)}

    def passes(self, position: int) -> dict[str, int]:
        """By source, how many whole passes over it lie in front of `position`."""
        return {name: count // len(self.datasets[name]) for name, count in self.counts(position).items()}

    def _cycle(self, cycle: int) -> tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"]]:
        """For every offset of a cycle its source, and how many of that source stand in front of it in the cycle."""
        known = self._last  # read once: another thread may be at another cycle
        if known is None or known[0] != cycle:
            ends = np.cumsum(self.quotas)
            size = int(ends[-1])
            slots = ids_at(part_seed(self.seed, 0), np.arange(cycle * size, (cycle + 1) * size, dtype=np.int64), size)
            source_of = np.searchsorted(ends, slots, "right").astype(np.int64)
            nth = np.empty_like(source_of)
            nth[np.argsort(source_of, kind="stable")] = np.arange(size) - np.repeat(ends - self.quotas, self.quotas)
            self._last = known = (cycle, source_of, nth)
        return known[1], known[2]


class Joined:
    """Several datasets one after the other: every sequence of each once, in its own order."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self.datasets = tuple(datasets)
        self._ends = np.cumsum([len(dataset) for dataset in self.datasets], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def rows(self, indices: Sequence[int] | Integer[np.ndarray, " n"]) -> Batch:
        """The sequences `indices` (each in range(len)), each array [n, ...]."""
        wanted = np.asarray(indices, np.int64)
        number_of = np.searchsorted(self._ends, wanted, "right")
        batch: dict[str, Any] = {}
        for number in np.unique(number_of):
            chosen = np.flatnonzero(number_of == number)
            dataset = self.datasets[number]
            for name, values in dataset.rows(wanted[chosen] - (self._ends[number] - len(dataset))).items():
                batch.setdefault(name, np.empty((len(wanted), *values.shape[1:]), values.dtype))[chosen] = values
        return batch


def part_seed(seed: int, number: int) -> int:
    """A seed for one of the orders that an order is made of, so that they have nothing in common."""
    return int(mix(mix(np.array([seed % 2**64], np.uint64)) + np.array([number], np.uint64))[0])


def quotas(weights: Sequence[float | int]) -> Int64[np.ndarray, " sources"]:
    """How many sequences of each source a cycle holds: whole numbers in the ratios of `weights`, at least 1 each.

    Of the lengths that a cycle may have, the one is taken at which the worst relative error is smallest; so 7 : 2 : 1 is met
    exactly. Remainders are rounded by size (the method of Hamilton).

    Raises:
        ValueError: a weight that is not above 0, or too many.

    >>> quotas([0.7, 0.2, 0.1]).tolist()
    [2863, 818, 409]
    """
    given = np.asarray(weights, np.float64)
    if not len(given) or not (np.isfinite(given) & (given > 0)).all() or 2 * len(given) > LONGEST_CYCLE:
        raise ValueError(f"A mixture wants 1 to {LONGEST_CYCLE // 2} weights above 0, not {list(weights)[:8]}.")
    sizes = np.arange(LONGEST_CYCLE, LONGEST_CYCLE // 2 - 1, -1)
    exact = sizes[:, None] * (given / given.sum())
    found = np.floor(exact + 1e-9).astype(np.int64)
    rank = np.argsort(np.argsort(found - exact, axis=1, kind="stable"), axis=1)
    found += rank < (sizes - found.sum(1))[:, None]
    found = np.maximum(found, 1)
    while len(over := np.flatnonzero(found.sum(1) > sizes)):
        found[over, np.argmax(found[over], axis=1)] -= 1
    errors = np.abs(found / exact - 1).max(1).round(9)  # rounded, as ratios that are met exactly differ by what floats lose
    return found[np.argmin(errors)]
