"""Shards of tokens read by memory map, and a split: its shards seen as one stream of documents."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from consyn_jax.config import UserError
from consyn_jax.data.sources import MANIFEST

AGAIN = "Delete the directory and prepare the data again."


def token_dtype(vocab_size: int) -> np.dtype:
    """The type of tokens on disk.

    >>> token_dtype(65_536), token_dtype(65_537)
    (dtype('uint16'), dtype('uint32'))
    """
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class Shard:
    """One file of tokens with its index. Both are checked against their checksums when they are first read."""

    def __init__(self, directory: Path, entry: dict[str, Any], vocab_size: int) -> None:
        self.path = directory / entry["file"]
        self._index_path = directory / entry["index"]
        self._entry = entry
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._mapped: tuple[np.ndarray, np.ndarray] | None = None
        self.num_tokens: int = entry["tokens"]
        self.num_documents: int = entry["documents"]
        self.num_bytes: int = entry["bytes"]
        for path, size in ((self.path, self.num_tokens * token_dtype(vocab_size).itemsize), (self._index_path, self.num_documents * 8)):
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found:,} bytes where the manifest says {size:,}"
                raise UserError(f"The token store is damaged: {path} {state}. {AGAIN}")

    @property
    def tokens(self) -> np.ndarray:
        """The tokens, memory-mapped, uint16 or uint32 [num_tokens]."""
        return self._map()[0]

    @property
    def starts(self) -> np.ndarray:
        """Where each document starts in `tokens`, memory-mapped, int64 [num_documents]."""
        return self._map()[1]

    def _map(self) -> tuple[np.ndarray, np.ndarray]:
        if self._mapped is None:
            with self._lock:
                if self._mapped is None:
                    self._mapped = self._verified()
        return self._mapped

    def _verified(self) -> tuple[np.ndarray, np.ndarray]:
        for path, expected in ((self.path, self._entry["sha256"]), (self._index_path, self._entry["index_sha256"])):
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    raise UserError(f"The token store is damaged: {path} does not match its checksum in {MANIFEST}. {AGAIN}")
        tokens = np.memmap(self.path, token_dtype(self._vocab_size), "r", shape=(self.num_tokens,)).view(np.ndarray)
        # int64, not uint64: numpy would compare a uint64 with a signed number as floats.
        starts = np.memmap(self._index_path, "<i8", "r", shape=(self.num_documents,)).view(np.ndarray)
        # A store may come from anywhere: an id beyond the vocabulary would silently read another embedding.
        if tokens.max() >= self._vocab_size:
            raise UserError(f"The token store is damaged: {self.path} has token id {tokens.max()} and a vocabulary of {self._vocab_size}. {AGAIN}")
        if starts[0] != 0 or starts[-1] >= self.num_tokens or (starts[1:] <= starts[:-1]).any():
            raise UserError(f"The token store is damaged: the document starts in {self._index_path} do not rise from 0. {AGAIN}")
        return tokens, starts


class MemoryShard:
    """Documents in memory. EOS is put behind each that lacks it; the bytes of their text are not known."""

    num_bytes: int | None = None

    def __init__(self, documents: Sequence[np.ndarray], eos_id: int) -> None:
        ended = [ids if len(ids) and ids[-1] == eos_id else np.append(ids, eos_id) for ids in documents]
        lengths = np.array([len(ids) for ids in ended], np.int64)
        self.tokens, self.starts = np.concatenate(ended), np.cumsum(lengths) - lengths
        self.num_tokens, self.num_documents = len(self.tokens), len(ended)


class StoreSplit:
    """The shards of one split, seen as one stream of tokens: the documents in store order, each ended by EOS.

    Attributes:
        num_bytes: size of the documents' text in UTF-8; None where a shard does not know it.
    """

    def __init__(self, shards: Sequence[Shard | MemoryShard]) -> None:
        self.shards = tuple(shards)
        self.offsets = np.concatenate([[0], np.cumsum([shard.num_tokens for shard in shards], dtype=np.int64)]).astype(np.int64)
        self.num_tokens = int(self.offsets[-1])
        self.num_documents = sum(shard.num_documents for shard in shards)
        sizes = [shard.num_bytes for shard in shards]
        self.num_bytes = None if None in sizes else sum(size for size in sizes if size is not None)
