"""Tokens on disk or in memory, and a split: runs of tokens seen as one stream of documents."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, Integer, UInt8

from consyn_jax.config import UserError
from consyn_jax.data.number_file import NumberFile

MANIFEST = "manifest.json"
AGAIN = "Delete the directory and prepare the data again."


def token_dtype(vocab_size: int) -> np.dtype:
    """The type of tokens on disk.

    >>> token_dtype(65_536), token_dtype(65_537)
    (dtype('uint16'), dtype('uint32'))
    """
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


# --------------------------------------------------------------------------------------------------------------- runs of tokens


class Tokens(ABC):
    """A run of tokens that a split is made of.

    Attributes:
        num_tokens: how many.
        num_targets: how many of them are targets of the loss.
        num_documents, num_bytes: documents that begin here, and the size of their text in UTF-8; None where nobody knows.
        dtype: the type of the tokens.
        verified: whether `verify` has succeeded.
        delimiter: once verified, an id that stands in front of every document start and nowhere else, or None where there is no
            such id. It saves looking document starts up.
    """

    num_tokens: int
    num_targets: int
    num_documents: int | None
    num_bytes: int | None
    dtype: np.dtype
    verified: bool = True
    delimiter: int | None = None

    @property
    @abstractmethod
    def starts(self) -> Int64[np.ndarray, " num_documents"]:
        """Where in the run each document starts, checked; a new memory map where that is on disk."""

    @abstractmethod
    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with the tokens from `start` on, in its own type."""

    def read_targets(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with 1 for each token from `start` on that is a target of the loss, else 0."""
        out[:] = 1

    @abstractmethod
    def verify(self) -> None:
        """Check what is to be read, the first time. Any thread may call it at any time.

        Raises:
            UserError: it is not what it should be; the message names the file.
        """


class Shard(Tokens):
    """One shard of a token store: a file of tokens, its index and, for fine-tuning rows, its targets.

    Opening looks at the sizes of the files. Their checksums, and what a checksum by a stranger does not promise, are checked on the
    first read.

    Args:
        entry: the shard in the manifest. "targets", "targets_sha256" and "target_tokens" are there where not all tokens are targets.

    Raises:
        UserError: a file is missing or of the wrong size.
    """

    def __init__(self, directory: Path, entry: dict[str, Any], vocab_size: int) -> None:
        self._entry, self._vocab_size = entry, vocab_size
        self.dtype = token_dtype(vocab_size)
        self.num_tokens, self.num_documents, self.num_bytes = entry["tokens"], entry["documents"], entry["bytes"]
        self.num_targets = entry.get("target_tokens", self.num_tokens)
        self._lock = threading.Lock()
        self.verified = self._index_verified = False
        place = str(directory)  # a store has tens of thousands of files: strings are much faster than paths
        self._tokens = NumberFile(os.path.join(place, entry["file"]), self.dtype, self.num_tokens)  # noqa: PTH118
        # int64, not uint64: numpy would compare a uint64 with a signed number as floats.
        self._index = NumberFile(os.path.join(place, entry["index"]), np.dtype("<i8"), entry["documents"])  # noqa: PTH118
        self._targets = NumberFile(os.path.join(place, entry["targets"]), np.dtype("u1"), self.num_tokens) if "targets" in entry else None  # noqa: PTH118
        for file in (self._tokens, self._index, self._targets):
            if file is not None:
                _check_size(file)

    @property
    def starts(self) -> Int64[np.ndarray, " num_documents"]:
        """Where each document starts, in a new memory map. Only the index is checked for it."""
        with self._lock:
            self._verify_index()
        return self._index.mapped()

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with the tokens from `start` on."""
        if not self.verified:
            self.verify()
        self._tokens.read(start, out)

    def read_targets(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with 1 for each token from `start` on that is a target of the loss, else 0."""
        if self._targets is None:
            out[:] = 1
            return
        if not self.verified:
            self.verify()
        self._targets.read(start, out)

    def verify(self) -> None:
        """Check all files of the shard, the first time; about a second a gigabyte.

        Raises:
            UserError: a file does not match its checksum, or its content makes no sense.
        """
        with self._lock:
            if not self.verified:
                self._verify_index()
                self._verify_tokens()
                self._verify_targets()
                self.verified = True

    def _verify_index(self) -> None:
        if self._index_verified:
            return
        digest, last, rising = hashlib.sha256(), -1, True
        for starts in self._index.chunks():
            digest.update(starts.data)
            first = int(starts[0])
            rising = rising and (first > last if last >= 0 else first == 0) and not (starts[1:] <= starts[:-1]).any()
            last = int(starts[-1])
        self._compare(digest, self._index, "index_sha256")
        if not rising or last >= self.num_tokens:
            raise UserError(f"The token store is damaged: the document starts in {self._index.path} do not rise from 0. {AGAIN}")
        self._index_verified = True

    def _verify_tokens(self) -> None:
        """One pass for the checksum, the largest id, and whether the id that ends the shard is the `delimiter` of its documents."""
        final = np.empty(1, self.dtype)
        self._tokens.read(self.num_tokens - 1, final)
        digest, top, base, document, delimits = hashlib.sha256(), 0, 0, 1, True
        for tokens in self._tokens.chunks():
            digest.update(tokens.data)
            top = max(top, int(tokens.max()))
            if delimits:
                ends = np.flatnonzero(tokens == final) + (base + 1)
                starts = np.full(len(ends), self.num_tokens)
                there = starts[: max(self._index.count - document, 0)]
                self._index.read(document, there)
                delimits = np.array_equal(ends, starts)
                document += len(ends)
            base += len(tokens)
        self._compare(digest, self._tokens, "sha256")
        # A store may come from anywhere: an id beyond the vocabulary would silently read another embedding.
        if top >= self._vocab_size:
            raise UserError(f"The token store is damaged: {self._tokens.path} has token id {top} and a vocabulary of {self._vocab_size}. {AGAIN}")
        self.delimiter = int(final[0]) if delimits else None

    def _verify_targets(self) -> None:
        if self._targets is None:
            return
        digest, top, count = hashlib.sha256(), 0, 0
        for targets in self._targets.chunks():
            digest.update(targets.data)
            top = max(top, int(targets.max()))
            count += int(np.count_nonzero(targets))
        self._compare(digest, self._targets, "targets_sha256")
        if top > 1:
            raise UserError(f"The token store is damaged: {self._targets.path} has the value {top}, and a token is a target (1) or not (0). {AGAIN}")
        if count != self.num_targets:
            raise UserError(f"The token store is damaged: {self._targets.path} has {count:,} targets where the manifest says {self.num_targets:,}. {AGAIN}")

    def _compare(self, digest: Any, file: NumberFile, key: str) -> None:
        if digest.hexdigest() != self._entry[key]:
            raise UserError(f"The token store is damaged: {file.path} does not match its checksum in {MANIFEST}. {AGAIN}")


def _check_size(file: NumberFile) -> None:
    expected = file.count * file.dtype.itemsize
    try:
        status = os.stat(file.path)  # noqa: PTH116
    except OSError as error:
        raise UserError(f"The token store is damaged: {file.path} is missing. {AGAIN}") from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"The token store is damaged: {file.path} is not a file. {AGAIN}")
    if status.st_size != expected:
        raise UserError(f"The token store is damaged: {file.path} has {status.st_size:,} bytes where the manifest says {expected:,}. {AGAIN}")


class MemoryShard(Tokens):
    """Documents in memory. EOS is put behind each that lacks it; the bytes of their text are not known.

    Args:
        documents: the ids of each, without BOS.
        targets: for each document, 1 where a token is a target of the loss, else 0; an EOS that is put behind it is a target.
    """

    def __init__(self, documents: Sequence[np.ndarray], eos_id: int, targets: Sequence[np.ndarray] | None = None) -> None:
        ended = [ids if len(ids) and ids[-1] == eos_id else np.append(ids, eos_id) for ids in documents]
        lengths = np.array([len(ids) for ids in ended], np.int64)
        self._tokens, self._starts = np.concatenate(ended), np.cumsum(lengths) - lengths
        self._targets = None
        if targets is not None:
            padded = [np.append(marks, 1) if len(marks) < len(ids) else marks for marks, ids in zip(targets, ended, strict=True)]
            self._targets = np.concatenate(padded).astype(np.uint8)
            if len(self._targets) != len(self._tokens):
                raise ValueError("Every document needs as many targets as it has tokens.")
        self.dtype, self.num_bytes = self._tokens.dtype, None
        self.num_tokens, self.num_documents = len(self._tokens), len(ended)
        self.num_targets = self.num_tokens if self._targets is None else int(np.count_nonzero(self._targets))
        self.delimiter = eos_id if np.count_nonzero(self._tokens == eos_id) == len(ended) else None

    @property
    def starts(self) -> Int64[np.ndarray, " num_documents"]:
        """Where each document starts."""
        return self._starts

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with the tokens from `start` on."""
        out[:] = self._tokens[start : start + len(out)]

    def read_targets(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with 1 for each token from `start` on that is a target of the loss, else 0."""
        out[:] = 1 if self._targets is None else self._targets[start : start + len(out)]

    def verify(self) -> None:
        """Nothing to check."""


# ----------------------------------------------------------------------------------------------------------------------- splits


class StoreSplit:
    """The runs of tokens of one split, seen as one stream: the documents in store order, each ended by EOS.

    Attributes:
        num_targets: tokens that are targets of the loss.
        num_documents: None where nobody has counted them (raw token files).
        num_bytes: size of the documents' text in UTF-8; None where a shard does not know it.
        dtype: a type that holds every shard's tokens.
    """

    def __init__(self, shards: Sequence[Tokens]) -> None:
        self.shards = tuple(shards)
        self._offsets = [0, *accumulate(shard.num_tokens for shard in shards)]  # stream positions of the shards, and of the end
        self.num_tokens = self._offsets[-1]
        self.num_targets = sum(shard.num_targets for shard in shards)
        self.num_documents = _sum(shard.num_documents for shard in shards)
        self.num_bytes = _sum(shard.num_bytes for shard in shards)
        self.dtype: np.dtype = np.result_type(*{shard.dtype for shard in shards}) if shards else np.dtype(np.uint16)

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out`, one-dimensional and contiguous, with the tokens from stream position `start` on."""
        if not len(out):
            return
        number = self._number(start)
        if start + len(out) <= self._offsets[number + 1]:
            self.shards[number].read(start - self._offsets[number], out)
            return
        for number, at, part in self._parts(start, out):
            self.shards[number].read(at, part)

    def read_targets(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with 1 for each token from stream position `start` on that is a target of the loss, else 0."""
        for number, at, part in self._parts(start, out):
            self.shards[number].read_targets(at, part)

    def windows(
        self, first: Int64[np.ndarray, " n"], width: int
    ) -> tuple[Integer[np.ndarray, "n width_and_1"], Bool[np.ndarray, "n width"], UInt8[np.ndarray, "n width"] | None]:
        """Windows of the stream from positions `first` on: (tokens, begins, targets).

        Each row of `tokens` has the token in front of the window first (0 in front of the stream). `begins` is true where a document
        starts. `targets` is None where all tokens are targets. Behind the end of the stream there are zeros.
        """
        n, starts = len(first), first.tolist()
        stops = [min(start + width, self.num_tokens) for start in starts]
        touched = self.verify(starts, stops)
        tokens = np.empty((n, width + 1), self.dtype)
        for row, start, stop in zip(tokens, starts, stops, strict=True):
            if start > 0 and stop == start + width:
                self.read(start - 1, row)
            else:
                row[0] = 0
                row[1 + stop - start :] = 0
                known = row[: 1 + stop - start] if start else row[1 : 1 + stop]
                self.read(max(start - 1, 0), known)
        targets = None
        if self.num_targets < self.num_tokens:
            targets = np.zeros((n, width), np.uint8)
            for row, start, stop in zip(targets, starts, stops, strict=True):
                self.read_targets(start, row[: stop - start])
        return tokens, self._begins(first, touched, tokens), targets

    def verify(self, starts: Iterable[int], stops: Iterable[int]) -> list[int]:
        """Verify the shards that the pieces start .. stop lie in, side by side (hashing leaves other threads room); their numbers.

        Raises:
            UserError: of the first of them that is damaged.
        """
        numbers: set[int] = set()
        for start, stop in zip(starts, stops, strict=True):
            first, last = self._number(start), self._number(stop - 1)
            numbers.update((first,) if first == last else range(first, last + 1))
        touched = sorted(numbers)
        fresh = [self.shards[number] for number in touched if not self.shards[number].verified]
        if len(fresh) == 1:
            fresh[0].verify()
        elif fresh:
            with ThreadPoolExecutor(min(len(fresh), os.cpu_count() or 1)) as pool:
                for _ in pool.map(lambda shard: shard.verify(), fresh):
                    pass
        return touched

    def document_starts(self) -> Iterator[Int64[np.ndarray, " _"]]:
        """Stream positions where documents start, in order, a shard at a time."""
        for shard, offset in zip(self.shards, self._offsets, strict=False):
            yield shard.starts + offset

    def _number(self, position: int) -> int:
        return bisect_right(self._offsets, position) - 1

    def _parts(self, start: int, out: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """(shard, position in it, part of `out`) of a piece of the stream."""
        number, length, done = self._number(start), len(out), 0
        while done < length:
            at = start + done - self._offsets[number]
            stop = min(length, self._offsets[number + 1] - start)
            yield number, at, out[done:stop]
            number, done = number + 1, stop

    def _begins(self, first: Int64[np.ndarray, " n"], touched: list[int], tokens: np.ndarray) -> Bool[np.ndarray, "n width"]:
        width = tokens.shape[1] - 1
        delimiters = {self.shards[number].delimiter for number in touched}
        delimiter = delimiters.pop() if len(delimiters) == 1 else None
        if delimiter is not None:
            begins = tokens[:, :-1] == delimiter
            begins[first == 0, 0] = True
            return begins
        begins = np.zeros((len(first), width), bool)
        for number in touched:
            starts, local = self.shards[number].starts, first - self._offsets[number]
            low, high = np.searchsorted(starts, local), np.searchsorted(starts, local + width)
            counts = high - low
            row = np.repeat(np.arange(len(first)), counts)
            nth = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
            begins[row, starts[low[row] + nth] - local[row]] = True
        return begins


def _sum(numbers: Iterable[int | None]) -> int | None:
    """The sum, or None where one is not known."""
    known = list(numbers)
    return None if None in known else sum(number for number in known if number is not None)
