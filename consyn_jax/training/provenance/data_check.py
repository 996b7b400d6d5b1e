"""Compare the data of a run with its record: stores, their source files, token files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from consyn_jax.data.sources.source import READERS, Source
from consyn_jax.data.store.manifest import MANIFEST, SOURCES, read_manifest, read_sources
from consyn_jax.data.store.token_store import fingerprint_of
from consyn_jax.errors import counted
from consyn_jax.training.provenance.findings import Findings, changed_files

KINDS = {
    "file": "sha256",
    "index": "index_sha256",
    "targets": "targets_sha256",
    "origins": "origins_sha256",
}


def check_data(data: dict[str, Any], found: Findings) -> None:
    """Read all data again and compare it with its digests.

    Args:
        data: the value of "data" in provenance.json.
    """
    if "sources" not in data:
        found.unchecked.append("data: it was streamed, or given in Python")
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
        found.unchecked.append(f"data: {missing[0]}{more}: not there any more")


def _check_store(store: dict[str, Any], found: Findings) -> None:
    directory = Path(store["directory"])
    if not directory.is_dir():
        found.unchecked.append(f"data: {directory}: not there any more")
        return
    manifest, sources = read_manifest(directory), read_sources(directory)
    if fingerprint_of(manifest) != store["fingerprint"]:
        found.differs.append(f"data: {directory / MANIFEST} describes other data than the run's")
    if manifest.get("sources_sha256") != store["sources_sha256"]:
        found.differs.append(f"data: {directory / SOURCES} names other sources than the run's")
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    files = {
        directory / shard[kind]: shard[digest]
        for shard in shards
        for kind, digest in KINDS.items()
        if kind in shard
    }
    faults, missing = changed_files(files)
    faults += [f"{path} is missing" for path in missing]
    found.files("data", faults, len(files), f"file of {directory}")
    _check_sources(sources, directory, found)


def _check_sources(sources: list[dict[str, Any]], directory: Path, found: Findings) -> None:
    """Compare the source files of a store, if they are still in their place."""
    if not sources:
        found.unchecked.append(f"data: {directory} does not say what it was prepared from")
    expected: dict[Path, str] = {}
    missing: list[Path] = []
    for entry in sources:
        source, digests = Source(entry["name"], entry["kind"]), entry["sha256"]
        with found.checking("data", Path(entry["name"])):
            files = source.files if entry["kind"] in READERS else ()
            if not files and entry["kind"] == "sample":
                if source.reader.identity(source.name, str)[-1] != digests:
                    found.differs.append("data: the sample of this Python is not the run's")
            elif len(files) != len(digests):  # it is gone, or it is on the Hub
                missing.append(Path(entry["name"]))
            else:
                expected |= dict(zip(files, digests, strict=True))
    faults, gone = changed_files(expected)
    _note_missing([*missing, *gone], found)
    found.files("data", faults, len(expected) - len(gone), "source file")
