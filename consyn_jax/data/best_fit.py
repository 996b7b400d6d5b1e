"""Pack items of given lengths into bins of equal size by the best-fit-decreasing heuristic."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from jaxtyping import Int64


def best_fit_decreasing(lengths: Int64[np.ndarray, " n"], size: int) -> Int64[np.ndarray, " n"]:
    """Assign each item to a bin by best-fit-decreasing; return the bin numbers, from 0.

    Items are placed from the longest to the shortest. Each item goes into the fullest bin that has
    enough space, or into a new bin. Items of equal length are placed together: the fullest bin
    takes as many as fit, then the next fullest. One integer serves as a set of free spaces: bit r
    is set if a bin has exactly r free positions. A shift and the lowest set bit then give the
    smallest sufficient space. Time grows with the number of distinct lengths, not of items.

    Args:
        lengths: lengths of the items, each in 1 .. size.
        size: capacity of a bin.

    >>> best_fit_decreasing(np.array([5, 3, 4, 6, 2]), 10)
    array([1, 1, 0, 0, 1])
    """
    with_space: defaultdict[int, list[int]] = defaultdict(list)
    spaces, bins = 0, 0  # bit r of `spaces`: some bin has r free positions
    chosen: list[int] = []
    values, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            fitting = spaces >> length
            space = length + (fitting & -fitting).bit_length() - 1 if fitting else size
            each = space // length
            if not fitting:
                with_space[size] = list(range(bins, bins := bins + -(-count // each)))
                spaces |= 1 << size
            candidates = with_space[space]
            # If fewer items remain than fit in one bin, that bin takes all of them.
            each = min(each, count)
            filled = min(len(candidates), count // each)
            taken = candidates[-filled:]
            del candidates[-filled:]
            chosen += taken if each == 1 else [number for number in taken for _ in range(each)]
            count -= filled * each
            if not candidates:
                spaces &= ~(1 << space)
            if space > each * length:
                with_space[space - each * length] += taken
                spaces |= 1 << (space - each * length)
    result = np.empty(len(lengths), np.int64)
    result[np.argsort(-lengths, kind="stable")] = chosen
    return result
