"""The token store: a directory of token shards with a manifest, written once and read where it lies.

Layout (docs/design/data.md has the reasons):

    manifest.json          version, tokenizer SHA-256, vocabulary size, dtype; per split its shards with counts and checksums
    tokenizer/             a copy of the tokenizer
    SPLIT-00000.tokens     little-endian uint16 (vocabulary up to 65,536) or uint32; every document ends with EOS
    SPLIT-00000.index      little-endian uint64: where in the shard each document starts
    SPLIT-00000.targets    uint8, 1 where a token is a target of the loss; only of shards where not every token is one

Documents are never torn between shards. The manifest comes last: a directory without one is not a store yet.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer, UInt8

from consyn_jax.config import UserError
from consyn_jax.data.shard_writer import ShardWriter
from consyn_jax.data.shards import AGAIN, MANIFEST, Shard, StoreSplit, token_dtype
from consyn_jax.tokenization import BPETokenizer, load_tokenizer

FORMAT = "consyn token store"
VERSION = 1
SHARD_TOKENS = 1 << 24
# In an unfinished token store: what is needed to go on with it.
PREPARING = "preparing"
STORE_FILE = re.compile(r"manifest\.json|report\.json|report\.html|tokenizer|preparing|[a-z][a-z0-9_]*-\d{5,}\.(tokens|index|targets)|\..*\.new")
_SPLIT_NAME = re.compile(r"[a-z][a-z0-9_]*")
_HEAD = re.compile(rb'"format"\s*:\s*"' + FORMAT.encode())
_HEAD_BYTES = 1 << 16
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


# --------------------------------------------------------------------------------------------------------------------- writing


class TokenStoreWriter:
    """Writes a token store. It is one, for those who read, when `finish` returns (or the `with` block ends without an exception).

    Args:
        directory: where the store shall be; it must not exist yet, unless `state` is given.
        tokenizer: the one that made the ids; its EOS is put after every document, and a copy goes into the store.
        shard_tokens: a shard is closed at the first document end at or behind this many tokens.
        state: what `checkpoint` gave of an unfinished store in `directory`; writing goes on from there, and what came after it is
            cut off.

    Raises:
        UserError: the directory exists, or cannot be written.
    """

    def __init__(self, directory: Path | str, tokenizer: BPETokenizer, shard_tokens: int = SHARD_TOKENS, state: dict[str, Any] | None = None) -> None:
        self.directory = Path(directory)
        if state is None and self.directory.exists():
            raise UserError(f"{self.directory} exists already. Give the token store a new directory, or delete that one.")
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
            if state is not None:
                self._restore(state)
        except BaseException as error:  # no `with` block has begun that would clean up
            if state is None:
                self.abandon()
            else:
                self.close()
            if isinstance(error, OSError):
                raise self._unwritable(error) from error
            raise

    # ----------------------------------------------------------------------------------------------------------- adding

    def add(self, split: str, token_ids: Sequence[int], num_bytes: int) -> None:
        """Append one document: its ids without EOS, and the size of its text in UTF-8."""
        self.add_many(split, [token_ids], [num_bytes])

    def add_many(self, split: str, documents: Sequence[Sequence[int]], num_bytes: Sequence[int]) -> None:
        """Append documents in order.

        Raises:
            UserError: an id outside the vocabulary, or the disk is full.
        """
        if len(num_bytes) != len(documents):
            raise ValueError(f"{len(documents)} documents came with {len(num_bytes)} sizes.")
        eos = [self._tokenizer.eos_token_id]
        lengths = np.fromiter((len(document) + 1 for document in documents), np.int64, len(documents))
        ids = np.fromiter(chain.from_iterable(chain(document, eos) for document in documents), np.int64, int(lengths.sum()))
        if len(ids) and (ids.min() < 0 or ids.max() >= self._tokenizer.vocab_size):
            wrong = int(ids.min() if ids.min() < 0 else ids.max())
            raise UserError(f"Token id {wrong} is outside the tokenizer's vocabulary of {self._tokenizer.vocab_size}. Encode with the store's tokenizer.")
        self.append(split, ids.astype(self._dtype), lengths, np.array(num_bytes, np.int64))

    def append(
        self,
        split: str,
        ids: Integer[np.ndarray, " tokens"],
        lengths: Int64[np.ndarray, " documents"],
        num_bytes: Int64[np.ndarray, " documents"],
        targets: UInt8[np.ndarray, " tokens"] | None = None,
    ) -> None:
        """Append documents that lie behind each other in `ids`, each with its EOS; the fast way.

        Args:
            ids: valid ids, which are not checked again.
            targets: 1 where a token is a target of the loss; None where all are.

        Raises:
            UserError: the disk is full.
        """
        ends = np.cumsum(lengths)
        start = token = 0
        while start < len(lengths):
            shard = self._shard(split)
            room = self._shard_tokens - shard.tokens
            stop = min(int(np.searchsorted(ends, token + room)) + 1, len(lengths))
            last = int(ends[stop - 1])
            with self._writing():
                part = None if targets is None else targets[token:last]
                shard.append(ids[token:last], lengths[start:stop], int(num_bytes[start:stop].sum()), part)
            self._close_if_full(split)
            start, token = stop, last

    def append_part(self, split: str, ids: Integer[np.ndarray, " tokens"]) -> None:
        """Append the beginning, or more, of a long document, which `end_document` or `drop_document` has to follow. Its EOS counts as part of it."""
        with self._writing():
            self._shard(split).append_part(ids)

    def end_document(self, split: str, num_bytes: int) -> None:
        """The parts since the last document are one."""
        with self._writing():
            self._shard(split).end_document(num_bytes)
        self._close_if_full(split)

    def drop_document(self, split: str) -> None:
        """Forget the parts since the last document."""
        with self._writing():
            self._shard(split).drop_document()

    def _shard(self, split: str) -> ShardWriter:
        if split not in self._open_shards:
            if not _SPLIT_NAME.fullmatch(split):
                raise UserError(f"A split is named by lower-case letters, digits and _, not {split!r}.")
            if self._finished:
                raise ValueError(f"The token store {self.directory} is finished; nothing can be added to it.")
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

    # ---------------------------------------------------------------------------------------------- state and completion

    def checkpoint(self) -> dict[str, Any]:
        """Put everything on the disk, and give what `state` takes."""
        with self._writing():
            open_shards = {split: shard.state() for split, shard in self._open_shards.items()}
        return {"shards": {split: list(entries) for split, entries in self._shards.items()}, "open": open_shards}

    def _restore(self, state: dict[str, Any]) -> None:
        self._shards = {split: list(entries) for split, entries in state["shards"].items()}
        known = {entry[key] for entries in self._shards.values() for entry in entries for key in ("file", "index", "targets") if key in entry}
        for split, shard in state["open"].items():
            self._open_shards[split] = ShardWriter(self.directory, shard["name"], self._dtype, shard)
            known |= {path.name for path in self._open_shards[split].paths}
        for path in self.directory.iterdir():
            if path.suffix in (".tokens", ".index", ".targets") and path.name not in known:
                path.unlink()

    def snapshot(self, split: str, begun: bool = False) -> StoreSplit:
        """The documents of a split that have been appended so far, to read while more are added.

        Args:
            begun: also the parts of a document whose end has not come, for those who know that it will not be dropped.
        """
        if split in self._open_shards:
            with self._writing():
                self._open_shards[split].flush()
        closed, entries = self._closed.setdefault(split, []), self._shards.get(split, [])
        closed += [Shard(self.directory, entry, self._tokenizer.vocab_size) for entry in entries[len(closed) :]]
        shard = self._open_shards.get(split)
        written = None if shard is None else shard.written(begun)
        return StoreSplit([*closed, written] if written is not None and written.num_tokens else closed)

    @property
    def totals(self) -> dict[str, dict[str, int]]:
        """By split: tokens, documents, bytes and target_tokens so far."""
        open_shards = {split: [shard.counts()] for split, shard in self._open_shards.items() if shard.documents}
        names = sorted({*self._shards, *open_shards})
        return {split: _totals([*self._shards.get(split, []), *open_shards.get(split, [])]) for split in names}

    def finish(self, extra_files: dict[str, str] | None = None, extra: dict[str, Any] | None = None) -> TokenStore:
        """Close the shards and write the manifest, which makes it a store.

        Args:
            extra_files: more text files to put into the store, by name.
            extra: more entries for the manifest.
        """
        for split in list(self._open_shards):
            self._close(split)
        splits = {split: {**_totals(shards), "shards": shards} for split, shards in sorted(self._shards.items())}
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer_sha256": self._tokenizer.sha256,
            "vocab_size": self._tokenizer.vocab_size,
            "dtype": self._dtype.name,
            **(extra or {}),
            "splits": splits,
        }
        with self._writing():
            for name, text in {**(extra_files or {}), MANIFEST: json.dumps(manifest, indent=1) + "\n"}.items():
                write_whole(self.directory / name, text)
        self._finished = True
        return TokenStore(self.directory)

    def close(self) -> None:
        """Close the files, and leave what is written for somebody who goes on."""
        for shard in self._open_shards.values():
            shard.abandon()
        self._open_shards.clear()

    def abandon(self) -> None:
        """Remove what was written so far."""
        self.close()
        with suppress(OSError):
            delete_store(self.directory)

    def __enter__(self) -> TokenStoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
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
        return UserError(f"The token store cannot be written to {self.directory}: {error.strerror or error}. Make room, or choose another place.")


def delete_store(directory: Path) -> None:
    """Delete what makes up a token store or the beginning of one, and the directory unless there is something else in it.

    What says that it is one goes last: a deletion that is interrupted can be gone on with.
    """
    entries = sorted(directory.iterdir(), key=lambda entry: entry.name in (MANIFEST, PREPARING)) if directory.is_dir() else []
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink() and STORE_FILE.fullmatch(entry.name):
            shutil.rmtree(entry)
        elif STORE_FILE.fullmatch(entry.name):
            entry.unlink(missing_ok=True)
    with suppress(OSError):  # not empty, or never made
        directory.rmdir()


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, whatever happens meanwhile."""
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(path)


