"""Exact and near duplicates, found by partitions.

A document is an exact duplicate if an earlier one has its digest, so the documents of one range of
digests are decided alone. A near duplicate resembles an earlier document that is kept, so the
decision about a document depends on those before it. But only documents that share the key of a
band are compared. So documents are grouped: two are in one group if a chain of shared keys joins
them. A group is decided in the order of the corpus by `NearDuplicates`, as a whole corpus would be,
and groups are decided in parallel. Documents that share no key are kept.

A bucket of m documents with the same key adds m - 1 pairs to the chains, not m squared. The groups
of a corpus that was made from a template are large, and a group is decided by one task.
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
    """Phase "exact": the exact duplicates in a range of digests."""
    ids, digests = of_partition(job, ("exact_ids", "exact_digests"), "exact_bounds", partition)
    order = np.argsort(ids)
    with job.writing("exact", partition) as draft:
        draft.save(dropped=ids[order][~first_of_equal(digests[order])])


def write_bands(job: Job, partition: int) -> None:
    """Phase "bands": pairs of documents that join all documents with the same key."""
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
    """Phase "groups": the documents that may be near duplicates, by the task that decides them."""
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

    Labels of pairs are hooked onto the smaller one, and chains of labels are halved, until nothing
    changes (Shiloach and Vishkin 1982, "An O(log n) parallel connectivity algorithm").
    """
    labels = np.arange(count)
    while len(pairs):
        low, high = (end(labels[pairs[:, 0]], labels[pairs[:, 1]]) for end in _ENDS)
        differ = low != high
        # As one number each, since rows of an array are sorted many times as slowly.
        pairs = np.stack(np.divmod(np.unique(low[differ] * count + high[differ]), count), axis=1)
        np.minimum.at(labels, pairs[:, 1], pairs[:, 0])
        while not np.array_equal(labels, labels[labels]):
            labels = labels[labels]
    return labels


def write_near(job: Job, task: int) -> None:
    """Phase "near": the near duplicates in some of the groups."""
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
    """The signatures of documents, which are in the order of the corpus."""
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
    """Phase "dropped-exact" or "dropped-near": join what the partitions of a phase found."""
    parts = [np.array(job.array(phase, number, "dropped")) for number in range(job.partitions)]
    with job.writing(f"dropped-{phase}", 0) as draft:
        draft.save(dropped=np.sort(np.concatenate(parts)))
