"""Keep the GPU quiet while XLA times kernels on it, to choose the fastest."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import jax

from consyn_jax.distributed.gpu_clocks import open_nvml
from consyn_jax.distributed.visible_gpus import visible_gpus
from consyn_jax.training.runtime.kernel_choices import CHOICES, read_kernels


def tune_alone(compiling: Future[Any], run_directory: Path, warn: Callable[[str], object]) -> None:
    """Wait for the compiler if it times kernels, and warn if another process disturbs that.

    On a CPU, and where the run's choices are kept, nothing is timed, and the state can be created
    or restored meanwhile.
    """
    if jax.default_backend() != "gpu" or read_kernels(run_directory) is not None:
        return
    # Of several processes of a run, each may see the GPUs of the others.
    gpus = visible_gpus() if jax.process_count() == 1 else []
    before = other_processes(gpus)
    wait([compiling])
    if found := before or other_processes(gpus):
        options: Any = jax.config
        kept = options.jax_compilation_cache_dir
        delete = f"delete {Path(kept) / CHOICES} and " if kept else ""
        warn(
            f"Process {found[0]} also used a GPU of this run while XLA timed kernels to choose the "
            f"fastest, so slow ones may have been chosen. To choose again, end that process, "
            f"{delete}start again with --overwrite."
        )


def other_processes(gpus: Sequence[str]) -> list[int]:
    """Find the processes that compute on GPUs besides this one; [] if NVML cannot tell.

    In a container, NVML may have other process ids than the container. So what it reports counts
    only where this process is among them.

    Args:
        gpus: UUIDs of the GPUs.
    """
    nvml = open_nvml()
    if isinstance(nvml, str):
        return []
    try:
        users = {
            process.pid
            for gpu in gpus
            for process in nvml.nvmlDeviceGetComputeRunningProcesses(
                nvml.nvmlDeviceGetHandleByUUID(gpu)
            )
        }
    except nvml.NVMLError:  # the driver or the GPU does not tell
        return []
    finally:
        nvml.nvmlShutdown()
    return sorted(users - {os.getpid()}) if os.getpid() in users else []
