"""Shards of a split: contiguous tokens on disk or in memory."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt64

from consyn_jax.data.store.manifest import (
    AGAIN,
    BETWEEN,
    GIVEN,
    MANIFEST,
    ORIGIN_BYTES,
    token_dtype,
)
from consyn_jax.data.store.number_file import NumberFile
from consyn_jax.errors import UserError


class Tokens(ABC):
    """Contiguous tokens that are part of a split.

    Attributes:
        num_tokens: number of tokens.
        num_targets: number of tokens that are targets of the loss.
        num_documents, num_bytes: number of documents that begin in these tokens, and the size of
            their text in UTF-8 bytes; None if unknown.
        dtype: the type of the tokens.
        verified: whether the content is known to be valid.
        delimiter: after `verify`, the id that comes directly before every document start and occurs
            nowhere else; None if there is no such id. With it, document starts are found without
            the index.
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
        """Token position at which each document starts; the positions have been checked.

        If the tokens are on disk, each access makes a new memory map.
        """

    @abstractmethod
    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with the tokens from `start` on, converted to the dtype of `out`."""

    def read_targets(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with the target values of the tokens from `start` on.

        A value is 1 for a target of the loss and 0 for other tokens. If a document needs no BOS,
        `GIVEN` marks its first token, which is only an input. `BETWEEN` marks the token between the
        two sequences of a pair.
        """
        out[:] = 1

    def peek(self, start: int, out: np.ndarray) -> None:
        """Read tokens as `read` does, without checking the content first."""
        self.read(start, out)

    def peek_targets(self, start: int, out: np.ndarray) -> None:
        """Read targets as `read_targets` does, without checking the content first."""
        self.read_targets(start, out)

    def origins(self) -> UInt64[np.ndarray, "num_documents 3"] | None:
        """Origin of each document, in the format of `manifest.py`; None if unknown."""
        return None

    @abstractmethod
    def verify(self) -> None:
        """Check the content, on the first call only. Thread-safe.

        Raises:
            UserError: the content is damaged; the message names the file.
        """


