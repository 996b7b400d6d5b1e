"""Settings of memory allocators: glibc's malloc for CPUs, and XLA's allocator for GPUs."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

# Names from glibc's malloc.h. Memory of other arenas or from mmap returns to the kernel as soon as
# it is freed, so one arena without mmap is used.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
NEVER = -1
# Fraction of a GPU's memory that XLA may use. XLA's default is 0.75; memory plans use at most
# `auto_mesh.FITS`.
GPU_SHARE = "0.92"
GPU_SHARE_NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
GPU_DRIVERS = (Path("/proc/driver/nvidia"), Path("/dev/dxg"))  # on Linux, and on Windows in WSL


def set_allocators() -> None:
    """Configure the GPU and CPU allocators for training.

    Call this before JAX starts; later calls do nothing.
    """
    use_gpu_memory()
    keep_freed_memory()


def use_gpu_memory() -> None:
    """Let JAX use the share of GPU memory that the memory plan assumes.

    Values that the user has set in the environment are kept.
    """
    if not any(name in os.environ for name in GPU_SHARE_NAMES):
        os.environ[GPU_SHARE_NAMES[0]] = GPU_SHARE


def keep_freed_memory() -> None:
    """Make this process keep the memory that it frees, as GPU allocators do.

    On CPUs, XLA allocates a step's temporary memory with malloc, and frees it at the end of the
    step. By default, glibc returns such memory to the kernel, which zeroes every page when it is
    allocated again. Returning and zeroing memory takes a third of a small model's step time.

    Call this function before JAX starts threads. A thread that has already allocated memory has its
    own arena, where these settings do not affect blocks over 64 MiB.

    Nothing is done without glibc, or if a GPU driver is present.
    """
    if not sys.platform.startswith("linux") or any(driver.exists() for driver in GPU_DRIVERS):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for setting, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER)):
            mallopt(setting, value)
