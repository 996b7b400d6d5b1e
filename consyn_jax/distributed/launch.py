"""`--distributed`: several processes become one run.

Nothing of JAX but its clusters' names is used before all processes have met (`peers`): a wrong launch is a sentence on each of them, where JAX
would abort. docs/distributed.md has the reasons.
"""

from __future__ import annotations

import atexit
import importlib.metadata
import os
import platform
import signal
import socket
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from consyn_jax.config import Diverged, HardwareOptions, Interrupted, RunConfig, UserError, flat
from consyn_jax.distributed.meeting import meet
from consyn_jax.distributed.peers import Peers, set_current_peers

PACKAGES = ("consyn_jax", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "optax", "orbax-checkpoint", "numpy")
# What processes may be told differently. Of data and models it is not the path that counts, and the trainer compares what they are.
OWN = {"process_id", "coordinator_address", "num_processes", "num_workers", "quiet", "data", "validation", "tokenizer", "model", "checkpoint"}
JAX_ERROR_S = 10.0  # for the news that another process died, which is why JAX fails here

@contextmanager
def runtime(run: RunConfig, prog: str = "consyn-train") -> Iterator[Peers]:
    """JAX over all processes of the run, from meeting to parting. Nothing of JAX may have been used before.

    Should the block end with an error, the other processes end with it.

    Raises:
        UserError: the processes do not find each other, or differ in versions, flags or devices. Each raises it.
    """
    address, num_processes, process_id = find_cluster(run.hardware)
    about = {"host": socket.gethostname(), "gpus": _gpus(), "facts": facts(run)}

    def answer(abouts: list[Any]) -> dict[str, Any]:
        refuse_differences([about["facts"] for about in abouts])
        devices = share_devices([(about["host"], about["gpus"]) for about in abouts])
        with socket.create_server(("", 0)) as free:
            return {"port": free.getsockname()[1], "devices": devices}

    peers, told = meet(address, num_processes, process_id, about, answer, prog)
    set_current_peers(peers)
    try:
        _initialize(f"{_bracketed(address[0])}:{told['port']}", num_processes, process_id, told["devices"][process_id])
        refuse_differences([{"the devices of a process": text} for text in peers.gather(_devices())])
        yield peers
    except (Interrupted, Diverged):  # all of them, at the same step
        _part(peers)
        raise
    except BaseException as error:
        _fail(peers, error)
        raise
    else:
        _part(peers)


def _part(peers: Peers) -> None:
    """All processes end together, and in good order."""
    peers.leave()
    jax.distributed.shutdown()
    peers.close()
    set_current_peers(None)


def _fail(peers: Peers, error: BaseException) -> None:
    """Let the others end with this process, and this one without waiting for them."""
    if isinstance(error, jax.errors.JaxRuntimeError):  # as where another process is gone; and which, its connection tells
        peers.await_end(JAX_ERROR_S)
    if isinstance(error, UserError):
        code, sentence = 2, str(error)
    elif isinstance(error, KeyboardInterrupt):
        code, sentence = 128 + getattr(error, "number", signal.SIGINT), "interrupted before there was anything to save."
    else:
        first = str(error).strip().partition("\n")[0]
        code, sentence = 1, f"{type(error).__name__}: {first} Its own output says more."
    peers.fail(code, sentence)
    atexit.register(_end_at_once, code)


