"""The directory of a job inside --shared_directory; files of others in it are never touched.

Other users may be able to write to --shared_directory, and the directory's name is predictable. So
it may already exist, as another user's directory or as a link to somebody's files. Ours belongs to
one user (mode 0700), because what it contains becomes part of the store. All processes of the
preparation run as this user.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from consyn_jax.data.preparation.segments.job import JOB
from consyn_jax.errors import UserError, listed
from consyn_jax.files import aside, flush, irregular, make_directory, remove

TOKENIZER = "tokenizer"  # learned from the data
GENERATION = re.compile(r"[0-9a-f]{32}")
_NAMES = rf"({re.escape(JOB)}|{TOKENIZER}|{GENERATION.pattern})"
_ASIDE = rf"\.{_NAMES}\.[0-9a-f]{{16}}\.(new|old|gone)"
_OURS = re.compile(rf"{_NAMES}|{_ASIDE}")
_OF_NFS = re.compile(r"\.nfs[0-9a-f]+")  # a removed file that some process still has open


def open_directory(root: Path) -> None:
    """Make the directory, or check one that exists; remove what a killed command left half-way.

    Raises:
        UserError: it is a link, belongs to another user, or contains something else.
        OSError: it cannot be written.
    """
    make_directory(root.parent)
    try:
        root.mkdir(mode=0o700)
        flush(root.parent)
    except FileExistsError:
        _check(root)
    for entry in root.iterdir():
        if re.fullmatch(_ASIDE, entry.name):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def clear(root: Path, kept: Collection[str] = ()) -> None:
    """Remove the files of the job.

    Raises:
        OSError: a file cannot be removed.
    """
    (root / JOB).unlink(missing_ok=True)  # first, since without it nothing else is continued
    flush(root)
    for entry in root.iterdir():
        if _OURS.fullmatch(entry.name) and entry.name not in kept:
            remove(entry)


def _check(root: Path) -> None:
    found = irregular(root, inside=False) or (None if root.is_dir() else (root, "a file"))
    entries = () if found else sorted(root.iterdir())
    for path in entries:
        found = found or irregular(path, inside=False)
    if found:
        raise UserError(
            f"{found[0]} is {found[1]}, where consyn-prepare needs files of its own. Remove it, "
            "or give another --shared_directory."
        )
    if _owner(root) != os.geteuid() and _owner(root) != _owner_of_new(root):
        raise UserError(f"{root} belongs to another user. Give a --shared_directory of your own.")
    names = [entry.name for entry in entries]
    if foreign := [n for n in names if not (_OURS.fullmatch(n) or _OF_NFS.fullmatch(n))]:
        raise UserError(
            f"{root} contains {listed(foreign)}, which is not from consyn-prepare and is not "
            "deleted. Move it elsewhere, or give another --shared_directory."
        )


def _owner_of_new(path: Path) -> int:
    """The owner of a directory made here, which on some network storage is not this user."""
    probe = aside(path)
    probe.mkdir(mode=0o700)
    try:
        return _owner(probe)
    finally:
        probe.rmdir()


def _owner(path: Path) -> int:
    return path.lstat().st_uid