def _totals(shards: Iterable[dict[str, Any]]) -> dict[str, int]:
    shards = list(shards)
    totals = {name: sum(shard[name] for shard in shards) for name in ("tokens", "documents", "bytes")}
    return totals | {"target_tokens": sum(shard.get("target_tokens", shard["tokens"]) for shard in shards)}


# --------------------------------------------------------------------------------------------------------------------- reading


class TokenStore:
    """A token store on disk. Opening it reads the manifest and the sizes of its files; tokens are read where they lie.

    Raises:
        UserError: not a token store, of another version, or damaged; the message names the file.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.manifest = _read_manifest(self.directory)
        self.vocab_size: int = self.manifest["vocab_size"]
        self.splits = {
            name: StoreSplit([Shard(self.directory, entry, self.vocab_size) for entry in split["shards"]]) for name, split in self.manifest["splits"].items()
        }

    def split(self, name: str) -> StoreSplit:
        """The split of that name; one without documents where the store has none."""
        return self.splits.get(name, StoreSplit([]))

    @cached_property
    def tokenizer(self) -> BPETokenizer:
        """The copy of the tokenizer that made the tokens."""
        tokenizer = load_tokenizer(str(self.directory / "tokenizer"))
        if tokenizer.sha256 != self.manifest["tokenizer_sha256"]:
            raise UserError(f"The tokenizer in {self.directory} is not the one its manifest names. {AGAIN}")
        return tokenizer

    @property
    def fingerprint(self) -> str:
        """A hash of all that determines the tokens and their order; equal for equal stores, wherever they lie."""
        keys = ("tokens", "sha256", "index_sha256", "targets_sha256")
        content = {
            "tokenizer": self.manifest["tokenizer_sha256"],
            "dtype": self.manifest["dtype"],
            "splits": {name: [[s.get(key) for key in keys] for s in split["shards"]] for name, split in self.manifest["splits"].items()},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class JoinedStores:
    """Token stores made with one tokenizer as one: the documents of the first, then those of the second, and so on.

    Raises:
        UserError: their tokenizers differ.
    """

    def __init__(self, stores: Sequence[TokenStore]) -> None:
        self.stores = tuple(stores)
        other = next((s for s in stores if s.manifest["tokenizer_sha256"] != stores[0].manifest["tokenizer_sha256"]), None)
        if other is not None:
            raise UserError(f"{stores[0].directory} and {other.directory} were made with different tokenizers. Prepare one of them again with the other's.")
        names = sorted({name for store in stores for name in store.splits})
        self.splits = {name: StoreSplit([shard for store in stores for shard in store.split(name).shards]) for name in names}

    def split(self, name: str) -> StoreSplit:
        """The split of that name; one without documents where no store has it."""
        return self.splits.get(name, StoreSplit([]))

    @property
    def tokenizer(self) -> BPETokenizer:
        """The tokenizer of all."""
        return self.stores[0].tokenizer

    @property
    def fingerprint(self) -> str:
        """As of a `TokenStore`."""
        return hashlib.sha256(" ".join(store.fingerprint for store in self.stores).encode()).hexdigest()


def is_store(directory: Path) -> bool:
    """Whether this is a token store. One whose manifest is damaged is known by its tokens: it shall say so, and not be read as text.

    Others, too, call files `manifest.json`, some of gigabytes; so only the beginning is read.
    """
    path = directory / MANIFEST
    if not path.is_file():
        return False
    with suppress(OSError), path.open("rb") as file:
        if _HEAD.search(file.read(_HEAD_BYTES)):
            return True
    return any(directory.glob("*.tokens"))


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{directory} is not a token store: there is no {MANIFEST} in it. Give a directory that consyn_jax wrote.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON. {AGAIN}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is not the manifest of a token store. Give a directory that consyn_jax wrote.")
    if type(manifest.get("version")) is not int or manifest["version"] != VERSION:
        raise UserError(f"{path} has format version {manifest.get('version')!r}, and this consyn_jax reads {VERSION}. {AGAIN}")
    fault = _manifest_fault(manifest)
    if fault:
        raise UserError(f"{path} is damaged: {fault}. {AGAIN}")
    return manifest


def _manifest_fault(manifest: dict[str, Any]) -> str:
    """What is wrong with the manifest, or "". Everything that is later relied on is checked here, file names above all."""
    vocab_size, splits = manifest.get("vocab_size"), manifest.get("splits")
    if type(vocab_size) is not int or not 0 < vocab_size <= 1 << 32:
        return f"vocab_size is {vocab_size!r}"
    if manifest.get("dtype") != token_dtype(vocab_size).name:
        return f"dtype is {manifest.get('dtype')!r}, and a vocabulary of {vocab_size} needs {token_dtype(vocab_size).name}"
    if not isinstance(manifest.get("tokenizer_sha256"), str) or not isinstance(splits, dict):
        return "tokenizer_sha256 or splits is missing"
    for name, split in splits.items():
        shards = split.get("shards") if isinstance(split, dict) else None
        if not isinstance(shards, list):
            return f"split {name!r} has no list of shards"
        if not _SPLIT_NAME.fullmatch(name):
            return f"split {name!r} has no proper name"
        for number, shard in enumerate(shards):
            fault = _shard_fault(shard)
            if fault:
                return f"shard {number} of split {name!r}: {fault}"
        if any(split.get(key) != value for key, value in _totals(shards).items()):
            return f"the counts of split {name!r} are not the sums of its shards"
    return ""


def _shard_fault(shard: Any) -> str:
    if not isinstance(shard, dict):
        return "not an object"
    targets = "targets" in shard
    for key in ("file", "index", *["targets"] * targets):
        value = shard.get(key)
        if not isinstance(value, str) or not _FILE_NAME.fullmatch(value):
            return f"{key} is {value!r}, not a plain file name in the store"
    for key in ("tokens", "documents", "bytes", *["target_tokens"] * targets):
        if type(shard.get(key)) is not int or shard[key] < (1 if key in ("tokens", "documents") else 0):
            return f"{key} is {shard.get(key)!r}"
    for key in ("sha256", "index_sha256", *["targets_sha256"] * targets):
        if not isinstance(shard.get(key), str):
            return f"{key} is missing"
    return ""
