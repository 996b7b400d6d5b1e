"""Group documents into partitions, which are ranges of digests or of band keys.

Each segment has the following arrays. Once all segments are known, all long documents together have
such arrays, too:

    exact_ids      documents that are compared as exact duplicates, grouped by partition
    exact_digests  digests of these documents, in the same order
    exact_bounds   where each partition begins in `exact_ids` and `exact_digests`, as one row
    key_ids, keys, key_bounds    the same three arrays for the band keys of near duplicates

A document has dozens of band keys, so they are grouped and saved in pieces to use little memory.
`keys` is the first piece, `keys-1` the second; `key_bounds` has one row for each piece.

The task of a partition reads one range of each array. Documents with equal digests or keys are in
the same partition.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int64, UInt8, UInt32, UInt64

from consyn_jax.data.preparation.near_duplicates import band_keys, bands_and_rows, worded
from consyn_jax.data.preparation.segments.job import Draft, Job

PIECE_KEYS = 1 << 21  # keys that are grouped at once, in some 100 MB


def save_compared(
    job: Job,
    draft: Draft,
    ids: UInt64[np.ndarray, " n"],
    digests: UInt8[np.ndarray, "n 16"],
    signatures: Callable[[slice], UInt32[np.ndarray, "some 128"]],
    may_repeat: Bool[np.ndarray, " n"],
) -> None:
    """Save the arrays of the documents `ids`.

    Args:
        signatures: function that reads the signatures of a slice of the documents.
        may_repeat: True for documents that are kept even if they equal an earlier one.
    """
    if job.drops_duplicates:
        chosen = np.flatnonzero(~may_repeat)
        high = np.ascontiguousarray(digests[chosen]).view(np.uint64)[:, 0]
        order, bounds = _grouped(high, job.partitions)
        chosen = chosen[order]
        draft.save(exact_ids=ids[chosen], exact_digests=digests[chosen], exact_bounds=bounds[None])
    if job.threshold is None:
        return
    bounds_of_pieces = []
    bands, _ = bands_and_rows(job.threshold)
    step = max(PIECE_KEYS // bands, 1)
    for piece, at in enumerate(range(0, max(len(ids), 1), step)):
        here = slice(at, at + step)
        some = signatures(here)
        chosen = np.flatnonzero(worded(some))
        keys = band_keys(some[chosen], job.threshold).reshape(-1)
        order, bounds = _grouped(keys, job.partitions)
        of_keys = ids[here][chosen][order // bands]
        draft.save(**{_of_piece("key_ids", piece): of_keys, _of_piece("keys", piece): keys[order]})
        bounds_of_pieces.append(bounds)
    draft.save(key_bounds=np.stack(bounds_of_pieces))


def _of_piece(name: str, piece: int) -> str:
    return f"{name}-{piece}" if piece else name


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
        ends = job.array(phase, index, bounds)[:, number : number + 2].tolist()
        for piece, (start, stop) in enumerate(ends):
            for name, parts in zip(names, found, strict=True):
                if start < stop or not parts:
                    array = job.array(phase, index, _of_piece(name, piece))
                    # A copy, because a view would keep the file of each segment open.
                    parts.append(np.array(array[start:stop]))
    return [np.concatenate(parts) for parts in found]
