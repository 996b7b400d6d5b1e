"""Find exact and near duplicates in parallel.

A document is an exact duplicate if an earlier document has the same digest. Each task compares the
documents in one range of digests.

A near duplicate resembles an earlier document that is kept, so the decision about a document
depends on earlier decisions. Only documents that share a band key are compared. So documents are
grouped: two documents are in the same group if a chain of shared keys connects them.
`NearDuplicates` compares the documents of a group in corpus order, with the same result as for the
whole corpus. Groups are processed in parallel. Documents that share no key are kept.

If m documents share a key, m - 1 pairs connect them, not m squared. A corpus that was made from a
template has large groups, and each group is processed by a single task.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt32, UInt64

from consyn_jax.data.preparation.exact_duplicates import first_of_equal
from consyn_jax.data.preparation.near_duplicates import NearDuplicates
from consyn_jax.data.preparation.segments.encode import PART, signatures_of
from consyn_jax.data.preparation.segments.job import Job, among, rows_of, segment_of
from consyn_jax.data.preparation.segments.partitions import of_partition

CHUNK = 4096  # documents that are compared at once
_ENDS = (np.minimum, np.maximum)


def write_exact(job: Job, partition: int) -> None:
    """Phase "exact": find the exact duplicates in one range of digests."""
    ids, digests = of_partition(job, ("exact_ids", "exact_digests"), "exact_bounds", partition)
    order = np.argsort(ids)
    with job.writing("exact", partition) as draft:
        draft.save(dropped=ids[order][~first_of_equal(digests[order])])


def write_bands(job: Job, partition: int) -> None:
    """Phase "bands": write pairs that connect all documents with the same band key."""
    ids, keys = of_partition(job, ("key_ids", "keys"), "key_bounds", partition)
    if job.drops_duplicates:
        compared = ~among(ids, job.array("dropped-exact", 0, "dropped"))
        ids, keys = ids[compared], keys[compared]
    order = np.lexsort((ids, keys))
    ids, keys = ids[order], keys[order]
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]][: len(keys)])
    first = np.repeat(starts, np.diff(np.r_[starts, len(keys)]))
    joined = np.flatnonzero(first != np.arange(len(keys)))
    pairs = np.stack([ids[first[joined]], ids[joined]], axis=1)
    with job.writing("bands", partition) as draft:
        draft.save(pairs=np.unique(pairs, axis=0))


def write_groups(job: Job, number: int) -> None:
    """Phase "groups": group the possible near duplicates, and assign each group to a task."""
    pairs = np.concatenate(
        [np.array(job.array("bands", p, "pairs")) for p in range(job.partitions)]
    )
    ids, places = np.unique(pairs, return_inverse=True)
    labels = _joined(places.reshape(-1, 2), len(ids))
    _, labels, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    before = np.cumsum(sizes) - sizes
    tasks = (before * job.partitions // max(len(ids), 1))[labels]
    order = np.argsort(tasks, kind="stable")  # within a task, in the order of the corpus
    with job.writing("groups", number) as draft:
        bounds = np.searchsorted(tasks[order], np.arange(job.partitions + 1))
        draft.save(ids=ids[order], bounds=bounds)


def _joined(pairs: Int64[np.ndarray, "pairs 2"], count: int) -> Int64[np.ndarray, " count"]:
    """Label each of `count` documents with the first document of its group.

    This finds connected components (Shiloach and Vishkin 1982, "An O(log n) parallel connectivity
    algorithm"). Each pass links the larger label of every pair to the smaller one, and shortens
    chains of labels by pointer jumping.
    """
    labels = np.arange(count)
    while len(pairs):
        low, high = (end(labels[pairs[:, 0]], labels[pairs[:, 1]]) for end in _ENDS)
        differ = low != high
        # Each pair becomes one number, because sorting the rows of an array is many times slower.
        pairs = np.stack(np.divmod(np.unique(low[differ] * count + high[differ]), count), axis=1)
        np.minimum.at(labels, pairs[:, 1], pairs[:, 0])
        while not np.array_equal(labels, labels[labels]):
            labels = labels[labels]
    return labels


def write_near(job: Job, task: int) -> None:
    """Phase "near": find the near duplicates in the groups of one task."""
    assert job.threshold is not None
    start, stop = job.array("groups", 0, "bounds")[task : task + 2]
    ids = np.asarray(job.array("groups", 0, "ids")[start:stop])
    dropped = [ids[:0]]
    with tempfile.TemporaryDirectory() as directory:
        index = NearDuplicates(Path(directory) / "signatures", job.threshold)
        for at in range(0, len(ids), CHUNK):
            some = ids[at : at + CHUNK]
            dropped.append(some[~index.first(_signatures(job, some))])
        index.close()
    with job.writing("near", task) as draft:
        draft.save(dropped=np.concatenate(dropped))


def _signatures(job: Job, ids: UInt64[np.ndarray, " n"]) -> UInt32[np.ndarray, "n 128"]:
    """Return the signatures of the documents with the sorted numbers `ids`."""
    found = []
    segments, rows = segment_of(ids), rows_of(ids)
    long_ids = job.array("long", 0, "end")
    for segment in np.unique(segments).tolist():
        here = segments == segment
        signatures = signatures_of(job, segment)[rows[here]]
        is_part = job.array("segments", segment, "flags")[rows[here]] & PART > 0
        long = np.searchsorted(long_ids, ids[here][is_part])
        signatures[is_part] = job.array("long", 0, "signatures")[long]
        found.append(signatures)
    return np.concatenate(found)


def write_dropped(job: Job, phase: str) -> None:
    """Phase "dropped-exact" or "dropped-near": merge the duplicates from all tasks of a phase."""
    parts = [np.array(job.array(phase, number, "dropped")) for number in range(job.partitions)]
    with job.writing(f"dropped-{phase}", 0) as draft:
        draft.save(dropped=np.sort(np.concatenate(parts)))
