"""The token store: a directory of token shards with a manifest, written once and read by memory map.

Layout (docs/design/data.md has the reasons):

    manifest.json          version, tokenizer SHA-256, vocabulary size, dtype; per split its shards with counts and checksums
    tokenizer/             a copy of the tokenizer
    SPLIT-00000.tokens     little-endian uint16 (vocabulary up to 65,536) or uint32; every document ends with EOS
    SPLIT-00000.index      little-endian uint64: where in the shard each document starts

Documents are never torn between shards.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from consyn_jax.config import UserError
from consyn_jax.data.shards import AGAIN, Shard, StoreSplit, token_dtype
from consyn_jax.data.sources import MANIFEST
from consyn_jax.tokenization import BPETokenizer, load_tokenizer

FORMAT = "consyn token store"
VERSION = 1
SHARD_TOKENS = 1 << 26
_SPLIT_NAME = re.compile(r"[a-z][a-z0-9_]*")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


# --------------------------------------------------------------------------------------------------------------------- writing


class TokenStoreWriter:
    """Writes a token store. The directory appears, whole, when `finish` returns (or the `with` block ends without an exception).

    Args:
        directory: where the store shall be; it must not exist yet.
        tokenizer: the one that made the ids; its EOS is put after every document, and a copy goes into the store.
        shard_tokens: a shard is closed at the first document end at or behind this many tokens.

    Raises:
        UserError: the directory exists, or cannot be written.
    """

    def __init__(self, directory: Path | str, tokenizer: BPETokenizer, shard_tokens: int = SHARD_TOKENS) -> None:
        self.directory = Path(directory)
        if self.directory.exists():
            raise UserError(f"{self.directory} exists already. Give the token store a new directory, or delete that one.")
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._open_shards: dict[str, _ShardWriter] = {}
        self._shards: dict[str, list[dict[str, Any]]] = {}
        # Beside the target, so that the rename stays within one file system.
        self._building = self.directory.with_name(f".{self.directory.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        try:
            self._building.mkdir(parents=True)
            tokenizer.save(self._building / "tokenizer")
        except OSError as error:
            self.abandon()
            raise self._unwritable(error) from error
        except KeyboardInterrupt:  # no `with` block has begun that would clean up
            self.abandon()
            raise

    def add(self, split: str, token_ids: Sequence[int], num_bytes: int) -> None:
        """Append one document: its ids without EOS, and the size of its text in UTF-8."""
        self.add_many(split, [token_ids], [num_bytes])

    def add_many(self, split: str, documents: Sequence[Sequence[int]], num_bytes: Sequence[int]) -> None:
        """Append documents in order; the fast way.

        Raises:
            UserError: an id outside the vocabulary, or the disk is full.
        """
        if not _SPLIT_NAME.fullmatch(split):
            raise UserError(f"A split is named by lower-case letters, digits and _, not {split!r}.")
        start, pending = 0, self._pending(split)
        for stop, document in enumerate(documents, 1):
            pending += len(document) + 1
            if pending >= self._shard_tokens or stop == len(documents):
                self._write(split, documents[start:stop], num_bytes[start:stop])
                if pending >= self._shard_tokens:
                    self._close(split)
                start, pending = stop, 0

    def finish(self, extra_files: dict[str, str] | None = None) -> TokenStore:
        """Close the shards, write the manifest last and move the store into place.

        Args:
            extra_files: more text files to put into the store, by name.

        Raises:
            FileExistsError: somebody else put a store in this place in the meantime; what was written here is removed.
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
            "splits": splits,
        }
        try:
            for name, text in {**(extra_files or {}), MANIFEST: json.dumps(manifest, indent=1) + "\n"}.items():
                (self._building / name).write_text(text, encoding="utf-8")
            if self.directory.exists():
                raise FileExistsError(self.directory)  # rename would replace an empty directory
            self._building.rename(self.directory)
        except OSError as error:
            self.abandon()
            if self.directory.exists():
                raise FileExistsError(self.directory) from error
            raise self._unwritable(error) from error
        return TokenStore(self.directory)

    def abandon(self) -> None:
        """Remove what was written so far."""
        for shard in self._open_shards.values():
            shard.file.close()
        self._open_shards.clear()
        shutil.rmtree(self._building, ignore_errors=True)

    def __enter__(self) -> TokenStoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self.abandon()
        elif self._building.exists():
            self.finish()

    def _pending(self, split: str) -> int:
        return self._open_shards[split].tokens if split in self._open_shards else 0

    def _write(self, split: str, documents: Sequence[Sequence[int]], num_bytes: Sequence[int]) -> None:
        lengths = np.fromiter((len(document) + 1 for document in documents), np.int64, len(documents))
        eos = [self._tokenizer.eos_token_id]
        ids = np.fromiter(chain.from_iterable(chain(document, eos) for document in documents), np.int64, int(lengths.sum()))
        if len(ids) and (ids.min() < 0 or ids.max() >= self._tokenizer.vocab_size):
            wrong = int(ids.min() if ids.min() < 0 else ids.max())
            raise UserError(f"Token id {wrong} is outside the tokenizer's vocabulary of {self._tokenizer.vocab_size}. Encode with the store's tokenizer.")
        try:
            if split not in self._open_shards:
                name = f"{split}-{len(self._shards.get(split, [])):05d}"
                self._open_shards[split] = _ShardWriter(self._building, name)
            self._open_shards[split].append(ids.astype(self._dtype), lengths, sum(num_bytes))
        except OSError as error:
            raise self._unwritable(error) from error

    def _close(self, split: str) -> None:
        if split in self._open_shards:
            try:
                entry = self._open_shards.pop(split).close()
            except OSError as error:
                raise self._unwritable(error) from error
            self._shards.setdefault(split, []).append(entry)

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"The token store cannot be written to {self.directory}: {error.strerror or error}. Make room, or choose another place.")


