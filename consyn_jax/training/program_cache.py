"""Compiled programs kept on disk, so that the second start of a run loads what the first compiled: JAX's own cache, in the user's.

JAX can limit the size of its cache itself, but then every read waits for a lock of the whole directory, and one process that was killed
between the two files of an entry ends all writing. So the directory is tidied here, once a day.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import time
import warnings
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from consyn_jax.data.digests import cache_directory

LIMIT_BYTES, LIMIT_ENTRIES = 2 << 30, 10_000
TIDY_EVERY_S = 24 * 3600
SETTLED_S = 600  # an entry this old is not being written any more
STAMP = ".tidied"
# Small programs count: a start has dozens of them. -1: of any size.
SETTINGS: Mapping[str, float] = {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": -1}


def keep_programs() -> str | None:
    """From here on, load programs that were compiled before, and keep those that are compiled, beside the token stores.

    Whoever sets JAX's `jax_compilation_cache_dir` (JAX_COMPILATION_CACHE_DIR) has said where, and `jax_enable_compilation_cache`, whether.

    Returns:
        Why programs are not kept, where they should be; else None.
    """
    # An entry that cannot be read or written is a program that is compiled.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry", UserWarning)
    options: Any = jax.config
    if options.jax_compilation_cache_dir is not None or not options.jax_enable_compilation_cache:
        return None
    directory = cache_directory() / "programs" / _processor()
    if reason := _refusal(directory):
        return f"not kept, as {directory} {reason}"
    if jax.process_index() == 0:  # no other process writes, says JAX
        tidy(directory)
    for name, value in SETTINGS.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    return None


def _processor() -> str:
    """A name for what this CPU can do. XLA compiles for exactly that, and a program of another CPU may be refused, or may crash."""
    able = platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        able += "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    return f"{platform.machine()}-{hashlib.sha256(able.encode()).hexdigest()[:8]}"


def _refusal(directory: Path) -> str | None:
    """Why programs cannot be kept in `directory`, which is made; else None. What lies there will be executed."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = directory.stat()
    except OSError as error:
        return f"cannot be made ({error.strerror})"
    if found.st_uid not in (os.getuid(), 0) or found.st_mode & 0o002:
        return "can be written by others"
    return None if os.access(directory, os.W_OK | os.X_OK) else "cannot be written"


def tidy(directory: Path, limit_bytes: int = LIMIT_BYTES, limit_entries: int = LIMIT_ENTRIES) -> None:
    """Delete entries that a kill cut short, and beyond the limits those that were not used for longest. Once a day; nothing here raises."""
    stamp, now = directory / STAMP, time.time()
    with suppress(OSError), stamp.open("a+") as file:  # one at a time: looking at entries changes when they were last used
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:  # a file system without locks
            pass
        is_first = file.seek(0, os.SEEK_END) == 0
        before = 0.0 if is_first else stamp.stat().st_mtime
        if 0 <= now - before < TIDY_EVERY_S:
            return
        file.write("tidied\n" if is_first else "")
        file.flush()
        os.utime(stamp, (now, now))
        entries = []
        for path in directory.rglob("*"):
            with suppress(OSError):  # others tidy, too
                found = path.stat()
                if not path.is_file() or path == stamp:
                    continue
                settled, is_new = now - found.st_mtime > SETTLED_S, found.st_mtime > before - SETTLED_S
                if settled and is_new and path.name.endswith("-cache") and not _is_whole(path):
                    path.unlink()
                else:
                    entries.append((max(found.st_atime, found.st_mtime), found.st_size, path))
        total = 0
        for count, (_, size, path) in enumerate(sorted(entries, reverse=True), 1):
            total += size
            if total > limit_bytes or count > limit_entries:
                with suppress(OSError):
                    path.unlink()


def _is_whole(entry: Path) -> bool:
    """Whether an entry can be decompressed. Zstandard, which JAX uses where it is installed, is not looked into."""
    content = entry.read_bytes()
    if not content.startswith(b"\x78"):
        return bool(content)
    try:
        zlib.decompress(content)
    except zlib.error:
        return False
    return True
