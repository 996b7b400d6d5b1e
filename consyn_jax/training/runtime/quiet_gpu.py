"""Keep the GPU quiet while XLA times kernels on it, to choose the fastest."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax

from consyn_jax.distributed.gpu_clocks import open_nvml
from consyn_jax.distributed.visible_gpus import visible_gpus
from consyn_jax.training.runtime.kernel_choices import names_of_choices, read_kernels
from consyn_jax.training.runtime.watchdog import COMPILING, Watchdog


def tune_alone(
    compiling: Future[Any],
    run_directory: Path,
    watchdog: Watchdog,
    warn: Callable[[str], object],
) -> float:
    """Wait for the compiler if it times kernels, and warn if another process disturbs that.

    On a CPU, and where the run's choices are kept, nothing is timed, and the state can be created
    or restored meanwhile.

    Returns:
        Seconds of waiting.

    Raises:
        Exception: The compiler's error, such as a step that does not fit into memory. The run then
            ends before its state is created.
    """
    if jax.default_backend() != "gpu" or read_kernels(run_directory) is not None:
        return 0.0
    watchdog.at(COMPILING, 0)
    # A process of a larger run may see the GPUs of the other processes, so it does not look.
    gpus = visible_gpus() if jax.process_count() == 1 else []
    began, chosen, others = time.monotonic(), names_of_choices(), other_processes(gpus)
    compiling.result()
    others = others or other_processes(gpus)
    if others and names_of_choices() - chosen:
        options: Any = jax.config
        warn(
            f"Process {others[0]} used the same GPU while XLA timed kernels for this run, so slow "
            "ones may have been chosen. To choose again, end that process, delete "
            f"{options.jax_compilation_cache_dir}, and start again with --overwrite."
        )
    return time.monotonic() - began


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
