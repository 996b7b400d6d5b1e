"""Documents grouped by ranges of their digests and of the keys of their bands.

A segment has, and so have the long documents, which are known only when all segments are:

    exact_ids      documents that are compared as exact duplicates, grouped by partition
    exact_digests  their digests
    exact_bounds   where each partition begins in both
    key_ids, keys, key_bounds    the same for the keys of bands of near duplicates

So the task of a partition reads one range of each file, and equal digests or keys meet in one task.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int64, UInt8, UInt32, UInt64

from consyn_jax.data.preparation.near_duplicates import band_keys, worded
from consyn_jax.data.preparation.segments.job import Job


def compared(
    job: Job,
    ids: UInt64[np.ndarray, " n"],
    digests: UInt8[np.ndarray, "n 16"],
    signatures: UInt32[np.ndarray, "n 128"] | None,
    may_repeat: Bool[np.ndarray, " n"],
) -> dict[str, np.ndarray]:
    """The arrays of the documents `ids`.

    Args:
        signatures: None if near duplicates stay.
        may_repeat: True for documents that are kept even if they equal an earlier one.
    """
    arrays: dict[str, np.ndarray] = {}
    if job.drops_duplicates:
        chosen = np.flatnonzero(~may_repeat)
        high = np.ascontiguousarray(digests[chosen]).view(np.uint64)[:, 0]
        order, bounds = _grouped(high, job.partitions)
        arrays |= {"exact_ids": ids[chosen][order], "exact_digests": digests[chosen][order]}
        arrays["exact_bounds"] = bounds
    if signatures is not None and job.threshold is not None:
        chosen = np.flatnonzero(worded(signatures))
        keys = band_keys(signatures[chosen], job.threshold)
        key_ids = np.repeat(ids[chosen], keys.shape[1])
        order, bounds = _grouped(keys.reshape(-1), job.partitions)
        arrays |= {"key_ids": key_ids[order], "keys": keys.reshape(-1)[order]}
        arrays["key_bounds"] = bounds
    return arrays


def _grouped(
    values: UInt64[np.ndarray, " n"], partitions: int
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " bounds"]]:
    """Order values by partition, and within it as they are; also return where partitions begin."""
    high = values >> np.uint64(32)
    numbers = ((high * np.uint64(partitions)) >> np.uint64(32)).astype(np.uint16)
    order = np.argsort(numbers, kind="stable")
    return order, np.searchsorted(numbers[order], np.arange(partitions + 1))


def of_partition(job: Job, names: tuple[str, ...], bounds: str, number: int) -> list[np.ndarray]:
    """The parts of arrays of all segments and of long documents that belong to a partition.

    Args:
        names: names of the arrays.
        bounds: name of the array with the bounds of partitions.
    """
    found: list[list[np.ndarray]] = [[] for _ in names]
    places = [("segments", segment) for segment in range(job.num_segments)]
    for phase, index in [*places, ("long", 0)]:
        start, stop = job.array(phase, index, bounds)[number : number + 2]
        for name, parts in zip(names, found, strict=True):
            if start < stop:
                parts.append(np.asarray(job.array(phase, index, name)[start:stop]))
            elif not parts:
                parts.append(np.asarray(job.array(phase, index, name)[:0]))
    return [np.concatenate(parts) for parts in found]
