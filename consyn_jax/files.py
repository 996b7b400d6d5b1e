"""Atomic writes of files and directories, which survive a crash, file locks, and the cache's place.

This is the one place that opens files for writing in directories that somebody else may have made.
No link is followed there, and what is not finished has a name that nobody can guess:
`.NAME.16 HEX DIGITS.new`, `.old` for what it replaces, `.gone` for what is being removed.
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

PARTIAL = ".partial"  # after the name of a file that people may read while it grows
FRESH, REPLACED, REMOVED = "new", "old", "gone"
_ASIDE = re.compile(r"\.(?P<name>.+?)(\.[0-9a-f]{16})?\.(?P<kind>new|old|gone)")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LARGEST_TEXT = 1 << 30  # bytes of a file that is read whole; tokenizers have up to 35 MB
_TEXTS = {".json", ".yaml", ".jinja", ".model", ".txt"}
_KEPT_OF_NAME = 60  # characters, at most four bytes each: file systems allow 255 bytes a name
_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def cache_directory() -> Path:
    """The cache: $CONSYN_CACHE, otherwise consyn_jax in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("CONSYN_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "consyn_jax"


def check_is_no_pointer(path: Path) -> None:
    """Check that a file is not a Git LFS pointer, which Git leaves where LFS is not installed.

    Raises:
        UserError: it is a pointer.
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
    """Make a directory and its parents, each with its name flushed to the disk."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        flush(each.parent)


def open_regular(path: str | Path, flags: int, mode: int = 0o644) -> int:
    """Open a regular file; refuse symbolic links, and for writing hard ones; a pipe does not block.

    It is an `opener` for Python's `open`, too.

    Raises:
        OSError: as `os.open`; or it is a link or not a file, or it is opened for writing and has a
            hard link. `strerror` says so.
    """
    try:
        safe = flags & ~os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(path, safe, mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            reason = "it is a link, and links are not followed here"
            raise OSError(errno.ELOOP, reason, str(path)) from error
        raise
    status, reason = os.fstat(descriptor), ""
    if not stat.S_ISREG(status.st_mode):
        reason = "it is not a regular file"
    elif flags & (os.O_WRONLY | os.O_RDWR) and status.st_nlink > 1:
        reason = "the file has another name, too (a hard link), and would change there"
    if reason:
        os.close(descriptor)
        raise OSError(errno.EINVAL, reason, str(path))
    if flags & os.O_TRUNC:  # not before it is known to be no other file
        os.ftruncate(descriptor, 0)
    return descriptor


def read_whole(path: Path, largest: int = LARGEST_TEXT) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: it cannot be read, is a link, or has more than `largest` bytes; `strerror` says so.
    """
    with open(path, "rb", opener=open_regular) as file:
        if (size := os.fstat(file.fileno()).st_size) > largest:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, more than it can have", str(path))
        return file.read()


def aside(path: Path, kind: str = FRESH) -> Path:
    """A hidden name beside `path` that nobody can guess, for what is being written or removed."""
    return path.with_name(f".{path.name[:_KEPT_OF_NAME]}.{secrets.token_hex(8)}.{kind}")


def refuse_unfinished(path: Path) -> None:
    """Refuse a model that was being written or removed when its process was killed.

    Some of its files may be whole and others missing, and a reader cannot always tell.

    Raises:
        UserError: the path has a name of `aside`.
    """
    match = _ASIDE.fullmatch(path.resolve().name)
    if match is not None and match["kind"] != REPLACED:
        raise UserError(
            f"{path} was left by a command that was killed while it wrote or removed "
            f"{match['name']}. Run that command again, or delete it."
        )


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that readers, also after a crash, see all of it or the previous content.

    The content is flushed to the disk before it takes the name `path`, and the name is flushed
    before this returns. A link of that name is replaced and not followed. Text is written as UTF-8.
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
    """Rename a directory that is flushed to `target`; an older one there is removed.

    A crash at any moment leaves one of them whole: `target`, or what `restore_replaced` finds.
    """
    old = aside(target, REPLACED)
    if target.is_symlink() or target.exists():
        target.rename(old)
    fresh.rename(target)
    flush(target.parent)
    with suppress(OSError):  # `restore_replaced` removes it later
        _delete(old)


def remove(path: Path) -> None:
    """Remove a file or directory at once: a crash leaves all of it, or nothing of that name.

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
    """Clean up what a crash inside `write_whole` or `replace_directory` has left.

    A directory that was being replaced gets its name back if nothing has that name.
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
    """The first of `all_irregular`; None if there is none."""
    return next(all_irregular(path, inside=inside), None)


def all_irregular(path: Path, *, inside: bool = True) -> Iterator[tuple[Path, str]]:
    """Everything at `path`, and in the directory there, that is neither a file nor a directory.

    Yields:
        Its path and its kind in words ("a link").
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
    """Refuse an untrusted directory with a link out of it, or with a special or oversized file.

    Args:
        patterns: patterns of the files that are read.
        named: a file that the user has named, which may be a link or a pipe.

    Raises:
        UserError: there is one; the message names it.
    """
    for _, sentences in strays(directory, patterns, named=named):
        raise UserError(sentences)


def strays(
    directory: Path, patterns: Collection[str], *, named: Path | None = None
) -> Iterator[tuple[Path, str]]:
    """Each link out of a directory, each special file and each file that is too large.

    Args:
        patterns, named: as for `refuse_strays`.

    Yields:
        Its path, and sentences about it.
    """
    for path in (path for pattern in patterns for path in sorted(directory.glob(pattern))):
        target = None if path == named else leads_out(path, directory)
        if target is not None:
            yield (
                path,
                f"{path} is a link to {target}, outside of its directory, and is not followed. "
                "Copy the file there, or name the directory that it is in.",
            )
        elif path != named and path.exists() and not (path.is_file() or path.is_dir()):
            yield path, f"{path} is not a regular file, so it is not read. Remove it."
        elif path.suffix in _TEXTS and path.is_file() and path.stat().st_size > LARGEST_TEXT:
            yield (
                path,
                f"{path} has {path.stat().st_size:,} bytes, more than such a file can have. "
                "Remove it, or put the right one there.",
            )


def leads_out(path: Path, directory: Path) -> Path | None:
    """The target of a link that leads out of a directory; None for all else.

    The cache of Hugging Face's hub has links from each `snapshots/REVISION/` to `blobs/` beside it;
    these count as inside.
    """
    if not path.is_symlink():
        return None
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
    revision = next((p for p in (home, *home.parents) if p.parent.name == "snapshots"), None)
    inside = [home] if revision is None else [home, revision.parent.parent / "blobs"]
    return None if any(target.is_relative_to(place) for place in inside) else target


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Take an advisory lock without waiting; False if another process holds it.

    The kernel releases it when the descriptor is closed, however the process ends.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
