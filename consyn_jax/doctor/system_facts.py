"""Read the state of a directory's file system, and the limits of the operating system."""

from __future__ import annotations

import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from consyn_jax.files import try_lock

# The speed test writes 256 MB, or as much as it can in 5 s, in blocks like those of a checkpoint.
PROBE_BYTES, BLOCK_BYTES, PROBE_S = 256 << 20, 8 << 20, 5.0
EXCLUSIVE, SHARED_BY_ALL, MISSING = "exclusive", "shared by all", "missing"
# Code for a second process, because on some file systems locks work within one process only.
SECOND_LOCK = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"


@dataclass(frozen=True)
class Storage:
    """The file system of a directory.

    Attributes:
        directory: the output directory, or its nearest parent that exists.
        kind: type of the file system, as in "ext4" or "nfs4"; empty if unknown.
        free: bytes that this user may still write.
        free_files: files that this user may still create; None if there is no such limit.
        refusal: why nothing can be written there; empty if writing works.
        write_rate: bytes per second, flushed to the disk; None if it was not measured.
        read_rate: bytes per second; None if it was not measured.
        locks: "exclusive" if locks work; "shared by all" if a second process can acquire a lock
            that is already held; "missing" if there are no locks; None if this was not tried.
    """

    directory: str
    kind: str
    total: int
    free: int
    free_files: int | None = None
    refusal: str = ""
    write_rate: float | None = None
    read_rate: float | None = None
    locks: str | None = None


@dataclass(frozen=True)
class Limits:
    """Limits of this process and machine; sizes in bytes.

    Attributes:
        open_files: number of files that this process may open; may be infinite.
        most_open_files: largest value of `open_files` that this user may set; may be infinite.
        cores: number of cores that this process may use.
        memory: memory of the machine, or the container's limit if it is smaller.
        shared_memory: size of `/dev/shm`; None if there is none.
    """

    open_files: float
    most_open_files: float
    cores: int
    memory: int
    shared_memory: int | None
    shared_memory_free: int | None


def read_limits(shared_memory: Path = Path("/dev/shm")) -> Limits:
    """Read the limits of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    infinite = resource.RLIM_INFINITY
    usage = shutil.disk_usage(shared_memory) if shared_memory.is_dir() else None
    return Limits(
        float("inf") if soft == infinite else soft,
        float("inf") if hard == infinite else hard,
        _cores(Path("/sys/fs/cgroup/cpu.max")),
        _memory(),
        None if usage is None else usage.total,
        None if usage is None else usage.free,
    )


def _cores(quota: Path) -> int:
    """Count the cores that this process may use; a container's quota is rounded up.

    Args:
        quota: a file like `cpu.max` of a cgroup: CPU time (or "max") and period, in microseconds.
    """
    cores = len(os.sched_getaffinity(0))
    try:
        microseconds, period = quota.read_text().split()
        return min(cores, math.ceil(int(microseconds) / int(period)))
    except (OSError, ValueError):  # without control groups, or "max"
        return cores


def _memory() -> int:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # without cgroups, or "max"
        return machine


def read_storage(output: Path, *, measure: bool, probe_bytes: int = PROBE_BYTES) -> Storage:
    """Read the state of `output`'s file system, and try to write, lock and read there.

    All files that this function writes are removed again. `output` itself is not created.

    Args:
        measure: whether to measure speed, which writes up to `probe_bytes`.
    """
    directory = next(p for p in (output.absolute(), *output.absolute().parents) if p.is_dir())
    usage, status = shutil.disk_usage(directory), os.statvfs(directory)
    found = Storage(
        str(directory),
        file_system(directory, Path("/proc/self/mountinfo")),
        usage.total,
        usage.free,
        status.f_favail if status.f_files else None,
    )
    try:
        with tempfile.TemporaryDirectory(prefix=".consyn-doctor-", dir=directory) as scratch:
            found = replace(found, locks=_try_locks(Path(scratch) / "lock"))
            if measure and usage.free > 2 * probe_bytes:
                write_rate, read_rate = _rates(Path(scratch) / "probe", probe_bytes)
                found = replace(found, write_rate=write_rate, read_rate=read_rate)
    except OSError as error:
        return replace(found, refusal=error.strerror or str(error))
    return found


def file_system(directory: Path, mounts: Path) -> str:
    """Return the type of `directory`'s file system; empty if `mounts` does not say.

    Args:
        mounts: a file like `/proc/self/mountinfo`.
    """
    try:
        rows = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return ""
    here, best, kind = directory.resolve(), -1, ""
    for row in rows:
        point = row[4].encode().decode("unicode_escape")  # a blank is \040
        if here.is_relative_to(point) and len(point) >= best:  # a later mount hides earlier ones
            best, kind = len(point), row[row.index("-") + 1]
    return kind


def _try_locks(file: Path) -> str:
    with file.open("w") as held:
        try:
            try_lock(held.fileno())
        except OSError:
            return MISSING
        second = subprocess.run(
            [sys.executable, "-S", "-c", SECOND_LOCK, str(file)], capture_output=True, check=False
        )
    if b"BlockingIOError" in second.stderr:
        return EXCLUSIVE
    return MISSING if second.returncode else SHARED_BY_ALL


def _rates(file: Path, num_bytes: int) -> tuple[float, float]:
    """Measure bytes per second of writes to the disk, and of reads without the page cache."""
    block, written = os.urandom(BLOCK_BYTES), 0
    began = time.monotonic()
    with file.open("wb", buffering=0) as target:
        while written < num_bytes and time.monotonic() - began < PROBE_S:
            written += target.write(block)
            os.fsync(target.fileno())
        write_rate = written / (time.monotonic() - began)
        os.posix_fadvise(target.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.monotonic()
    with file.open("rb", buffering=0) as source:
        while source.read(BLOCK_BYTES):
            pass
    return write_rate, written / (time.monotonic() - began)
