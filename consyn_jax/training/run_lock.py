"""One run, one writer: the file `lock` in a run directory says who writes there, and keeps others from it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from consyn_jax.config import UserError

LOCK = "lock"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}  # said by file systems that have none
TRIES, RETRY_S = 5, 0.1
# On file systems without locks:
SETTLE_S = 1.0  # of two that take it at once, the later one has it
BEAT_S = 15.0  # its holder touches it
WATCH_S = 60.0  # so long is a holder on another host watched for that


class RunLock:
    """Holds the directory against all other processes until `release`, or until this process ends, however it ends.

    The operating system's lock is what counts. Where the file system has none, it is what the file says: its holder is gone when this host
    has no such process any more, or when on another host nobody touches the file.

    Raises:
        UserError: another process holds it. Names it.
        OSError: the directory cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self._file, self._beat_at = directory / LOCK, time.monotonic()
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        self.holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since, "born": _born(os.getpid())})
        """What the file says."""
        self._descriptor = _locked(self._file)
        if self._descriptor is None:
            self._claim()
        else:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, self.holder.encode(), 0)

    def beat(self) -> None:
        """A sign of life, for file systems without locks; to be called every few seconds."""
        if self._descriptor is None and time.monotonic() - self._beat_at >= BEAT_S:
            self._beat_at = time.monotonic()
            with suppress(OSError):
                os.utime(self._file)

    def release(self) -> None:
        """Let others have it."""
        with suppress(FileNotFoundError):
            if read_holder(self._file.parent) == self.holder:
                self._file.unlink()
        if self._descriptor is not None:
            os.close(self._descriptor)

    def _claim(self) -> None:
        """Take what nobody has, without the help of the operating system."""
        said = read_holder(self._file.parent)
        if said and _lives(self._file, said):
            raise _in_use(self._file, said)
        own = self._file.with_name(f"{LOCK}.{os.getpid()}")
        own.write_text(self.holder)
        own.replace(self._file)
        time.sleep(SETTLE_S)
        said = read_holder(self._file.parent)
        if said != self.holder:
            raise _in_use(self._file, said)


def check_free(directory: Path) -> None:
    """Find out early whether another process writes there; changes nothing.

    Raises:
        UserError: it does.
    """
    with suppress(FileNotFoundError, PermissionError):  # who may not write is told so elsewhere
        if (descriptor := _locked(directory / LOCK, fcntl.LOCK_SH)) is not None:
            os.close(descriptor)


def read_holder(directory: Path) -> str:
    """What the lock file says; nothing where there is none."""
    with suppress(OSError, UnicodeDecodeError):
        return (directory / LOCK).read_text()
    return ""


def _locked(file: Path, kind: int = fcntl.LOCK_EX) -> int | None:
    """A descriptor of the file, locked; None where the file system has no locks."""
    for left in reversed(range(TRIES)):  # who only looks, and who has just let go, are in the way for a moment
        descriptor = os.open(file, os.O_RDWR | (os.O_CREAT if kind == fcntl.LOCK_EX else 0), 0o644)
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.fstat(descriptor).st_ino == file.stat().st_ino:
                    return descriptor
        except BlockingIOError:
            time.sleep(RETRY_S if left else 0.0)
        except OSError as error:
            os.close(descriptor)
            if error.errno in NO_LOCKS:
                return None
            raise
        os.close(descriptor)
    raise _in_use(file, read_holder(file.parent))


def _in_use(file: Path, said: str) -> UserError:
    holder = _parsed(said)
    who = f": pid {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}" if holder else ""
    return UserError(f"--output {file.parent} is in use by another process{who}. Wait for it, or name another directory.")


def _parsed(said: str) -> dict[str, Any]:
    with suppress(ValueError):
        holder = json.loads(said)
        if isinstance(holder, dict):
            return holder
    return {}


def _lives(file: Path, said: str) -> bool:
    """Whether the process that the file names is there."""
    holder = _parsed(said)
    if holder.get("host") == socket.gethostname():
        pid = holder.get("pid")
        return isinstance(pid, int) and _born(pid) is not None and _born(pid) == holder.get("born")
    seen, began = file.stat().st_mtime_ns, time.monotonic()
    while time.monotonic() - began < WATCH_S:
        time.sleep(min(BEAT_S, WATCH_S) / 3)
        with file.open() as opened:  # opening asks the server of a network file system
            if os.fstat(opened.fileno()).st_mtime_ns != seen:
                return True
    return False


def _born(pid: int) -> str | None:
    """When a process of this host began, which sets it apart from a later one of the same number; None when there is none."""
    try:
        boot, stat = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        try:  # no Linux
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            return "another user's"
        return "unknown"
    state, *fields = stat.rpartition(")")[2].split()  # proc(5) from field 3 on; the name in front of it may hold blanks
    return None if state == "Z" else f"{boot} {fields[18]}"
