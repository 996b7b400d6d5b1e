r"""Near duplicates: documents whose sets of word 5-grams overlap, found by MinHash and banding.

The signature of a document holds the smallest of the 5-grams' hashes under each of 128
permutations. The share of equal entries of two signatures estimates the Jaccard similarity s of the
two sets (Broder 1997, "On the resemblance and containment of documents") with a standard deviation
of sqrt(s (1 - s) / 128), 0.035 at 0.8. The permutations are multiplications of 32-bit hashes by odd
numbers, applied to about a thousand hashes at a time. One-permutation hashing (Li, Owen and Zhang
2012) would save only a sixth of the time, because finding and hashing words takes most of it. It
also needs densification, and has a larger error for short documents.

The signature is cut into bands of rows. A document is compared only with documents that agree with
it in all rows of some band, which happens with probability 1 - (1 - s^rows)^bands (Leskovec,
Rajaraman and Ullman, "Mining of Massive Datasets", section 3.4); see `bands_and_rows`.

xxhash hashes the words. Words are runs of `\w`, so punctuation and spacing make no difference. In
a language without spaces, a word is the text between punctuation marks, and only documents that
share whole clauses are found.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt32, UInt64
from xxhash import xxh3_64_intdigest

from consyn_jax.data.order import mix
from consyn_jax.data.preparation import exact_duplicates
from consyn_jax.data.preparation.exact_duplicates import Recorded, RecordFile, SortedRuns

PERMUTATIONS = 128
GRAM_WORDS = 5
# Least probability that a pair exactly at the threshold agrees in some band.
RECALL = 0.98
EMPTY = 2**32 - 1
_STEP = 1024  # hashes permuted at once; 128 times as many fit a core's cache
_WORDS = re.compile(r"\w+")
# Never change these multipliers: signatures are stored in files. They are odd, so that each is a
# permutation.
_CONSTANTS = mix(
    np.arange(1, 2 * PERMUTATIONS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
) | np.uint64(1)
_MULTIPLIERS = (_CONSTANTS[:PERMUTATIONS, None] >> np.uint64(32)).astype(np.uint32) | np.uint32(1)


def signature(text: str) -> UInt32[np.ndarray, "128"]:
    """The MinHash signature of a text's lower-cased word 5-grams.

    Fewer than five words count as one gram; without words all entries are `EMPTY`. The signature of
    a long document is the element-wise minimum over its parts. Speed: about 20 MB/s on one core,
    with about 15 bytes of memory per byte of text.
    """
    words = _WORDS.findall(text.lower())
    smallest = np.full(PERMUTATIONS, EMPTY, np.uint32)
    if not words:
        return smallest
    hashes = np.fromiter(map(xxh3_64_intdigest, map(str.encode, words)), np.uint64, len(words))
    gram = min(GRAM_WORDS, len(words))
    count = len(words) - gram + 1
    mixed = np.zeros(count, np.uint64)
    for i in range(gram):
        mixed += hashes[i : i + count] * _CONSTANTS[i]
    # The high bits depend on every bit of every word. The hash is made odd, because zero would be
    # the smallest value under every permutation.
    grams = (mixed >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
    permuted = np.empty((PERMUTATIONS, min(_STEP, count)), np.uint32)
    for start in range(0, count, _STEP):
        some = grams[start : start + _STEP]
        out = np.multiply(some, _MULTIPLIERS, out=permuted[:, : len(some)])
        np.minimum(smallest, out.min(axis=1), out=smallest)
    return smallest


def bands_and_rows(threshold: float) -> tuple[int, int]:
    """Choose (bands, rows per band).

    A pair of documents whose similarity is `threshold` agrees in all rows of some band with
    probability 1 - (1 - threshold^rows)^bands. This must be at least `RECALL`. Among the choices
    that reach it, the one with the most rows is best: it compares the fewest documents without
    need, and keeps the fewest keys in memory.

    >>> bands_and_rows(0.8), bands_and_rows(0.5), bands_and_rows(1.0)
    ((18, 7), (42, 3), (1, 128))
    """
    for rows in range(PERMUTATIONS, 1, -1):
        bands = PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** bands >= RECALL:
            return bands, rows
    return PERMUTATIONS, 1


class NearDuplicates(Recorded):
    """An index of the signatures of all documents kept so far.

    The index takes 12 bytes of memory per band for each kept document, which is 216 bytes per
    document at a threshold of 0.8. It takes twice as much while its largest parts are merged. The
    signatures (512 bytes per kept document) stay in the file.

    In a corpus made from a template, many documents are similar, but below the threshold. Each
    document is then compared with a share of all earlier documents, so time grows quadratically.

    Args:
        path: the file, created if missing.
        threshold: smallest share of equal entries of two signatures at which the later document is
            left out, in (0, 1].
        count: number of valid documents in the file; the rest of the file is cut off.

    Raises:
        ValueError: the threshold is outside its range, or the file holds fewer documents than
            `count`.
        OSError: the file cannot be read or written. All methods can raise this error, too.
    """

    def __init__(self, path: Path, threshold: float, count: int = 0) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(
                f"The threshold of near duplicates is {threshold}; give a number above 0 and up to "
                "1."
            )
        self._threshold = threshold
        self._bands = bands_and_rows(threshold)[0]
        super().__init__(RecordFile(path, 4 * PERMUTATIONS, count))
        self._runs = SortedRuns(np.dtype(np.uint32))
        chunk = exact_duplicates.CHUNK
        for start in range(0, count, chunk):
            self._index(self._records.read(start, min(chunk, count - start)).view("<u4"), start)

    def first(self, signatures: UInt32[np.ndarray, "n 128"]) -> Bool[np.ndarray, " n"]:
        """Record, in order, each document that resembles no recorded one; return True for these.

        Documents recorded in the same call count as well, so decisions do not depend on how
        documents are divided into calls. A document without words is always kept, because its
        signature does not describe it.
        """
        keys = band_keys(signatures, self._threshold)
        kept = ~self._resemble_stored(signatures, keys)
        _, group, sizes = np.unique(keys, return_inverse=True, return_counts=True)
        group = group.reshape(keys.shape)
        shared = (sizes[group] > 1) & worded(signatures)[:, None]
        members: dict[int, list[int]] = {}
        for i in np.flatnonzero(kept & shared.any(axis=1)).tolist():
            bands = group[i, shared[i]].tolist()
            candidates = sorted({j for band in bands for j in members.get(band, ())})
            if self._similar(signatures[candidates], signatures[i : i + 1]).any():
                kept[i] = False
            else:
                for band in bands:
                    members.setdefault(band, []).append(i)
        chosen = signatures[kept]
        self._index(chosen, self.count)
        self._records.append(chosen.astype("<u4", copy=False).view(np.uint8))
        return kept

    def _resemble_stored(
        self, signatures: UInt32[np.ndarray, "n 128"], keys: UInt64[np.ndarray, "n bands"]
    ) -> Bool[np.ndarray, " n"]:
        found = np.zeros(len(signatures), bool)
        order = np.argsort(keys, axis=None)  # sorted keys are found fastest
        for position, stored in self._runs.find(keys.reshape(-1)[order]):
            document = order[position] // self._bands
            undecided = ~found[document]
            pairs = np.unique(np.stack([stored[undecided], document[undecided]]), axis=1)
            numbers, which = np.unique(pairs[0].astype(np.uint32), return_inverse=True)
            similar = self._similar(
                self._records.take(numbers).view("<u4")[which], signatures[pairs[1]]
            )
            found[pairs[1][similar]] = True
        return found

    def _similar(
        self, a: UInt32[np.ndarray, "n 128"], b: UInt32[np.ndarray, "m 128"]
    ) -> Bool[np.ndarray, " n"]:
        return np.count_nonzero(a == b, axis=1) >= self._threshold * PERMUTATIONS

    def _index(self, signatures: UInt32[np.ndarray, "n 128"], start: int) -> None:
        """Add the bands of documents `start`, `start + 1` and so on."""
        chosen = worded(signatures)
        numbers = np.arange(start, start + len(signatures), dtype=np.uint32)[chosen]
        keys = band_keys(signatures[chosen], self._threshold)
        self._runs.add(keys.reshape(-1), np.repeat(numbers, self._bands))


def band_keys(
    signatures: UInt32[np.ndarray, "n 128"], threshold: float
) -> UInt64[np.ndarray, "n bands"]:
    """The key of each band: a hash of the rows and the number of the band."""
    num_bands, rows = bands_and_rows(threshold)
    bands = signatures[:, : num_bands * rows].astype(np.uint64).reshape(-1, num_bands, rows)
    sums = (bands * _CONSTANTS[:rows]).sum(axis=2, dtype=np.uint64) + _CONSTANTS[
        PERMUTATIONS : PERMUTATIONS + num_bands
    ]
    return mix(sums.reshape(-1)).reshape(sums.shape)


def worded(signatures: UInt32[np.ndarray, "n 128"]) -> Bool[np.ndarray, " n"]:
    """Whether each document has a word; without words, a signature is all `EMPTY`."""
    return (signatures != EMPTY).any(axis=1)
