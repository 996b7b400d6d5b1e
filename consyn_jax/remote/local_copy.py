"""Copy objects of a bucket to the cache: one object, or all objects below a prefix.

    CACHE/buckets/SCHEME/BUCKET/DIGEST/NAME...

DIGEST is a hash of the keys, sizes and versions of all objects. If an object changes, the copy gets
a new directory, so the files that a run is reading never change. A file gets its final name when
its download is complete. After an interruption, only missing files are downloaded.
"""

from __future__ import annotations

import fcntl
import fnmatch
import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from consyn_jax.errors import UserError, remedy, show_as_url
from consyn_jax.files import aside, cache_directory, open_regular
from consyn_jax.remote.bucket import UNCHANGED, Bucket, BucketError, Stored
from consyn_jax.remote.bucket_clients import open_bucket
from consyn_jax.remote.urls import BucketUrl, parse, shown

_AT_ONCE = 8  # parallel downloads
_LOCK = ".lock"


@cache  # so that one process reads the same versions everywhere
def local_copy(url: str, names: tuple[str, ...] = ("**",)) -> Path:
    """Copy the objects of a URL to the cache, and return the path of the copy.

    If the URL is a glob pattern, the result is a glob pattern of the copied files.

    Args:
        names: glob patterns that select files if the URL is a directory.

    Raises:
        UserError: no object matches, or a download fails.
    """
    place = parse(url)
    try:
        bucket = open_bucket(place)
        top, found = _objects(bucket, place, names)
        if not found:
            what = "nothing is there" if names == ("**",) else f"there is no {' or '.join(names)}"
            raise UserError(
                f"{place}: {what}. Correct the URL; for a run, add /final or /best to it."
            )
        copy = _directory(place, top, found)
        show_as_url(str(copy), f"{place.scheme}://{place.bucket}/{top}".rstrip("/"))
        _complete(bucket, copy, {inside(copy, each.key.removeprefix(top)): each for each in found})
    except BucketError as error:
        raise UserError(f"{place} {error}. {error.advice}") from error
    except OSError as error:
        raise UserError(
            f"{place} cannot be copied to the cache: {error.strerror}. "
            f"{remedy(error)}, or set CONSYN_CACHE to a directory with enough space."
        ) from error
    return copy / place.key.removeprefix(top)


def _objects(bucket: Bucket, place: BucketUrl, names: tuple[str, ...]) -> tuple[str, list[Stored]]:
    """Find the objects of a URL; return the prefix to remove from their keys, and the objects."""
    key = place.key
    parent = f"{key.rpartition('/')[0]}/" if "/" in key else ""
    if glob.has_magic(key):
        plain = key[: next(i for i, c in enumerate(key) if c in "*?[")]
        top = f"{plain.rpartition('/')[0]}/" if "/" in plain else ""
        found = [each for each in _files(bucket.find(plain)) if _matches(each.key, key)]
        return top, found
    found = _files(bucket.find(key))
    if exact := [each for each in found if each.key == key]:
        return parent, exact
    inside = f"{key}/" if key else ""
    return parent, [
        each
        for each in found
        if each.key.startswith(inside)
        and any(_matches(each.key.removeprefix(inside), name) for name in names)
    ]


def _files(found: list[Stored]) -> list[Stored]:
    """Leave out empty objects, which web consoles create to represent directories."""
    return [each for each in found if not each.key.endswith("/")]


def _matches(key: str, pattern: str) -> bool:
    """Whether a key matches a glob pattern; `**` matches any number of path components.

    >>> _matches("a/b/c.txt", "a/*.txt"), _matches("a/b/c.txt", "a/**/*.txt")
    (False, True)
    """
    return _parts_match(key.split("/"), pattern.split("/"))


def _parts_match(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(_parts_match(parts[skip:], patterns[1:]) for skip in range(len(parts) + 1))
    is_first = bool(parts) and fnmatch.fnmatchcase(parts[0], patterns[0])
    return is_first and _parts_match(parts[1:], patterns[1:])


def _directory(place: BucketUrl, top: str, found: list[Stored]) -> Path:
    names = [[each.key, each.size, each.version] for each in found]
    digest = hashlib.sha256(json.dumps([top, names]).encode()).hexdigest()[:32]
    return cache_directory() / "buckets" / place.scheme / place.bucket / digest


def inside(directory: Path, name: str) -> Path:
    """Return the path of an object's copy below a directory.

    Keys are untrusted, so a key that would lead out of the directory is refused.

    Raises:
        UserError: the key is not a valid file name.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..", _LOCK) or not part.isprintable() for part in parts):
        raise UserError(
            f"The object {shown(name)} has a name that is not valid for a file. Rename it, or give "
            "a URL that does not include it."
        )
    return directory.joinpath(*parts)


def _complete(bucket: Bucket, copy: Path, wanted: dict[Path, Stored]) -> None:
    """Download missing files; other processes that need the same files wait at a lock."""
    if all(_is_there(path, stored) for path, stored in wanted.items()):
        return
    copy.mkdir(parents=True, exist_ok=True)
    with _locked(copy / _LOCK):
        missing = [item for item in wanted.items() if not _is_there(*item)]
        with ThreadPoolExecutor(_AT_ONCE, "downloads") as threads:
            for _ in threads.map(lambda item: fetch(bucket, item[1], item[0]), missing):
                pass


def _is_there(path: Path, stored: Stored) -> bool:
    return path.is_file() and path.stat().st_size == stored.size


def fetch(bucket: Bucket, stored: Stored, path: Path) -> None:
    """Download an object to `path`; the file appears only when it is complete.

    Raises:
        BucketError: the download fails, or the object was replaced.
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = aside(path)
    try:
        bucket.download(stored, fresh)
        is_whole = fresh.stat().st_size == stored.size
        if is_whole:
            fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    if not is_whole:
        raise BucketError(f"sent too few or too many bytes for {shown(stored.key)}", UNCHANGED)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = open_regular(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
