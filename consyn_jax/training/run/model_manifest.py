"""The manifest of an exported model: size and SHA-256 of each of its files."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from consyn_jax.files import flush, open_regular, write_whole
from consyn_jax.training.checkpointing.checkpoint_files import PROVENANCE, is_hollow

MANIFEST = "consyn_manifest.json"
WEIGHTS = ".safetensors"
READERS = 4  # files hashed at once; hashlib releases the interpreter lock
LARGEST = 1 << 26  # bytes of a manifest


def seal(directory: Path, provenance: Callable[[Mapping[str, str]], str] | None = None) -> None:
    """Write a manifest of a model's files, and flush all files and directories to the disk.

    Args:
        provenance: Function that makes the content of provenance.json from the SHA-256 of each file
            of weights.

    Raises:
        OSError: A file cannot be read or written.
    """
    names = sorted(
        path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()
    )
    with ThreadPoolExecutor(READERS) as readers:
        entries = list(readers.map(lambda name: _entry(directory / name, is_new=True), names))
    files = dict(zip(names, entries, strict=True))
    if provenance is not None:
        weights = {name: files[name]["sha256"] for name in names if name.endswith(WEIGHTS)}
        write_whole(directory / PROVENANCE, provenance(weights))
        files[PROVENANCE] = _entry(directory / PROVENANCE, is_new=True)
    content = {"files": files}
    write_whole(directory / MANIFEST, json.dumps(content, indent=1) + "\n")
    for inner in directory.rglob("*"):
        if inner.is_dir():
            flush(inner)
    flush(directory)


def _entry(file: Path, *, is_new: bool) -> dict[str, Any]:
    with open(file, "rb", opener=open_regular) as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if is_new:
            os.fsync(opened.fileno())
        return {"size": os.fstat(opened.fileno()).st_size, "sha256": digest}


def has_manifest(directory: Path) -> bool:
    """Whether a model was exported with a manifest; older versions wrote none."""
    return (directory / MANIFEST).is_file()


def disagreement(directory: Path) -> str | None:
    """Describe the first difference between a model and its manifest; None if they agree.

    All files in the manifest are read. Files that are not in the manifest are ignored.
    """
    return next(disagreements(directory), None)


def disagreements(directory: Path) -> Iterator[str]:
    """Describe all differences between a model and its manifest, one per file."""
    expected = _listed(directory)
    if isinstance(expected, str):
        yield expected
        return
    with ThreadPoolExecutor(READERS) as readers:
        reasons = readers.map(lambda name: _difference(directory, name, expected[name]), expected)
        yield from filter(None, reasons)


def added(directory: Path) -> Iterator[str]:
    """Report each file in a model's directory that is not in its manifest.

    Hidden files are left out, because file managers and downloads create them.
    """
    expected = _listed(directory)
    names = (path.relative_to(directory) for path in sorted(directory.rglob("*")))
    for name in names:
        is_known = isinstance(expected, str) or name.as_posix() in {*expected, MANIFEST}
        is_hidden = any(part.startswith(".") for part in name.parts)
        if not (is_known or is_hidden or stat.S_ISDIR((directory / name).lstat().st_mode)):
            yield f"{name.as_posix()} is not in {MANIFEST}"


def _listed(directory: Path) -> dict[str, dict[str, Any]] | str:
    """Read the entries of a manifest, by file; if it is unusable, return the reason."""
    try:
        with open(directory / MANIFEST, "rb", opener=open_regular) as opened:
            files = json.loads(opened.read(LARGEST))["files"]
        expected = {str(name): dict(entry) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is damaged"
    if not expected:
        return f"{MANIFEST} names no file"
    if outside := [name for name in expected if ".." in Path(name).parts or name.startswith("/")]:
        return f"{MANIFEST} names {outside[0]}, which is outside the directory"
    return expected


def _difference(directory: Path, name: str, expected: dict[str, Any]) -> str | None:
    try:
        parents = [directory / parent for parent in Path(name).parents][:-1]
        if links := [parent for parent in parents if parent.is_symlink()]:
            return f"{links[-1].relative_to(directory).as_posix()} is a link"
        if is_hollow(directory / name):
            return f"{name} is a large sparse file"
        size = (directory / name).stat().st_size
        if size != expected.get("size"):
            return f"{name} has {size:,} bytes and not {expected.get('size'):,}"
        found = _entry(directory / name, is_new=False)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    except (TypeError, ValueError):
        return f"{MANIFEST} is damaged"
    return None if found == expected else f"{name} is not what was written"


def weights_digests(directory: Path) -> dict[str, str]:
    """SHA-256 of each weights file, as the manifest of an already verified model lists it."""
    files = json.loads((directory / MANIFEST).read_bytes())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(WEIGHTS)}
