"""The C allocator's settings for training on a CPU."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

# Of glibc's malloc.h. One arena, and no large block by mmap: both give memory back to the system as soon as it is freed.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
NEVER = -1
GPU_DRIVERS = (Path("/proc/driver/nvidia"), Path("/dev/dxg"))  # the second is that of Windows, seen from its Linux


def keep_freed_memory() -> None:
    """Let this process keep what it frees, as GPU allocators do. To be called before JAX starts.

    XLA on CPUs takes a step's temporary memory from malloc and frees it at the step's end. By default the system gets it back each
    time and hands it out zeroed page by page in the next step: a third of the time of a small model's step. A thread that has begun
    to allocate has an arena of its own, which takes blocks over 64 MiB from the system whatever is set: hence before JAX starts.
    Nothing happens where there is a GPU driver, or where the C library is not glibc.
    """
    if not sys.platform.startswith("linux") or any(driver.exists() for driver in GPU_DRIVERS):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for setting, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER)):
            mallopt(setting, value)