def _end_at_once(code: int) -> None:
    """JAX would wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ------------------------------------------------------------------------------------------------------------------ where, who


def find_cluster(options: HardwareOptions) -> tuple[tuple[str, int], int, int]:
    """(host and port of process 0, number of processes, number of this one): from the three flags, or as Slurm, Open MPI or Kubernetes say.

    Raises:
        UserError: there is none of these, or not enough is known.
    """
    address: Any = options.coordinator_address
    count: Any = options.num_processes
    number: Any = options.process_id
    if address is None or count is None or number is None:
        address, count, number = _detected()
    host, _, port = address.rpartition(":")
    return (host.strip("[]"), int(port)), count, number


def _detected() -> tuple[Any, Any, Any]:
    from jax._src.clusters import ClusterEnv

    flags = "--coordinator_address HOST:PORT --num_processes N --process_id I"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, None)
        except Exception as error:  # whatever the library of a cluster raises
            why = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"--distributed does not get from the cluster which process this is: {why}. Give {flags}.") from error
    address, count, number, _ = found
    if None not in (address, count, number):
        return address, count, number
    if "OMPI_COMM_WORLD_SIZE" in os.environ:
        raise UserError(
            "--distributed: this Open MPI does not say where process 0 is. Inside of mpirun, give "
            "--coordinator_address HOST:PORT --num_processes $OMPI_COMM_WORLD_SIZE --process_id $OMPI_COMM_WORLD_RANK."
        )
    if any("kubernetes" in str(each.message).lower() for each in said):
        raise UserError(f"--distributed needs the package kubernetes to ask the cluster (pip install kubernetes). Install it, or give {flags}.")
    raise UserError(f"--distributed finds no Slurm, Open MPI or Kubernetes around this process. Give {flags}.")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


# ----------------------------------------------------------------------------------------------------------------- what differs


def facts(run: RunConfig) -> dict[str, str]:
    """What must be equal in all processes: flags and versions, by name."""
    found = {f"--{name}": str(value) for name, value in flat(run).items() if name not in OWN}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found | {"Python": platform.python_version()}


def refuse_differences(told: Sequence[dict[str, str]]) -> None:
    """What the processes say of themselves must be the same.

    Args:
        told: by process, facts by name.

    Raises:
        UserError: naming what differs, and where.
    """
    found = []
    for name in dict.fromkeys(name for each in told for name in each):
        by_value: dict[str, list[int]] = {}
        for number, each in enumerate(told):
            by_value.setdefault(each.get(name, "missing"), []).append(number)
        if len(by_value) > 1:
            found.append(f"{name}: {', '.join(f'{value} in {_numbers(where)}' for value, where in by_value.items())}")
    if found:
        more = f" and {len(found) - 5} more" if found[5:] else ""
        raise UserError(f"The processes of this run differ in {'; '.join(found[:5])}{more}. Start all with the same command, packages and kind of machine.")


def _numbers(numbers: list[int]) -> str:
    """
    >>> _numbers([1]), _numbers([0, 2, 3, 4])
    ('process 1', 'processes 0, 2 to 4')
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"process{'' if len(numbers) == 1 else 'es'} {', '.join(words[:4])}{' and others' if words[4:] else ''}"


# --------------------------------------------------------------------------------------------------------------------- devices


def share_devices(processes: Sequence[tuple[str, Sequence[str]]]) -> list[list[int] | None]:
    """Which of the GPUs that it sees each process takes; None for all.

    Processes of one host that see the same GPUs share them evenly. A scheduler that gives each its own has done so already.

    Args:
        processes: host, and names of the GPUs that are visible there.

    Raises:
        UserError: more processes than GPUs, or a number that does not divide them.

    >>> share_devices([("a", "01"), ("a", "01"), ("b", "01")])
    [[0], [1], None]
    """
    shares: list[list[int] | None] = []
    for number, (host, gpus) in enumerate(processes):
        same = [other for other, (its_host, its_gpus) in enumerate(processes) if its_host == host and list(its_gpus) == list(gpus)]
        if len(same) == 1 or not gpus:
            shares.append(None)
            continue
        if len(gpus) % len(same):
            raise UserError(
                f"On {host} are {len(same)} processes and {len(gpus)} GPU{'' if len(gpus) == 1 else 's'}, which cannot be shared evenly. "
                f"Start one process a GPU, or one a host."
            )
        size = len(gpus) // len(same)
        shares.append(list(range(same.index(number) * size, (same.index(number) + 1) * size)))
    return shares


def _gpus() -> list[str]:
    """Names of the GPUs that this process sees, found without a driver."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    return sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))


def _initialize(address: str, num_processes: int, process_id: int, devices: list[int] | None) -> None:
    # SIGTERM is answered by training/signals.py. The service that JAX has for it takes the signal away from whoever handles it.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(address, num_processes, process_id, local_device_ids=devices, cluster_detection_method="deactivate")


def _devices() -> str:
    try:
        kinds = [device.device_kind for device in jax.local_devices()]
    except RuntimeError as error:
        raise UserError(f"JAX finds no device to train on ({' '.join(str(error).split())}). Check JAX_PLATFORMS and the driver.") from error
    return f"{len(kinds)} x {kinds[0]}"
