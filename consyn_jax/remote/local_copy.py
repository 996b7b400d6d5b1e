"""Copies of objects in the cache: a file, or a directory with all objects below a prefix.

    CACHE/buckets/SCHEME/BUCKET/DIGEST/NAME...

The digest is of key, size and version of every object, so that a change of any gives a new copy
and no copy changes while a run reads it. A file has its name once it is whole: a download that was
killed continues with the files that are missing.
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

from consyn_jax.errors import UserError, remedy
from consyn_jax.files import aside, cache_directory, open_regular
from consyn_jax.remote.bucket import Bucket, BucketError, Stored
from consyn_jax.remote.bucket_clients import open_bucket
from consyn_jax.remote.urls import BucketUrl, parse, shown

_AT_ONCE = 8  # downloads
_LOCK = ".lock"


@cache  # so that all of one start reads the same versions
def local_copy(url: str, names: tuple[str, ...] = ("**",)) -> Path:
    """The path of a copy of what a bucket's URL names; for a pattern, a pattern of paths.

    Args:
        names: patterns of the files that are needed of a directory.

    Raises:
        UserError: nothing is there, or it cannot be downloaded.
    """
    place = parse(url)
    try:
        bucket = open_bucket(place)
        top, found = _objects(bucket, place, names)
        if not found:
            what = "nothing is there" if names == ("**",) else f"there is no {' or '.join(names)}"
            raise UserError(
                f"{place}: {what}. Correct the URL; of a run, name its final/ or best/."
            )
        copy = _directory(place, top, found)
        _complete(bucket, copy, {inside(copy, each.key.removeprefix(top)): each for each in found})
    except BucketError as error:
        raise UserError(f"{place} {error}.") from error
    except OSError as error:
        raise UserError(
            f"{place} cannot be copied to the cache: {error.strerror}. "
            f"{remedy(error)}, or set CONSYN_CACHE to a directory with room."
        ) from error
    return copy / place.key.removeprefix(top)


def _objects(bucket: Bucket, place: BucketUrl, names: tuple[str, ...]) -> tuple[str, list[Stored]]:
    """The objects that a URL names, and the part of their keys that the copy leaves out."""
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
    """Leave out the markers that consoles make for directories."""
    return [each for each in found if not each.key.endswith("/")]


def _matches(key: str, pattern: str) -> bool:
    """Whether a key matches as a path does: `*` within a part, `**` over any number of parts.

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
    """The path of an object below a directory; a key may come from anyone, and leads nowhere else.

    Raises:
        UserError: no file can have such a name.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..", _LOCK) or not part.isprintable() for part in parts):
        raise UserError(
            f"The object {shown(name)} has a name that no file can have. Rename it, or name the "
            "others alone."
        )
    return directory.joinpath(*parts)


def _complete(bucket: Bucket, copy: Path, wanted: dict[Path, Stored]) -> None:
    """Download what is missing; other processes that want the same wait for it."""
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
    """Download an object to `path`, which appears once it is whole.

    Raises:
        BucketError: it cannot be downloaded, or was changed meanwhile.
        OSError: the disk refuses it.
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
        raise BucketError(f"sent another number of bytes than it has for {shown(stored.key)}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = open_regular(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