class _ShardWriter:
    """One shard under way: tokens go to the file as they come, document starts are kept until it is closed."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory, self.name = directory, name
        self.file: BinaryIO = (directory / f"{name}.tokens").open("wb")
        self.hash = hashlib.sha256()
        self.tokens = self.num_bytes = 0
        self.starts: list[np.ndarray] = []

    def append(self, ids: np.ndarray, lengths: np.ndarray, num_bytes: int) -> None:
        self.starts.append((self.tokens + np.cumsum(lengths) - lengths).astype("<u8"))
        data = ids.tobytes()
        self.file.write(data)
        self.hash.update(data)
        self.tokens += len(ids)
        self.num_bytes += num_bytes

    def close(self) -> dict[str, Any]:
        """The shard's entry in the manifest."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        starts = np.concatenate(self.starts)
        index = starts.tobytes()
        (self.directory / f"{self.name}.index").write_bytes(index)
        return {
            "file": f"{self.name}.tokens",
            "index": f"{self.name}.index",
            "tokens": self.tokens,
            "documents": len(starts),
            "bytes": self.num_bytes,
            "sha256": self.hash.hexdigest(),
            "index_sha256": hashlib.sha256(index).hexdigest(),
        }


def _totals(shards: Iterable[dict[str, Any]]) -> dict[str, int]:
    shards = list(shards)
    return {name: sum(shard[name] for shard in shards) for name in ("tokens", "documents", "bytes")}


# --------------------------------------------------------------------------------------------------------------------- reading


class TokenStore:
    """A token store on disk. Opening it reads the manifest and the sizes of its files; tokens are read by memory map.

    Raises:
        UserError: not a token store, of another version, or damaged; the message names the file.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.manifest = _read_manifest(self.directory)
        self.vocab_size: int = self.manifest["vocab_size"]
        self.dtype = token_dtype(self.vocab_size)
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
        content = {
            "tokenizer": self.manifest["tokenizer_sha256"],
            "dtype": self.manifest["dtype"],
            "splits": {name: [[s["tokens"], s["sha256"], s["index_sha256"]] for s in split["shards"]] for name, split in self.manifest["splits"].items()},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
    if manifest.get("version") != VERSION:
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
    for key in ("file", "index"):
        value = shard.get(key)
        if not isinstance(value, str) or not _FILE_NAME.fullmatch(value):
            return f"{key} is {value!r}, not a plain file name in the store"
    for key in ("tokens", "documents", "bytes"):
        if type(shard.get(key)) is not int or shard[key] < (0 if key == "bytes" else 1):
            return f"{key} is {shard.get(key)!r}"
    for key in ("sha256", "index_sha256"):
        if not isinstance(shard.get(key), str):
            return f"{key} is missing"
    return ""
