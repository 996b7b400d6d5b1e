"""Crash-safe, atomic writes of files and directories; file locks; the cache directory.

Only this module opens files for writing in directories that another user may have made. It follows
no links. Temporary names cannot be guessed: `.NAME.16 HEX DIGITS.new` for a file being written,
`.old` for the version it replaces, `.gone` for a file being removed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from consyn_jax.errors import UserError

PARTIAL = ".partial"  # suffix of a file that users may read while it is being written
FRESH, REPLACED, REMOVED = "new", "old", "gone"
_ASIDE = re.compile(r"\.(?P<name>.+?)(\.[0-9a-f]{16})?\.(?P<kind>new|old|gone)")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LARGEST_TEXT = 1 << 30  # bytes of a file that is read whole; tokenizers have up to 35 MB
_TEXTS = {".json", ".yaml", ".jinja", ".model", ".txt"}
_KEPT_OF_NAME = 60  # characters of up to four bytes; file systems allow 255 bytes per name
_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def cache_directory() -> Path:
    """The cache directory: $CONSYN_CACHE, otherwise consyn_jax in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("CONSYN_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "consyn_jax"


def check_is_no_pointer(path: Path) -> None:
    """Check that a file is not a Git LFS pointer, which Git checks out if LFS is not installed.

    Raises:
        UserError: the file is a pointer.
    """
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(
                f"{path} is a Git LFS pointer, not the file itself. Run git lfs pull in its "
                "directory, or download the file again."
            )


def flush(directory: Path) -> None:
    """Flush the entries of a directory to the disk."""
    opened = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def make_directory(path: Path) -> None:
    """Make a directory and its missing parents, and flush each new name to the disk."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        flush(each.parent)


def open_regular(path: str | Path, flags: int, mode: int = 0o644) -> int:
    """Open a regular file without following symbolic links and without blocking on a pipe.

    This function can be passed as `opener` to Python's `open`.

    Raises:
        OSError: `os.open` fails, the path is not a regular file (a symbolic link, for example), or
            a file to be written has another hard link. `strerror` names the reason.
    """
    try:
        safe = flags & ~os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(path, safe, mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            reason = "it is a symbolic link, which is not followed here"
            raise OSError(errno.ELOOP, reason, str(path)) from error
        raise
    status, reason = os.fstat(descriptor), ""
    if not stat.S_ISREG(status.st_mode):
        reason = "it is not a regular file"
    elif flags & (os.O_WRONLY | os.O_RDWR) and status.st_nlink > 1:
        reason = "it has a hard link, so writing would also change the file under its other name"
    if reason:
        os.close(descriptor)
        raise OSError(errno.EINVAL, reason, str(path))
    if flags & os.O_TRUNC:  # truncate only after the checks, which protect other files
        os.ftruncate(descriptor, 0)
    return descriptor


def read_whole(path: Path, largest: int = LARGEST_TEXT) -> bytes:
    """Read a regular file completely.

    Raises:
        OSError: the file cannot be read, is a link, or has more than `largest` bytes; `strerror`
            names the reason.
    """
    with open(path, "rb", opener=open_regular) as file:
        if (size := os.fstat(file.fileno()).st_size) > largest:
            raise OSError(
                errno.EFBIG, f"it has {size:,} bytes, too many for this kind of file", str(path)
            )
        return file.read()


def aside(path: Path, kind: str = FRESH) -> Path:
    """A hidden, unguessable name beside `path`, for a file that is being written or removed."""
    return path.with_name(f".{path.name[:_KEPT_OF_NAME]}.{secrets.token_hex(8)}.{kind}")


def refuse_unfinished(path: Path) -> None:
    """Refuse a model directory that a killed command has not finished writing or removing.

    Such a directory may lack files, which a reader cannot always notice.

    Raises:
        UserError: the path has a temporary name, as made by `aside`.
    """
    match = _ASIDE.fullmatch(path.resolve().name)
    if match is not None and match["kind"] != REPLACED:
        raise UserError(
            f"{path} was left by a command that was killed while it wrote or removed "
            f"{match['name']}. Run that command again, or delete it."
        )


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically: readers see the old or the new content, also after a crash.

    The content is flushed to the disk before it gets the name `path`, and the name is flushed
    before this returns. A link at `path` is replaced, not followed. Text is written as UTF-8.
    """
    data = content.encode() if isinstance(content, str) else content
    fresh = aside(path)
    try:
        with open(fresh, "xb", opener=open_regular) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        flush(path.parent)
    except OSError:
        with suppress(OSError):
            fresh.unlink()
        raise


def replace_directory(fresh: Path, target: Path) -> None:
    """Rename the flushed directory `fresh` to `target`, and remove an older `target`.

    After a crash, either `target` is complete or `restore_replaced` can restore it.
    """
    old = aside(target, REPLACED)
    if target.is_symlink() or target.exists():
        target.rename(old)
    fresh.rename(target)
    flush(target.parent)
    with suppress(OSError):  # `restore_replaced` removes it later
        _delete(old)


def remove(path: Path) -> None:
    """Remove a file or directory atomically: after a crash, `path` is complete or missing.

    Raises:
        OSError: it cannot be removed.
    """
    old = aside(path, REMOVED)
    try:
        path.rename(old)
    except FileNotFoundError:
        return
    flush(path.parent)
    _delete(old)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def restore_replaced(directory: Path, names: Collection[str]) -> None:
    """Clean up after a crash inside `write_whole` or `replace_directory`.

    A directory that was being replaced gets its name back, unless the new directory has the name.
    """
    for name, kind, path in _asides(directory):
        if name not in names:
            continue
        target = directory / name
        if kind == REPLACED and path.is_dir() and not path.is_symlink() and not target.exists():
            path.rename(target)
            flush(directory)
        else:
            _delete(path)


def _asides(directory: Path) -> Iterator[tuple[str, str, Path]]:
    for path in sorted(directory.iterdir()):
        if match := _ASIDE.fullmatch(path.name):
            yield match["name"], match["kind"], path


def irregular(path: Path, *, inside: bool = True) -> tuple[Path, str] | None:
    """The first path that `all_irregular` finds, with its kind; None if there is none."""
    return next(all_irregular(path, inside=inside), None)


def all_irregular(path: Path, *, inside: bool = True) -> Iterator[tuple[Path, str]]:
    """Find entries that are neither regular files nor directories, at `path` and below it.

    Yields:
        The path of each entry, and its kind in words ("a link").
    """
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return
    if kind := _KINDS.get(stat.S_IFMT(mode)):
        yield path, kind
    if not (inside and stat.S_ISDIR(mode)):
        return
    with suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            if not entry.is_file(follow_symlinks=False):
                yield from all_irregular(Path(entry.path))


def refuse_strays(directory: Path, patterns: Collection[str], *, named: Path | None = None) -> None:
    """Refuse an untrusted directory that contains unsafe files.

    Unsafe files are special files such as pipes, files that are too large, and links that lead out
    of the directory.

    Args:
        patterns: glob patterns of the files that will be read; others are not checked.
        named: a file that the user named explicitly, which may be a link or a pipe.

    Raises:
        UserError: the directory contains an unsafe file; the message names it.
    """
    for _, sentences in strays(directory, patterns, named=named):
        raise UserError(sentences)


def strays(
    directory: Path, patterns: Collection[str], *, named: Path | None = None
) -> Iterator[tuple[Path, str]]:
    """Find special files, files that are too large, and links that lead out of the directory.

    Args:
        patterns, named: the same as for `refuse_strays`.

    Yields:
        The path of each such file, and a message about it.
    """
    for path in (path for pattern in patterns for path in sorted(directory.glob(pattern))):
        target = None if path == named else leads_out(path, directory)
        if target is not None:
            yield (
                path,
                f"{path} is a link to {target}, outside its directory, and is not followed. "
                "Replace the link with a copy of the file, or give the directory of the link's "
                "target.",
            )
        elif path != named and path.exists() and not (path.is_file() or path.is_dir()):
            yield path, f"{path} is not a regular file, and only regular files are read. Remove it."
        elif path.suffix in _TEXTS and path.is_file() and path.stat().st_size > LARGEST_TEXT:
            yield (
                path,
                f"{path} has {path.stat().st_size:,} bytes, too many for this kind of file. "
                "Remove it, or replace it with the right file.",
            )


def leads_out(path: Path, directory: Path) -> Path | None:
    """The target of a symbolic link that leads out of a directory; None for any other path.

    The Hugging Face Hub's cache has links from `snapshots/REVISION/` to `blobs/`; such links count
    as inside.
    """
    if not path.is_symlink():
        return None
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
    revision = next((p for p in (home, *home.parents) if p.parent.name == "snapshots"), None)
    inside = [home] if revision is None else [home, revision.parent.parent / "blobs"]
    return None if any(target.is_relative_to(place) for place in inside) else target


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Take an advisory lock without waiting; False if another process holds it.

    The kernel releases the lock when the descriptor is closed, however the process ends.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
