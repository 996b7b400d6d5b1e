"""Compare the data of a run with its record: token stores, their source files, and token files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from consyn_jax.data.sources.sample_reader import SAMPLE
from consyn_jax.data.sources.source import READERS, Source
from consyn_jax.data.store.file_hashes import FileHashes
from consyn_jax.data.store.manifest import (
    MANIFEST,
    READ,
    SOURCES,
    checked_manifest,
    checked_sources,
)
from consyn_jax.data.store.token_store import fingerprint_of
from consyn_jax.errors import counted
from consyn_jax.files import strays
from consyn_jax.remote.urls import is_bucket_url
from consyn_jax.training.provenance.findings import Findings, changed_files

KINDS = {
    "file": "sha256",
    "index": "index_sha256",
    "targets": "targets_sha256",
    "origins": "origins_sha256",
}


def check_data(data: dict[str, Any], found: Findings) -> None:
    """Read all data of a run again, and compare it with the recorded hashes.

    Args:
        data: The value of "data" in provenance.json.
        found: Findings, to which the results are added.
    """
    if "sources" not in data:
        found.unchecked.append("data: not recorded, because it was streamed, or passed in Python")
        return
    for source in data["sources"]:
        if "stores" in source:
            for store in source["stores"]:
                with found.checking("data", Path(store["directory"])):
                    _check_store(store, found)
        else:
            files = {Path(entry["path"]): entry["sha256"] for entry in source["files"]}
            faults, missing = changed_files(files)
            _note_missing(missing, found)
            found.files("data", faults, len(files) - len(missing), "token file")


def _note_missing(missing: list[Path], found: Findings) -> None:
    if missing:
        more = f" and {counted(len(missing) - 1, 'more file')}" if missing[1:] else ""
        found.unchecked.append(f"data: not found here: {missing[0]}{more}")


def _check_store(store: dict[str, Any], found: Findings) -> None:
    directory = Path(store["directory"])
    if not directory.is_dir():
        found.unchecked.append(f"data: {directory} does not exist here")
        return
    stray = dict(strays(directory, READ))
    found.differs += [f"data: {sentences}" for sentences in stray.values()]
    if directory / MANIFEST in stray or directory / SOURCES in stray:
        return
    manifest = checked_manifest(directory)
    sources = checked_sources(directory, manifest)
    if fingerprint_of(manifest) != store["fingerprint"]:
        found.differs.append(f"data: {directory / MANIFEST} describes data of another run")
    if manifest.get("sources_sha256") != store["sources_sha256"]:
        found.differs.append(f"data: {directory / SOURCES} lists sources of another run")
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    files = {
        directory / shard[kind]: shard[digest]
        for shard in shards
        for kind, digest in KINDS.items()
        if kind in shard and directory / shard[kind] not in stray
    }
    faults, missing = changed_files(files)
    faults += [f"{path} is missing" for path in missing]
    found.files("data", faults, len(files), f"file of {directory}")
    _check_sources(sources, directory, found)


def changed_sources(entries: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Find the sources whose files have changed since a token store was prepared from them.

    A file whose hash is cached, and which has not been modified since, is not read again.

    Args:
        entries: Entries of sources.json.

    Returns:
        Name of each changed or missing source -> a sentence about it.
    """
    with FileHashes() as file_hash:
        found = {entry["name"]: _source_fault(entry, file_hash) for entry in entries}
    return {name: fault for name, fault in found.items() if fault}


def _source_fault(entry: dict[str, Any], file_hash: Callable[[Path], str]) -> str:
    name, kind, digests = entry["name"], entry["kind"], entry["sha256"]
    if is_bucket_url(name):
        return f"{name} is in a bucket, so it cannot be compared with what was prepared."
    if not digests or kind not in READERS:  # Hub datasets cannot change: their names have a commit
        return ""
    source = Source(name, kind)
    then = "since the data was prepared; the documents shown are from before the change."
    if kind == SAMPLE:
        is_same = source.reader.identity(name, str)[-1] == digests
        return "" if is_same else f"--data sample, the text of Python's help(), has changed {then}"
    faults, missing = changed_files(dict(zip(source.files, digests, strict=False)), file_hash)
    if missing or len(source.files) != len(digests):
        return f"{name} does not exist here, so it cannot be compared with what was prepared."
    return f"{faults[0]} {then}" if faults else ""


def _check_sources(sources: list[dict[str, Any]], directory: Path, found: Findings) -> None:
    """Compare the source files of a token store that still exist with their recorded hashes."""
    if not sources:
        found.unchecked.append(f"data: {directory} has no record of its sources")
    expected: dict[Path, str] = {}
    missing: list[Path] = []
    in_buckets: list[str] = []
    for entry in sources:
        if is_bucket_url(entry["name"]):
            in_buckets.append(entry["name"])
            continue
        source, digests = Source(entry["name"], entry["kind"]), entry["sha256"]
        with found.checking("data", Path(entry["name"])):
            files = source.files if entry["kind"] in READERS else ()
            if not files and entry["kind"] == SAMPLE:
                if source.reader.identity(source.name, str)[-1] != digests:
                    found.differs.append(
                        "data: --data sample has different text in this Python version"
                    )
            elif len(files) != len(digests):  # the source no longer exists here, or is on the Hub
                missing.append(Path(entry["name"]))
            else:
                expected |= dict(zip(files, digests, strict=True))
    faults, gone = changed_files(expected)
    _note_missing([*missing, *gone], found)
    if in_buckets:
        more = f" and {counted(len(in_buckets) - 1, 'more object')}" if in_buckets[1:] else ""
        found.unchecked.append(f"data: in a bucket, and not downloaded: {in_buckets[0]}{more}")
    found.files("data", faults, len(expected) - len(gone), "source file")