class Shard(Tokens):
    """One shard of a token store: files of tokens, of document starts and, if needed, of targets.

    The constructor checks the sizes of the files. The first read checks their checksums and
    content, because the store may come from an untrusted source.

    Args:
        entry: the shard's entry in the manifest; "targets", "targets_sha256" and "target_tokens"
            are present if some tokens are not targets.
        holds_pairs: whether the documents are pairs of answers.

    Raises:
        UserError: a file is missing or of the wrong size.
    """

    def __init__(
        self, directory: Path, entry: dict[str, Any], vocab_size: int, holds_pairs: bool = False
    ) -> None:
        self.directory, self._entry, self._vocab_size = directory, entry, vocab_size
        self._last_mark = BETWEEN if holds_pairs else GIVEN
        self.dtype = token_dtype(vocab_size)
        self.num_tokens, self.num_documents = entry["tokens"], entry["documents"]
        self.num_bytes = entry["bytes"]
        self.num_targets = entry.get("target_tokens", self.num_tokens)
        self._lock = threading.Lock()
        self.verified = self._index_verified = False

        def numbers(name: str, dtype: np.dtype[Any], count: int) -> NumberFile:
            # Use strings, because a store has tens of thousands of files and `Path` objects are
            # much slower.
            return NumberFile(os.path.join(str(directory), name), dtype, count)  # noqa: PTH118

        self._tokens = numbers(entry["file"], self.dtype, self.num_tokens)
        # Use int64, because numpy compares uint64 with signed numbers as floats.
        self._index = numbers(entry["index"], np.dtype("<i8"), entry["documents"])
        self._targets = None
        if "targets" in entry:
            self._targets = numbers(entry["targets"], np.dtype("u1"), self.num_tokens)
        self._origins = None
        if "origins" in entry:
            self._origins = numbers(
                entry["origins"], np.dtype("<u8"), entry["documents"] * ORIGIN_BYTES // 8
            )
        for file in (self._tokens, self._index, self._targets, self._origins):
            if file is not None:
                _check_size(file)

    @property
    def split_name(self) -> str:
        """Name of the shard's split, taken from the name of its file."""
        return str(self._entry["file"]).rsplit("-", 1)[0]

    @property
    def starts(self) -> Int64[np.ndarray, " num_documents"]:
        """Start of each document, in a new memory map. Only the index file is checked."""
        with self._lock:
            self._verify_index()
        return self._index.mapped()

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with the tokens from `start` on."""
        if not self.verified:
            self.verify()
        self._tokens.read(start, out)

    def read_targets(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with the target values of the tokens from `start` on; see `Tokens`."""
        if self._targets is None:
            out[:] = 1
            return
        if not self.verified:
            self.verify()
        self._targets.read(start, out)

    def peek(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with the tokens from `start` on, without checking the file."""
        self._tokens.read(start, out)

    def peek_targets(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with the target values from `start` on, without checking the file."""
        if self._targets is None:
            out[:] = 1
        else:
            self._targets.read(start, out)

    def origins(self) -> UInt64[np.ndarray, "num_documents 3"] | None:
        """Read the origin of each document, and check the file at every call; None without origins.

        Raises:
            UserError: the file does not match its checksum.
        """
        if self._origins is None:
            return None
        digest = hashlib.sha256()
        for numbers in self._origins.chunks():
            digest.update(numbers.data)
        self._compare(digest, self._origins, "origins_sha256")
        return self._origins.mapped().reshape(-1, ORIGIN_BYTES // 8)

    def verify(self) -> None:
        """Check the files of the shard, on the first call only, at about 1 GB/s.

        Training does not read the file with the documents' origins, so only `origins` checks that
        file.

        Raises:
            UserError: a file does not match its checksum, or its content is invalid.
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
            rising = (
                rising
                and (first > last if last >= 0 else first == 0)
                and not (starts[1:] <= starts[:-1]).any()
            )
            last = int(starts[-1])
        self._compare(digest, self._index, "index_sha256")
        if not rising or last >= self.num_tokens:
            raise _damaged(
                f"the document starts in {self._index.path} do not begin at 0, or do not increase"
            )
        self._index_verified = True

    def _verify_tokens(self) -> None:
        """Check the tokens, and find out whether the final token is the `delimiter` of documents.

        One pass computes the checksum and the largest id, and finds all occurrences of the final
        token.
        """
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
        # An id outside the vocabulary would silently select a wrong embedding.
        if top >= self._vocab_size:
            raise _damaged(
                f"{self._tokens.path} has token id {top} outside the vocabulary of "
                f"{self._vocab_size}"
            )
        self.delimiter = int(final[0]) if delimits else None

    def _verify_targets(self) -> None:
        if self._targets is None:
            return
        digest, top, count = hashlib.sha256(), 0, 0
        for targets in self._targets.chunks():
            digest.update(targets.data)
            top = max(top, int(targets.max()))
            count += int(np.count_nonzero(targets == 1))
        self._compare(digest, self._targets, "targets_sha256")
        path = self._targets.path
        if top > self._last_mark:
            raise _damaged(
                f"{path} has the value {top}, but the largest allowed is {self._last_mark}"
            )
        if count != self.num_targets:
            raise _damaged(
                f"{path} has {count:,} targets, but the manifest says {self.num_targets:,}"
            )

    def _compare(self, digest: Any, file: NumberFile, key: str) -> None:
        if digest.hexdigest() != self._entry[key]:
            raise _damaged(f"{file.path} does not match its checksum in {MANIFEST}")


def _check_size(file: NumberFile) -> None:
    expected = file.count * file.dtype.itemsize
    try:
        status = os.stat(file.path)  # noqa: PTH116
    except OSError as error:
        raise _damaged(f"{file.path} is missing") from error
    if not stat.S_ISREG(status.st_mode):
        raise _damaged(f"{file.path} is not a file")
    if status.st_size != expected:
        raise _damaged(
            f"{file.path} has {status.st_size:,} bytes, but the manifest says {expected:,}"
        )


def _damaged(fault: str) -> UserError:
    return UserError(f"The token store is damaged: {fault}. {AGAIN}")


class MemoryShard(Tokens):
    """Documents in memory; an EOS is appended to each document that lacks one.

    Args:
        documents: the ids of each document, without BOS.
        targets: target values of each document, as in `Tokens.read_targets`; an added EOS is a
            target.
    """

    def __init__(
        self,
        documents: Sequence[np.ndarray],
        eos_id: int,
        targets: Sequence[np.ndarray] | None = None,
    ) -> None:
        ended = [
            ids if len(ids) and ids[-1] == eos_id else np.append(ids, eos_id) for ids in documents
        ]
        lengths = np.array([len(ids) for ids in ended], np.int64)
        self._tokens, self._starts = np.concatenate(ended), np.cumsum(lengths) - lengths
        self._targets = None
        if targets is not None:
            padded = [
                np.append(marks, 1) if len(marks) < len(ids) else marks
                for marks, ids in zip(targets, ended, strict=True)
            ]
            self._targets = np.concatenate(padded).astype(np.uint8)
            if len(self._targets) != len(self._tokens):
                raise ValueError("Each document must have as many targets as tokens.")
        self.dtype, self.num_bytes = self._tokens.dtype, None
        self.num_tokens, self.num_documents = len(self._tokens), len(ended)
        self.num_targets = (
            self.num_tokens if self._targets is None else int(np.count_nonzero(self._targets == 1))
        )
        self.delimiter = eos_id if np.count_nonzero(self._tokens == eos_id) == len(ended) else None

    @property
    def starts(self) -> Int64[np.ndarray, " num_documents"]:
        """Start of each document."""
        return self._starts

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with the tokens from `start` on."""
        out[:] = self._tokens[start : start + len(out)]

    def read_targets(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with the target values of the tokens from `start` on; see `Tokens`."""
        out[:] = 1 if self._targets is None else self._targets[start : start + len(out)]

    def verify(self) -> None:
        """Do nothing, because tokens in memory need no check."""
