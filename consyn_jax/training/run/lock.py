"""The file `lock` in a run directory, which names the only process that may write there."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from consyn_jax.errors import UserError
from consyn_jax.files import open_regular, try_lock, write_whole

LOCK = "lock"
LARGEST = 1 << 16  # characters
# Errors of file systems that have no locks.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
GONE = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}
TRIES, RETRY_S = 5, 0.1
# On file systems without locks:
SETTLE_S = 1.0  # if two processes take the lock at once, the later one has it after this time
BEAT_S = 15.0  # seconds between two touches of the file by its holder
WATCH_S = 60.0  # seconds to wait for a touch by a holder on another host


class RunLock:
    """Keep all other processes out of a directory, until `release` or the end of this process.

    The lock is an advisory lock of the operating system. If the file system has no locks, the
    process named in the file has the lock. That process loses the lock when it has ended (on this
    host) or no longer touches the file (on another host).

    Attributes:
        holder: Content of the file.

    Raises:
        UserError: Another process has the lock; the message names that process.
        OSError: The directory cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self._file, self._beat_at = directory / LOCK, time.monotonic()
        self._about = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "born": _start_time(os.getpid()),
        }
        self.holder = json.dumps(self._about)
        self._descriptor: int | None = None
        self._take()

    def _take(self) -> None:
        self._descriptor = _locked(self._file)
        if self._descriptor is None:
            self._claim()
        else:
            self._write()

    def _write(self) -> None:
        if self._descriptor is None:
            write_whole(self._file, self.holder)
        else:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, self.holder.encode(), 0)

    def sign(self, run: str) -> None:
        """Write the identity of the run to the file.

        Raises:
            OSError: The directory cannot be written.
        """
        self.holder = json.dumps({**self._about, "run": run})
        self._write()

    def beat(self) -> None:
        """Touch the file, if the file system has no locks; call this every few seconds."""
        if self._descriptor is None and time.monotonic() - self._beat_at >= BEAT_S:
            self._beat_at = time.monotonic()
            with suppress(OSError):
                os.utime(self._file)

    @property
    def is_lost(self) -> bool:
        """Whether the file was deleted or replaced; False if the file system cannot tell."""
        if self._descriptor is None:
            return read_holder(self._file.parent) != self.holder
        try:
            there = self._file.lstat()
        except OSError as error:
            return error.errno in GONE
        return not os.path.samestat(there, os.fstat(self._descriptor))

    def renew(self) -> None:
        """Take the lock again after the file was deleted.

        Raises:
            UserError: Another process has the lock.
            OSError: The directory cannot be written.
        """
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self._take()

    def release(self) -> None:
        """Release the lock, so that other processes can take it."""
        with suppress(OSError):  # for example on a disk that has become read-only
            if not self.is_lost:
                self._file.unlink()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _claim(self) -> None:
        """Take the lock by writing the file, on a file system that has no locks of its own.

        Raises:
            UserError: Another process has the lock.
        """
        holder = read_holder(self._file.parent)
        if holder and _is_alive(self._file, holder):
            raise _in_use(self._file, holder)
        self._write()
        time.sleep(SETTLE_S)
        holder = read_holder(self._file.parent)
        if holder != self.holder:
            raise _in_use(self._file, holder)


def check_free(directory: Path) -> None:
    """Check early, without changing anything, that no other process writes to a directory.

    Raises:
        UserError: Another process has the lock.
    """
    # A missing permission is reported where the directory is opened.
    with suppress(FileNotFoundError, PermissionError):
        if (descriptor := _locked(directory / LOCK, shared=True)) is not None:
            os.close(descriptor)


def is_held(directory: Path) -> bool:
    """Whether any process has the lock of a directory; needs only read access.

    Nothing is changed, and the call does not wait.
    """
    with suppress(OSError):
        descriptor = open_regular(directory / LOCK, os.O_RDONLY)
        try:
            return not try_lock(descriptor, shared=True)
        except OSError:  # the file system has no locks, so the content of the file decides
            holder = read_holder(directory)
            return bool(holder) and _is_alive(directory / LOCK, holder)
        finally:
            os.close(descriptor)
    return False


def read_holder(directory: Path) -> str:
    """Read the content of the lock file; empty if there is none."""
    with (
        suppress(OSError, UnicodeDecodeError),
        open(directory / LOCK, encoding="utf-8", opener=open_regular) as file,
    ):
        return file.read(LARGEST)
    return ""


def _locked(file: Path, shared: bool = False) -> int | None:
    """Open and lock the file; None if the file system has no locks.

    The attempt is repeated, because another process blocks the lock for a moment while it checks or
    releases the lock.
    """
    for left in reversed(range(TRIES)):
        descriptor = open_regular(file, os.O_RDWR | (0 if shared else os.O_CREAT))
        try:
            if try_lock(descriptor, shared=shared):
                with suppress(FileNotFoundError):
                    if os.fstat(descriptor).st_ino == file.lstat().st_ino:
                        return descriptor
            else:
                time.sleep(RETRY_S if left else 0.0)
        except OSError as error:
            os.close(descriptor)
            if error.errno in NO_LOCKS:
                return None
            raise
        os.close(descriptor)
    raise _in_use(file, read_holder(file.parent))


def _in_use(file: Path, holder: str) -> UserError:
    about = _parsed(holder)
    who = (
        f": pid {about.get('pid')} on {about.get('host')}, since {about.get('since')}"
        if about
        else ""
    )
    return UserError(
        f"--output {file.parent} is in use by another process{who}. Wait for that process, or name "
        "another directory."
    )


def _parsed(holder: str) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        about = json.loads(holder)
        if isinstance(about, dict):
            return about
    return {}


def _is_alive(file: Path, holder: str) -> bool:
    """Whether the process that the lock file names is still running."""
    about = _parsed(holder)
    if about.get("host") == socket.gethostname():
        pid = about.get("pid")
        if not isinstance(pid, int):
            return False
        start_time = _start_time(pid)
        return start_time is not None and start_time == about.get("born")
    touched, began = file.stat().st_mtime_ns, time.monotonic()
    while time.monotonic() - began < WATCH_S:
        time.sleep(min(BEAT_S, WATCH_S) / 3)
        with file.open() as opened:  # opening makes a network file system ask its server
            if os.fstat(opened.fileno()).st_mtime_ns != touched:
                return True
    return False


def _start_time(pid: int) -> str | None:
    """Start time of a process of this host; None if there is no such process.

    The start time distinguishes the process from a later one with the same process id.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        try:  # not Linux
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            return "another user's"
        return "unknown"
    # Fields of proc(5) from the third on; the name before them may contain spaces.
    state, *fields = stat.rpartition(")")[2].split()
    return None if state == "Z" else f"{boot} {fields[18]}"
