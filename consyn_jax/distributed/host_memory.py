"""The C allocator's settings for training on a CPU."""

from __future__ import annotations

import ctypes
import sys

# Of glibc's malloc.h. One arena, and no large block by mmap: both give memory back to the system as soon as it is freed.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Let this process keep what it frees, as GPU allocators do.

    XLA on CPUs takes a step's temporary memory from malloc and frees it at the step's end. By default the system gets it back each
    time and hands it out zeroed page by page in the next step: a third of the time of a small model's step. Nothing happens where
    the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for setting, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, LARGEST)):
            mallopt(setting, value)
