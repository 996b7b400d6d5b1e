"""Write a token store; `manifest.py` describes its files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer, UInt8

from consyn_jax.data.saved_values import fits
from consyn_jax.data.store.manifest import (
    FORMAT,
    MANIFEST,
    SPLIT_NAME,
    VERSION,
    delete_store,
    split_fault,
    token_dtype,
    totals,
)
from consyn_jax.data.store.shard_writer import ShardWriter
from consyn_jax.data.store.shards import Shard
from consyn_jax.data.store.store_split import StoreSplit
from consyn_jax.data.store.token_store import TokenStore
from consyn_jax.errors import UserError, remedy
from consyn_jax.files import write_whole
from consyn_jax.tokenization import BPETokenizer

SHARD_TOKENS = 1 << 24


def documents_to_fill(ends: Int64[np.ndarray, " documents"], tokens: int) -> int:
    """Number of documents after which a shard has at least `tokens` tokens.

    If all documents together have fewer tokens, the result is the number of documents plus 1.

    Args:
        ends: for each document, the number of tokens up to its end.
    """
    return int(np.searchsorted(ends, tokens)) + 1


class TokenStoreWriter:
    """Writes a token store.

    The directory becomes a store when `finish` returns. A `with` block calls `finish` at its end.
    After an exception, it deletes the files instead.

    Args:
        directory: directory of the store; it must not exist yet, unless `state` is given.
        tokenizer: the tokenizer that made the ids. Its EOS is appended to every document, and a
            copy of the tokenizer is written into the store.
        shard_tokens: a shard is closed after a document if it then has at least this many tokens.
        state: a result of `checkpoint()` for an unfinished store in `directory`. Writing resumes
            from this state, and anything written after it is removed.

    Raises:
        UserError: the directory exists or cannot be written.
    """

    def __init__(
        self,
        directory: Path | str,
        tokenizer: BPETokenizer,
        shard_tokens: int = SHARD_TOKENS,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.directory = Path(directory)
        if state is None and self.directory.exists():
            raise UserError(
                f"{self.directory} already exists. Choose a new directory for the token store, "
                "or delete this one."
            )
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._open_shards: dict[str, ShardWriter] = {}
        self._shards: dict[str, list[dict[str, Any]]] = {}
        self._closed: dict[str, list[Shard]] = {}
        self._finished = False
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            tokenizer.save(self.directory / "tokenizer")
            for left in (self.directory / "tokenizer").glob(".*.new"):  # left by a kill
                left.unlink()
            if state is not None:
                self._restore(state)
        except BaseException as error:  # `__exit__` is not called for a failed `__init__`
            if state is None:
                self.abandon()
            else:
                self.close()
            if isinstance(error, OSError):
                raise self._unwritable(error) from error
            raise

    # --------------------------------------------------------------------------------------- adding

    def add(self, split: str, token_ids: Sequence[int], num_bytes: int) -> None:
        """Append a document: its ids without EOS, and the size of its text in UTF-8 bytes."""
        self.add_many(split, [token_ids], [num_bytes])

    def add_many(
        self, split: str, documents: Sequence[Sequence[int]], num_bytes: Sequence[int]
    ) -> None:
        """Append documents in order.

        Raises:
            UserError: an id is outside the vocabulary, or the disk is full.
        """
        if len(num_bytes) != len(documents):
            raise ValueError(
                f"Expected one size per document, not {len(num_bytes)} sizes for {len(documents)}."
            )
        eos, vocab_size = [self._tokenizer.eos_token_id], self._tokenizer.vocab_size
        lengths = np.fromiter(
            (len(document) + 1 for document in documents), np.int64, len(documents)
        )
        ids = np.fromiter(
            chain.from_iterable(chain(document, eos) for document in documents),
            np.int64,
            int(lengths.sum()),
        )
        if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
            wrong = int(ids.min() if ids.min() < 0 else ids.max())
            raise UserError(
                f"Token id {wrong} is outside the tokenizer's vocabulary of {vocab_size}. "
                "Encode with the store's tokenizer."
            )
        self.append(split, ids.astype(self._dtype), lengths, np.array(num_bytes, np.int64))

    def append(
        self,
        split: str,
        ids: Integer[np.ndarray, " tokens"],
        lengths: Int64[np.ndarray, " documents"],
        num_bytes: Int64[np.ndarray, " documents"],
        targets: UInt8[np.ndarray, " tokens"] | None = None,
        origins: Int64[np.ndarray, "documents 3"] | None = None,
    ) -> None:
        """Append documents that are concatenated in `ids`, each with its EOS; ids are not checked.

        Args:
            ids: token ids, all in the vocabulary.
            lengths: number of tokens of each document.
            num_bytes: size of each document's text in UTF-8 bytes.
            targets: target value of each token, in the format of `manifest.py`; None if all are
                targets.
            origins: origin of each document, in the format of `manifest.py`; None if unknown.
                Either all documents of a shard have origins, or none has.

        Raises:
            UserError: the disk is full.
        """
        ends = np.cumsum(lengths)
        start = token = 0
        while start < len(lengths):
            shard = self._shard(split)
            room = self._shard_tokens - shard.tokens
            stop = min(documents_to_fill(ends, token + room), len(lengths))
            last = int(ends[stop - 1])
            with self._writing():
                part = None if targets is None else targets[token:last]
                size = int(num_bytes[start:stop].sum())
                here = None if origins is None else origins[start:stop]
                shard.append(ids[token:last], lengths[start:stop], size, part, here)
            self._close_if_full(split)
            start, token = stop, last

    def append_part(self, split: str, ids: Integer[np.ndarray, " tokens"]) -> None:
        """Append the next part of a long document; the last part includes the EOS.

        `end_document` or `drop_document` must follow the last part.
        """
        with self._writing():
            self._shard(split).append_part(ids)

    def end_document(
        self, split: str, num_bytes: int, origin: Int64[np.ndarray, "3"] | None = None
    ) -> None:
        """Complete the document whose parts were appended; `origin` is a row of `origins`."""
        with self._writing():
            self._shard(split).end_document(num_bytes, origin)
        self._close_if_full(split)

    def drop_document(self, split: str) -> None:
        """Remove the parts of the unfinished document."""
        with self._writing():
            self._shard(split).drop_document()

    def _shard(self, split: str) -> ShardWriter:
        if split not in self._open_shards:
            if not SPLIT_NAME.fullmatch(split):
                raise UserError(
                    f"The split name {split!r} is not valid. Use lower-case letters, digits and _, "
                    "and begin with a letter."
                )
            if self._finished:
                raise ValueError(
                    f"The token store {self.directory} is finished, so nothing can be added to it. "
                    "Write a new store."
                )
            name = f"{split}-{len(self._shards.get(split, [])):05d}"
            with self._writing():
                self._open_shards[split] = ShardWriter(self.directory, name, self._dtype)
        return self._open_shards[split]

    def _close_if_full(self, split: str) -> None:
        if self._open_shards[split].tokens >= self._shard_tokens:
            self._close(split)

    def _close(self, split: str) -> None:
        with self._writing():
            entry = self._open_shards[split].close()
        del self._open_shards[split]
        if entry is not None:
            self._shards.setdefault(split, []).append(entry)

    # ------------------------------------------------------------------------- state and completion

    def checkpoint(self) -> dict[str, Any]:
        """Flush everything to the disk and return the `state` to resume from."""
        with self._writing():
            open_shards = {split: shard.state() for split, shard in self._open_shards.items()}
        return {
            "shards": {split: list(entries) for split, entries in self._shards.items()},
            "open": open_shards,
        }

    @staticmethod
    def check_state(state: dict[str, Any]) -> None:
        """Check a `state` that was read from a file, in particular the file names in it.

        Raises:
            KeyError, TypeError, ValueError: the value is not a result of `checkpoint()`.
        """
        if not fits(state, dict[str, dict[str, Any]]):
            raise TypeError("`shards` or `open` is not an object")
        for split, entries in state["shards"].items():
            fault = split_fault(split, {"shards": entries, **totals(entries)})
            if fault:
                raise ValueError(fault)
        for split, shard in state["open"].items():
            if shard["name"] != f"{split}-{len(state['shards'].get(split, [])):05d}":
                raise ValueError(f"name is {shard['name']!r}")
            ShardWriter.check_state(shard)

    def _restore(self, state: dict[str, Any]) -> None:
        self._shards = {split: list(entries) for split, entries in state["shards"].items()}
        known = {
            entry[key]
            for entries in self._shards.values()
            for entry in entries
            for key in ("file", "index", "targets", "origins")
            if key in entry
        }
        for split, shard in state["open"].items():
            writer = ShardWriter(self.directory, shard["name"], self._dtype, shard)
            self._open_shards[split] = writer
            known |= {path.name for path in writer.paths}
        for path in self.directory.iterdir():
            kinds = (".tokens", ".index", ".targets", ".origins")
            if path.suffix in kinds and path.name not in known:
                path.unlink()

    def snapshot(self, split: str, begun: bool = False) -> StoreSplit:
        """Return the documents of a split so far; they can be read while more are added.

        Args:
            begun: whether to include the parts of an unfinished document, which must then not be
                dropped later.
        """
        if split in self._open_shards:
            with self._writing():
                self._open_shards[split].flush()
        closed, entries = self._closed.setdefault(split, []), self._shards.get(split, [])
        closed += [
            Shard(self.directory, entry, self._tokenizer.vocab_size)
            for entry in entries[len(closed) :]
        ]
        shard = self._open_shards.get(split)
        written = None if shard is None else shard.written(begun)
        return StoreSplit(
            [*closed, written] if written is not None and written.num_tokens else closed
        )

    @property
    def totals(self) -> dict[str, dict[str, int]]:
        """Numbers of tokens, documents, bytes and target_tokens so far, by split."""
        open_shards = {
            split: [shard.counts()] for split, shard in self._open_shards.items() if shard.documents
        }
        return {
            split: totals([*self._shards.get(split, []), *open_shards.get(split, [])])
            for split in sorted({*self._shards, *open_shards})
        }

    def finish(
        self, extra_files: dict[str, str] | None = None, extra: dict[str, Any] | None = None
    ) -> TokenStore:
        """Close the shards and write the manifest, which makes the directory a store.

        Args:
            extra_files: contents of further text files for the store, by file name.
            extra: further entries of the manifest.
        """
        for split in list(self._open_shards):
            self._close(split)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer_sha256": self._tokenizer.sha256,
            "vocab_size": self._tokenizer.vocab_size,
            "dtype": self._dtype.name,
            **(extra or {}),
            "splits": {
                split: {**totals(shards), "shards": shards}
                for split, shards in sorted(self._shards.items())
            },
        }
        files = {**(extra_files or {}), MANIFEST: json.dumps(manifest, indent=1) + "\n"}
        with self._writing():
            for name, text in files.items():
                write_whole(self.directory / name, text)
        self._finished = True
        return TokenStore(self.directory)

    def close(self) -> None:
        """Close the files and keep their content, so that writing can be resumed."""
        for shard in self._open_shards.values():
            shard.abandon()
        self._open_shards.clear()

    def abandon(self) -> None:
        """Close and remove all files written so far."""
        self.close()
        with suppress(OSError):
            delete_store(self.directory)

    def __enter__(self) -> TokenStoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.abandon()
        elif not self._finished:
            self.finish()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"The token store cannot be written to {self.directory}: {error.strerror or error}. "
            f"{remedy(error)}, or choose another directory."
        )
