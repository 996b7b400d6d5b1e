"""The directory of a job inside --shared_directory; the files of other users are never touched.

Other users may be able to write to --shared_directory, and the name of a job's directory is
predictable. So another user's directory, or a link to somebody's files, may already have this name.
The directory of a job belongs to one user (mode 0700), because its content becomes part of the
store. All processes of the preparation run as this user.

The unfinished store has a note with the paths of its directories of segments. A later command has
to remove these directories when it finishes the store, or deletes the store with `--overwrite`. If
that command has different data or no `--shared_directory`, only the note tells it the paths.

While a command uses the directory, it holds a lock in the directory. Otherwise, commands on two
hosts would share the directory if their stores had the same path on two local disks.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Collection, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from consyn_jax.data.preparation.segments.job import JOB
from consyn_jax.data.store.manifest import PREPARING
from consyn_jax.errors import UserError, listed, remedy
from consyn_jax.files import (
    aside,
    flush,
    irregular,
    make_directory,
    open_regular,
    read_whole,
    remove,
    try_lock,
    write_whole,
)
from consyn_jax.prepare_config import CorpusOptions

NAME = re.compile(r"consyn-[0-9a-f]{32}-[0-9a-f]{8}")  # of a directory in --shared_directory
TOKENIZER = "tokenizer"  # learned from the data
LOCK = "lock"
GENERATION = re.compile(r"[0-9a-f]{32}")
_NAMES = rf"({re.escape(JOB)}|{TOKENIZER}|{GENERATION.pattern})"
_ASIDE = rf"\.{_NAMES}\.[0-9a-f]{{16}}\.(new|old|gone)"
_OURS = re.compile(rf"{_NAMES}|{_ASIDE}|{LOCK}")
_OF_NFS = re.compile(r"\.nfs[0-9a-f]+")  # a removed file that some process still has open
_NOTE = "scratch.json"  # in PREPARING: a list of directories
_EXAMPLE = f"consyn-{'0' * 32}-{'0' * 8}"
_ELSEWHERE = "Give another directory, on storage that all nodes share."


class _Unusable(UserError):
    """A directory that this command must not use.

    Args:
        fact: the reason, as a sentence without full stop.
    """

    def __init__(self, fact: str, advice: str) -> None:
        super().__init__(f"{fact}. {advice}")
        self.fact = fact


class _InUse(_Unusable):
    """A directory of segments that another command has locked and still needs."""


def open_directory(root: Path) -> int:
    """Make the directory, or check an existing one; remove incomplete files of killed commands.

    Returns:
        The descriptor of the locked lock file; close it to release the lock.

    Raises:
        UserError: the directory is a link, belongs to another user, contains files that are not
            from consyn-prepare, or is in use.
        OSError: the directory cannot be written.
    """
    make_directory(root.parent)
    try:
        root.mkdir(mode=0o700)
        flush(root.parent)
    except FileExistsError:
        check_directory(root)
    lock = _locked(root)
    try:
        for entry in root.iterdir():
            if re.fullmatch(_ASIDE, entry.name):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    except BaseException:
        os.close(lock)
        raise
    return lock


def _locked(root: Path) -> int:
    """Lock the directory; return the descriptor of the lock file.

    Raises:
        UserError: another command has the lock, or the storage has no locks.
        OSError: the lock file cannot be opened.
    """
    path = root / LOCK
    lock = open_regular(path, os.O_RDWR | os.O_CREAT)
    try:
        is_free = try_lock(lock)
    except OSError as error:
        os.close(lock)
        raise _Unusable(
            f"{root} cannot be locked: {error.strerror or error}",
            "Give a --shared_directory on storage with locks (flock).",
        ) from error
    with suppress(FileNotFoundError):  # the command that had the lock has just removed the file
        if is_free and os.path.samestat(os.fstat(lock), path.stat()):
            return lock
    os.close(lock)
    raise _InUse(
        f"{root} is in use by another command, here or on another machine",
        "Wait for it, or give another --shared_directory.",
    )


def clear(root: Path, kept: Collection[str] = ()) -> None:
    """Remove the files of the job, except the lock, which the caller holds.

    Raises:
        OSError: a file cannot be removed.
    """
    (root / JOB).unlink(missing_ok=True)  # first: without this file, no command continues the job
    flush(root)
    for entry in root.iterdir():
        if _OURS.fullmatch(entry.name) and entry.name not in (LOCK, *kept):
            remove(entry)


def check_directory(root: Path) -> None:
    """Check that a directory of segments is this user's, and from consyn-prepare.

    Raises:
        UserError: the directory is a link, belongs to another user, or contains files that are not
            from consyn-prepare.
    """
    found = irregular(root, inside=False) or (None if root.is_dir() else (root, "a file"))
    entries = () if found else sorted(root.iterdir())
    for path in entries:
        found = found or irregular(path, inside=False)
    if found:
        raise _Unusable(
            f"{found[0]} is {found[1]}, but consyn-prepare needs files of its own there",
            "Remove it, or give another --shared_directory.",
        )
    if _owner(root) != os.geteuid() and _owner(root) != _owner_of_new(root):
        raise _Unusable(f"{root} belongs to another user", "Give a --shared_directory of your own.")
    names = [entry.name for entry in entries]
    if foreign := [n for n in names if not (_OURS.fullmatch(n) or _OF_NFS.fullmatch(n))]:
        raise _Unusable(
            f"{root} contains {listed(foreign)}, which is not from consyn-prepare and is not "
            "deleted",
            "Move it elsewhere, or give another --shared_directory.",
        )


def _owner_of_new(path: Path) -> int:
    """The owner of a new directory beside `path`; not this user on some network storage."""
    probe = aside(path)
    probe.mkdir(mode=0o700)
    try:
        return _owner(probe)
    finally:
        probe.rmdir()


def _owner(path: Path) -> int:
    return path.lstat().st_uid


# ------------------------------------------------------------------------------ the note of a store


def scratch_name(key: str, output: Path) -> str:
    """The name of the directory of segments; it differs for each key and each output."""
    return f"consyn-{key}-{_mark_of(output)}"


def _mark_of(output: Path) -> str:
    return hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:8]


def note_scratch(output: Path, root: Path) -> None:
    """Add the path `root` of a directory of segments to the note of the store in `output`.

    Raises:
        OSError: the note cannot be written.
    """
    known = [str(each) for each in _noted(output)]
    if str(root) not in known:
        write_whole(output / PREPARING / _NOTE, json.dumps([*known, str(root)]))


def remove_scratch(output: Path) -> list[str]:
    """Remove all segments of the store in `output`; the caller holds the lock of `output`.

    Returns:
        One or two sentences for each directory that was not removed, with the reason.
    """
    left = []
    for root in _noted(output):
        try:
            _remove(root)
        except _InUse as refused:
            left.append(f"{refused.fact}.")
        except _Unusable as refused:
            left.append(
                f"{refused.fact}. If {root} contains segments of this store, they are no longer "
                "needed."
            )
        except OSError as error:
            left.append(
                f"{root} cannot be deleted from here ({error.strerror or error}). If it contains "
                "segments of this store, they are no longer needed. Delete the directory."
            )
    return left


def _remove(root: Path) -> None:
    """Remove a directory of segments; do nothing if it is gone.

    Raises:
        UserError: the directory fails `check_directory`, or is in use.
        OSError: the directory cannot be removed, or is on storage that this machine cannot access.
    """
    try:
        root.lstat()
    except FileNotFoundError:
        if root.parent.is_dir():
            return
        raise
    check_directory(root)
    lock = _locked(root)
    try:
        clear(root)
        (root / LOCK).unlink()  # last, because a command that finds none makes a new one
    finally:
        os.close(lock)
    try:
        root.rmdir()  # after `close`: NFS keeps an open file in its directory under a hidden name
    except OSError as error:
        if error.errno != errno.ENOTEMPTY or not (root / LOCK).exists():
            raise
        raise _InUse(f"{root} is in use by another command", "Wait for it.") from error


def _noted(output: Path) -> list[Path]:
    """Directories in the note whose names belong to this output; other paths are ignored."""
    found: object = []
    with suppress(OSError, ValueError, RecursionError):  # no note, or a damaged one
        found = json.loads(read_whole(output / PREPARING / _NOTE))
    paths = (
        [Path(each) for each in found if isinstance(each, str)] if isinstance(found, list) else []
    )
    mark = _mark_of(output)
    return [p for p in paths if NAME.fullmatch(p.name) and p.name.endswith(f"-{mark}")]


# ------------------------------------------------------------------------------- --shared_directory


def check_shared_directory(given: str, output: Path, options: CorpusOptions) -> None:
    """Check that segments can be written to a directory, and that no flag reads them as data.

    Raises:
        UserError: the path is not a directory, cannot be written, or overlaps --data, --validation
            or --output.
    """
    path = Path(given)
    _check_directory(path)
    shared = path.resolve()
    if shared.is_relative_to(output.resolve()) or _is_segments(output.resolve(), shared):
        raise _overlap(path, f"--output {output}")
    for flag, items in (("data", options.data), ("validation", options.validation)):
        for item in items:
            if _is_read(item, shared):
                raise _overlap(path, f"--{flag} {item}")


def _overlap(path: Path, other: str) -> UserError:
    return UserError(
        f"--shared_directory {path} and {other} overlap, so the segments would become part of the "
        "data or the store. Give a directory outside of --data and --output."
    )


def _check_directory(path: Path) -> None:
    place = f"--shared_directory {path}"
    for each in (path, *path.parents):
        if each.is_symlink() and not each.exists():
            raise UserError(f"{place} cannot be used: {each} is a broken link. {_ELSEWHERE}")
    if path.exists() and not path.is_dir():
        raise UserError(f"{place} is a file. {_ELSEWHERE}")
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not there.is_dir():
        raise UserError(f"{place} cannot be made: {there} is a file. {_ELSEWHERE}")
    probe = aside(there / "probe")
    try:
        probe.mkdir(mode=0o700)
        probe.rmdir()
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = f"{remedy(error)}, or give another directory." if is_full else _ELSEWHERE
        raise UserError(f"{place} cannot be written: {error.strerror}. {advice}") from error


def _is_read(item: str, shared: Path) -> bool:
    """Whether an item of --data may match segments in `shared`, now or later."""
    path = Path(item).expanduser()
    if path.exists():
        found = path.resolve()
        return shared.is_relative_to(found) or _is_segments(found, shared)
    if not glob.has_magic(item):
        return False  # "sample", a URL, or the name of a dataset
    plain = list(itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    beginning = Path(*plain).resolve()
    pattern = (*beginning.parts, *path.parts[len(plain) :])
    return _reaches(pattern, (shared / _EXAMPLE).parts)


def _reaches(pattern: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether a pattern may match a path, a directory above it, or something below it.

    >>> _reaches(("a", "*"), ("a", "b", "c")), _reaches(("a", "*.txt"), ("a", "b", "c"))
    (True, False)
    """
    for wanted, part in zip(pattern, parts, strict=False):
        if wanted == "**":
            return True
        if not fnmatchcase(part, wanted):
            return False
    return True


def _is_segments(path: Path, shared: Path) -> bool:
    """Whether a path is in a directory of segments in `shared`."""
    inside = path.relative_to(shared).parts if path.is_relative_to(shared) else ()
    return bool(inside) and NAME.fullmatch(inside[0]) is not None
