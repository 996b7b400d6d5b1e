"""Settings of the allocators: the C library's on a CPU, XLA's on a GPU."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

# From glibc's malloc.h. Blocks of other arenas and large blocks from mmap go back to the system as
# soon as they are freed: use one arena and no mmap.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
NEVER = -1
# Share of a GPU's memory. XLA's default is 0.75; a plan fills at most `auto_mesh.FITS`, 0.9.
GPU_SHARE = "0.92"
GPU_SHARE_NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
GPU_DRIVERS = (Path("/proc/driver/nvidia"), Path("/dev/dxg"))  # Linux, and Windows seen from WSL


def set_allocators() -> None:
    """Set both allocators for training. Call before JAX starts; later calls change nothing."""
    use_gpu_memory()
    keep_freed_memory()


def use_gpu_memory() -> None:
    """Let JAX use as much of each GPU's memory as a plan that fits may need.

    What the user set in the environment is kept.
    """
    if not any(name in os.environ for name in GPU_SHARE_NAMES):
        os.environ[GPU_SHARE_NAMES[0]] = GPU_SHARE


def keep_freed_memory() -> None:
    """Make this process keep the memory it frees, as GPU allocators do.

    XLA on CPUs takes a step's temporary memory from malloc and frees it at the end of the step. By
    default the system gets it back each time and hands it out again zeroed, page by page, which
    takes a third of a small model's step. A thread that has already allocated has its own arena,
    which takes blocks over 64 MiB from the system regardless of these settings; so they must be
    set before JAX starts threads.

    Does nothing if there is a GPU driver or the C library is not glibc.
    """
    if not sys.platform.startswith("linux") or any(driver.exists() for driver in GPU_DRIVERS):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for setting, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER)):
            mallopt(setting, value)
