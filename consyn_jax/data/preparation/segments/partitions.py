"""Group documents into partitions: ranges of their digests, or of the keys of their bands.

Each segment has the following arrays. So do the long documents, once all segments are known:

    exact_ids      documents that are compared as exact duplicates, grouped by partition
    exact_digests  digests of these documents, in the same order
    exact_bounds   where each partition begins in `exact_ids` and `exact_digests`
    key_ids, keys, key_bounds    the same three arrays for the band keys of near duplicates

The task of a partition reads one range of each array. Documents with equal digests or keys are in
the same partition.
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
    """Build the arrays for the documents `ids`.

    Args:
        signatures: None if near duplicates are kept.
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
    """Return the order that groups values by partition, and where each partition begins.

    Values of the same partition stay in their given order.
    """
    high = values >> np.uint64(32)
    numbers = ((high * np.uint64(partitions)) >> np.uint64(32)).astype(np.uint16)
    order = np.argsort(numbers, kind="stable")
    return order, np.searchsorted(numbers[order], np.arange(partitions + 1))


def of_partition(job: Job, names: tuple[str, ...], bounds: str, number: int) -> list[np.ndarray]:
    """Read a partition: its range of each array, from all segments and from the long documents.

    Args:
        names: names of the arrays.
        bounds: name of the array that says where partitions begin.
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
