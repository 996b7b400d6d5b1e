"""Compiled programs on disk, so that a start loads programs that an earlier start compiled.

The cache is JAX's own, in the user's cache directory. JAX can limit the size of the cache, but then
every read waits for a lock on the whole directory. Also, if a process is killed between the two
files of an entry, JAX writes nothing more to the cache. So this module limits the size instead, by
tidying the directory once a day.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import time
import warnings
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from consyn_jax.files import cache_directory, try_lock
from consyn_jax.training.runtime.kernel_choices import (
    CHOICES,
    KERNELS,
    MOST_CHOICES,
    KernelChoices,
    made_here,
    read_kernels,
)

LIMIT_BYTES, LIMIT_ENTRIES = 2 << 30, 10_000
TIDY_EVERY_S = 24 * 3600
SETTLED_S = 600  # an entry this old is no longer being written
STAMP = ".tidied"
# Programs of any compile time and any size (-1) are cached: a start has dozens of small ones.
SETTINGS: Mapping[str, float] = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


def prepare_caches(run_directory: Path, continues: bool) -> list[tuple[str, str]]:
    """Enable the compilation cache for a run, with the kernel choices in the run directory.

    Args:
        continues: Whether a run in the directory would be resumed.

    Returns:
        Rows (name, text) for the header of the run. A row gives the reason if compiled programs
        cannot be kept. On a GPU, another row says whether a resumed run gives the same bits as an
        uninterrupted run.

    Raises:
        UserError: The run's kernels.json is damaged.
    """
    kept = read_kernels(run_directory) if continues else None
    refusal = enable_compilation_cache(kept)
    rows = [] if refusal is None else [("compiled programs", refusal)]
    on_gpu = jax.local_devices()[0].platform in ("gpu", "cuda")
    return [*rows, ("kernels", _promise(kept))] if on_gpu else rows


def _promise(kept: KernelChoices | None) -> str:
    """Say whether a resumed run on a GPU gives the same bits as an uninterrupted run."""
    options: Any = jax.config
    directory, here = options.jax_compilation_cache_dir, made_here()
    differ = "so a resumed run can differ in the last bits"
    if jax.process_count() > 1:
        return f"each process chooses its own, {differ}"
    if directory is None or not options.jax_enable_compilation_cache:
        return f"chosen again at each start (compiled programs are not kept), {differ}"
    if kept is None:
        return (
            f"chosen by timing on this machine and kept in {KERNELS}, so a resumed run gives "
            "the same bits as an uninterrupted run"
        )
    if other := [f"{n} {kept.made_with.get(n)}" for n in here if here[n] != kept.made_with.get(n)]:
        return f"the choices in {KERNELS} were made with {', '.join(other)}, {differ}"
    if kept.conflicts(Path(directory) / CHOICES):
        return f"the choices in this process's cache differ from {KERNELS}, {differ}"
    return f"kept from {KERNELS}, so the run gives the same bits as an uninterrupted run"


def enable_compilation_cache(kept: KernelChoices | None = None) -> str | None:
    """Enable JAX's cache: load programs from it, and store those that this process compiles.

    If the user has set `jax_compilation_cache_dir` or `jax_enable_compilation_cache` (or their
    environment variables), nothing is changed.

    Args:
        kept: Kernel choices of the resumed run. If this machine's cache has other choices, the run
            gets a cache directory of its own.

    Returns:
        Reason why the cache cannot be used; None if it is in use, or if the user has configured
        JAX's cache.
    """
    # If an entry cannot be read or written, the program is just compiled again.
    warnings.filterwarnings(
        "ignore", "Error (reading|writing) persistent compilation cache entry", UserWarning
    )
    options: Any = jax.config
    if options.jax_compilation_cache_dir is not None or not options.jax_enable_compilation_cache:
        return None
    directory = cache_directory() / "programs" / _processor()
    if kept is not None and kept.conflicts(directory / CHOICES):
        directory = directory.with_name(f"{directory.name}-{kept.digest[:16]}")
    if reason := _refusal(directory):
        return f"not kept, because {directory} {reason}"
    if jax.process_index() == 0:  # JAX writes to the cache in this process only
        tidy(directory)
        if kept is not None:
            try:
                kept.put(directory / CHOICES)
            except OSError as error:
                return f"not kept, because {directory} cannot be written ({error.strerror})"
    for name, value in SETTINGS.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    return None


def _processor() -> str:
    """Name this CPU by its features.

    XLA compiles for exactly these features. A program for another CPU may be refused, or crash.
    """
    features = platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        features += "".join(
            sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
        )
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def _refusal(directory: Path) -> str | None:
    """Create the cache directory; return the reason if it is unusable or unsafe."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = directory.stat()
        os.fsencode(directory).decode()
        str(directory).encode()
    except OSError as error:
        return f"cannot be made ({error.strerror})"
    except UnicodeError:
        return "has a name that is not text in this locale"
    if found.st_uid not in (os.getuid(), 0) or found.st_mode & 0o002:
        return "can be written by others"
    return None if os.access(directory, os.W_OK | os.X_OK) else "cannot be written"


def tidy(
    directory: Path, limit_bytes: int = LIMIT_BYTES, limit_entries: int = LIMIT_ENTRIES
) -> None:
    """Delete incomplete entries, then the least recently used entries above the limits.

    Killed processes leave incomplete entries. If there are too many kernel choices, all choices and
    all programs are deleted, because a program cannot be used without its kernel choices. If the
    directory was tidied within the last day, nothing is done. No error is raised.
    """
    stamp, now = directory / STAMP, time.time()
    with suppress(OSError), stamp.open("a+") as file:
        # One process at a time, because reading an entry changes its time of last use.
        with suppress(OSError):  # a file system without locks
            if not try_lock(file.fileno()):
                return
        is_first = file.seek(0, os.SEEK_END) == 0
        before = 0.0 if is_first else stamp.stat().st_mtime
        if 0 <= now - before < TIDY_EVERY_S:
            return
        file.write("tidied\n" if is_first else "")
        file.flush()
        os.utime(stamp, (now, now))
        if sum(1 for _ in (directory / CHOICES).rglob("*")) > MOST_CHOICES:
            shutil.rmtree(directory / CHOICES, ignore_errors=True)
            limit_entries = 0
        total = 0
        for count, (_, size, path) in enumerate(_whole_entries(directory, before, now), 1):
            total += size
            if total > limit_bytes or count > limit_entries:
                with suppress(OSError):
                    path.unlink()


def _whole_entries(directory: Path, before: float, now: float) -> list[tuple[float, int, Path]]:
    """Delete damaged entries written since `before`; return the others as (last use, size, path).

    The most recently used entry comes first.
    """
    entries = []
    for path in directory.rglob("*"):
        with suppress(OSError):  # another process may be tidying, too
            found = path.stat()
            is_choice = path.is_relative_to(directory / CHOICES)
            if is_choice or not path.is_file() or path == directory / STAMP:
                continue
            is_settled = now - found.st_mtime > SETTLED_S
            is_new = found.st_mtime > before - SETTLED_S
            if is_settled and is_new and path.name.endswith("-cache") and not _is_whole(path):
                path.unlink()
            else:
                entries.append((max(found.st_atime, found.st_mtime), found.st_size, path))
    return sorted(entries, reverse=True)


def _is_whole(entry: Path) -> bool:
    """Whether an entry can be decompressed.

    Entries compressed with Zstandard, which JAX uses if it is installed, are not checked.
    """
    content = entry.read_bytes()
    if not content.startswith(b"\x78"):
        return bool(content)
    try:
        zlib.decompress(content)
    except zlib.error:
        return False
    return True
