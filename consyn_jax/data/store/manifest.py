"""The files of a token store and its manifest.

    manifest.json          version, tokenizer SHA-256, vocabulary size, dtype; for each split its
                           shards with counts and checksums
    tokenizer/             a copy of the tokenizer
    SPLIT-00000.tokens     little-endian uint16 (vocabulary up to 65,536) or uint32; every document
                           ends with EOS
    SPLIT-00000.index      little-endian uint64: start of each document in the shard
    SPLIT-00000.targets    only for shards where some tokens are not targets; uint8: 1 for a target
                           of the loss, 0 for other tokens. The first token of a document has 2 if
                           the document needs no BOS in front of it
    SPLIT-00000.origins    only in stores that were prepared from sources; three little-endian
                           uint64 for each document. The first is the index of the document's source
                           in sources.json. For a row, the second is its number and the third is 0.
                           For text, the second and third are the byte offsets of the document's
                           start and end in the decompressed source
    sources.json           the sources, in order: name, kind, SHA-256 of each file

In version 3, each document is a pair of answers to the same prompt: prompt and chosen answer, then
a separator token with target 3 (`BETWEEN`), then prompt and rejected answer.

Documents are never split between shards. The manifest is written last, so a directory without a
manifest is not a finished store. docs/design/data.md has the reasons.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from consyn_jax.errors import UserError, parse_fault
from consyn_jax.files import leads_out, refuse_strays

FORMAT = "consyn token store"
VERSION = 2
PAIRS_VERSION = 3  # for stores of preference pairs
READABLE = (1, 2, PAIRS_VERSION)  # version 1 has no target value 2
# Target value of the first token of a document that needs no BOS; the token is only an input.
GIVEN = 2
# Target value of the token between the two sequences of a pair.
BETWEEN = 3
MANIFEST = "manifest.json"
# Subdirectory of an unfinished token store, with the state needed to resume.
PREPARING = "preparing"
SHARD_DRAFTS = "shards-"  # in PREPARING, directories of shards that many writers are writing
SOURCES = "sources.json"
ORIGIN_BYTES = 24  # per document
STORE_FILE = re.compile(
    r"manifest\.json|report\.json|report\.html|sources\.json|tokenizer|preparing"
    r"|[a-z][a-z0-9_]*-\d{5,}\.(tokens|index|targets|origins)|\..*\.new"
)
# Glob patterns of the files of a store that are read.
READ = (
    *(MANIFEST, "report.json", SOURCES, "tokenizer", "tokenizer/*"),
    *("*.tokens", "*.index", "*.targets", "*.origins"),
)
SPLIT_NAME = re.compile(r"[a-z][a-z0-9_]*")
AGAIN = "Delete the directory and prepare the data again."
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_HEAD = re.compile(rb'"format"\s*:\s*"' + FORMAT.encode())
_HEAD_BYTES = 1 << 16


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype of tokens on disk for a vocabulary size.

    >>> token_dtype(65_536), token_dtype(65_537)
    (dtype('uint16'), dtype('uint32'))
    """
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def totals(shards: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Sum the counts in the manifest entries of a split's shards."""
    shards = list(shards)
    counts = {
        name: sum(shard[name] for shard in shards) for name in ("tokens", "documents", "bytes")
    }
    targets = sum(shard.get("target_tokens", shard["tokens"]) for shard in shards)
    return counts | {"target_tokens": targets}


def is_store(directory: Path) -> bool:
    """Whether a directory is a token store, even one with a damaged manifest.

    A store with a damaged manifest is recognised by its token files, so that it is reported as
    damaged and not read as text. Only the beginning of `manifest.json` is read, because other
    programs write files of that name too, some of them gigabytes long.
    """
    if not (directory / MANIFEST).is_file():
        return False
    return has_manifest(directory) or any(directory.glob("*.tokens"))


def has_manifest(directory: Path) -> bool:
    """Whether the manifest in a directory begins like the manifest of a token store.

    A symbolic link out of the directory is not followed.
    """
    path = directory / MANIFEST
    if not path.is_file() or leads_out(path, directory):
        return False
    with suppress(OSError), path.open("rb") as file:
        return _HEAD.search(file.read(_HEAD_BYTES)) is not None
    return False


def delete_store(directory: Path) -> None:
    """Delete the files of a token store, finished or not, and its directory if nothing is left.

    The entries that mark a directory as a store are deleted last, so that an interrupted deletion
    can be repeated. The very last one is the directory with the lock, which the caller holds. On
    NFS this directory stays until the lock is released.
    """
    entries = list(directory.iterdir()) if directory.is_dir() else []
    last = {MANIFEST: 1, PREPARING: 2}
    for entry in sorted(entries, key=lambda entry: last.get(entry.name, 0)):
        if not STORE_FILE.fullmatch(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            try:
                shutil.rmtree(entry)
            except OSError as error:
                if error.errno != errno.ENOTEMPTY or entry.name != PREPARING:
                    raise
        else:
            entry.unlink(missing_ok=True)
    with suppress(OSError):  # the directory is not empty, or was never made
        directory.rmdir()


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read and check the manifest of the token store in `directory`.

    Raises:
        UserError: the directory is not a token store, or contains links to files outside it; or the
            manifest is damaged, or has an unknown version.
    """
    refuse_strays(directory, READ)
    return checked_manifest(directory)


def checked_manifest(directory: Path) -> dict[str, Any]:
    """Read and check the manifest as `read_manifest` does, without checking other files."""
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(
            f"{directory} is not a token store: it has no {MANIFEST}. "
            "Give a directory that consyn_jax wrote."
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} {parse_fault(error)}. {AGAIN}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(
            f"{path} is not the manifest of a token store. Give a directory that consyn_jax wrote."
        )
    version = manifest.get("version")
    if type(version) is not int or version not in READABLE:
        raise UserError(
            f"{path} has format version {version!r}, but this consyn_jax reads 1, 2 and 3. {AGAIN}"
        )
    fault = _manifest_fault(manifest)
    if fault:
        raise UserError(f"{path} is damaged: {fault}. {AGAIN}")
    return manifest


def read_sources(directory: Path) -> list[dict[str, Any]]:
    """Read the sources that a token store was prepared from; [] if they were not recorded.

    Returns:
        For each source, its "name", "kind", "is_validation", and the "sha256" of each of its files.

    Raises:
        UserError: the manifest or sources.json is missing or damaged, or they do not match.
    """
    return checked_sources(directory, read_manifest(directory))


def checked_sources(directory: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Read the sources as `read_sources` does, given the manifest."""
    expected, path = manifest.get("sources_sha256"), directory / SOURCES
    if expected is None:
        return []
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. {AGAIN}") from error
    if hashlib.sha256(content).hexdigest() != expected:
        raise UserError(f"{path} does not match its checksum in {MANIFEST}. {AGAIN}")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} {parse_fault(error)}. {AGAIN}") from error
    keys = {"name": str, "kind": str, "is_validation": bool, "sha256": list}
    if not isinstance(found, list) or not all(
        isinstance(entry, dict) and all(isinstance(entry.get(k), t) for k, t in keys.items())
        for entry in found
    ):
        raise UserError(f"{path} is not a list of sources. {AGAIN}")
    return found


def _manifest_fault(manifest: dict[str, Any]) -> str:
    """Describe the first fault of a manifest; "" if there is none.

    Later code relies on these checks, above all on the checks of file names.
    """
    vocab_size, splits = manifest.get("vocab_size"), manifest.get("splits")
    if type(vocab_size) is not int or not 0 < vocab_size <= 1 << 32:
        return f"vocab_size is {vocab_size!r}"
    dtype = token_dtype(vocab_size).name
    if manifest.get("dtype") != dtype:
        found = manifest.get("dtype")
        return f"dtype is {found!r}, but a vocabulary of {vocab_size} needs {dtype}"
    if not isinstance(manifest.get("tokenizer_sha256"), str) or not isinstance(splits, dict):
        return "tokenizer_sha256 or splits is missing"
    for name, split in splits.items():
        fault = split_fault(name, split)
        if fault:
            return fault
    return ""


def split_fault(name: str, split: Any) -> str:
    """Describe the first fault of a split in a manifest; "" if there is none."""
    shards = split.get("shards") if isinstance(split, dict) else None
    if not isinstance(shards, list):
        return f"split {name!r} has no list of shards"
    if not SPLIT_NAME.fullmatch(name):
        return f"split {name!r} has an invalid name"
    for number, shard in enumerate(shards):
        fault = _shard_fault(shard)
        if fault:
            return f"shard {number} of split {name!r}: {fault}"
    if any(split.get(key) != value for key, value in totals(shards).items()):
        return f"the counts of split {name!r} are not the sums of its shards"
    return ""


def _shard_fault(shard: Any) -> str:
    if not isinstance(shard, dict):
        return "not an object"
    targets, origins = "targets" in shard, "origins" in shard
    for key in ("file", "index", *["targets"] * targets, *["origins"] * origins):
        value = shard.get(key)
        if not isinstance(value, str) or not _FILE_NAME.fullmatch(value):
            return f"{key} is {value!r}, not a plain file name in the store"
    for key in ("tokens", "documents", "bytes", *["target_tokens"] * targets):
        least = 1 if key in ("tokens", "documents") else 0
        if type(shard.get(key)) is not int or shard[key] < least:
            return f"{key} is {shard.get(key)!r}"
    sums = ("sha256", "index_sha256", *["targets_sha256"] * targets, *["origins_sha256"] * origins)
    for key in sums:
        if not isinstance(shard.get(key), str):
            return f"{key} is missing"
    return ""
