"""`--distributed`: join several processes into one run.

Before JAX is initialised, the processes connect to each other (`rendezvous`) and compare flags and
versions. After a mistake in the launch, every process ends with a one-sentence message. JAX alone
would abort with a stack trace. docs/distributed.md has the reasons.
"""

from __future__ import annotations

import atexit
import importlib.metadata
import os
import platform
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import jax

from consyn_jax.config import RunConfig
from consyn_jax.distributed.cluster import Place, find_cluster
from consyn_jax.distributed.process_group import (
    CONTINUE_ADVICE,
    LOST,
    ProcessGroup,
    set_current_process_group,
)
from consyn_jax.distributed.rendezvous import meet
from consyn_jax.distributed.visible_gpus import visible_gpus
from consyn_jax.errors import (
    REPEAT_S,
    Diverged,
    Interrupted,
    Repeats,
    UserError,
    settled,
    unsaved,
)
from consyn_jax.flags import flat

PACKAGES = (
    "consyn_jax",
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "jax-cuda12-plugin",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
)
# Flags that may differ between processes. Paths of data and models may differ as well, because the
# trainer compares their contents.
OWN = {
    "process_id",
    "coordinator_address",
    "num_processes",
    "num_workers",
    "quiet",
    "data",
    "validation",
    "tokenizer",
    "model",
    "checkpoint",
}
ENDING = (signal.SIGINT.name, signal.SIGTERM.name)  # a second one of these ends the process
JAX_ERROR_S = 10.0  # time to find out whether the death of another process caused JAX's error


@contextmanager
def runtime(run: RunConfig, prog: str = "consyn-train") -> Iterator[ProcessGroup]:
    """Run JAX over all processes of the run inside a `with` block.

    JAX must not be initialised before the block. If the block raises an error in one process, the
    other processes end as well.

    Raises:
        UserError: The processes do not find each other, or differ in versions, flags or devices.
            Every process raises the error.
    """
    place = find_cluster(run.hardware)
    about = {"host": socket.gethostname(), "gpus": visible_gpus(), "facts": facts(run)}

    def answer(abouts: list[Any]) -> dict[str, Any]:
        refuse_differences([about["facts"] for about in abouts])
        devices = share_devices([(about["host"], about["gpus"]) for about in abouts])
        with socket.create_server(("", 0)) as free:
            return {"port": free.getsockname()[1], "devices": devices}

    process_group, shared = meet(place, run.hardware.rendezvous_seconds, about, answer, prog)
    set_current_process_group(process_group)
    try:
        _initialize(place, shared["port"], shared["devices"][place.process_id])
        devices = process_group.gather(_devices())
        refuse_differences([{"the devices of a process": text} for text in devices])
        yield process_group
    except (Interrupted, Diverged) as ended:  # in all processes, or in one after its last step
        _shut_down(process_group, str(ended) if isinstance(ended, Interrupted) else "")
        raise
    except BaseException as error:
        _fail(process_group, error)
        raise
    else:
        texts = zip(process_group.names, _shut_down(process_group), strict=True)
        found = [f"{name}: {text}" for name, text in texts if text]
        if found:
            raise Interrupted(found[0])


def _shut_down(process_group: ProcessGroup, interruption: str = "") -> list[str]:
    """Wait for the other processes, and disconnect, at the end of a run in which none failed.

    Process 0 may upload files for hours, and JAX's own wait would end after minutes. The first
    signal to this process does not end the wait, because this process has nothing left to save.
    Usually process 0 gets the same signal, and then ends its uploads. If process 0 does not get it,
    a second SIGINT or SIGTERM to this process ends all processes.

    Args:
        interruption: Message of the `Interrupted` that ended this process; "" if there was none.

    Returns:
        `interruption` of each process.
    """

    def disconnect() -> list[str]:
        texts = process_group.gather(interruption)
        process_group.leave()
        jax.distributed.shutdown()
        process_group.close()
        set_current_process_group(None)
        return texts

    received, repeats = "", Repeats()
    with ThreadPoolExecutor(1, "disconnect") as threads:
        end = threads.submit(disconnect)
        while True:
            try:
                if received:  # inside `try`, because another signal may follow at once
                    _answer_signal(process_group, received, repeats)
                return end.result()
            except KeyboardInterrupt as stopped:
                received = settled(stopped)


def _answer_signal(process_group: ProcessGroup, received: str, repeats: Repeats) -> None:
    """Print what this finished process waits for; at a second signal, end all processes.

    Args:
        received: Name of the signal.
        repeats: Record of earlier SIGINT and SIGTERM. Other signals never end the process.
    """
    place = repeats.place() if received in ENDING else "first"
    if place == "first":
        first = f"{process_group.names[0]}, which may still upload files"
        awaited = first if process_group.process_id else "the other processes"
        text = (
            f"{received}: this process has finished, and waits for {awaited}. A second SIGINT or "
            f"SIGTERM, at least {REPEAT_S:.0f} seconds after the first, ends all processes at once."
        )
        with suppress(OSError):  # the terminal may be closed
            os.write(2, f"\n{text}\n".encode())
    elif place == "second":
        why = f"A second signal ({received}) ended this process before the end of the run."
        try:
            process_group.fail(LOST, f"{why} {CONTINUE_ADVICE}")
        finally:  # also if a third signal comes
            _end_at_once(128 + signal.Signals[received])


def _fail(process_group: ProcessGroup, error: BaseException) -> None:
    """End the other processes because of `error`, and let this process exit without waiting."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        # If another process died, the thread of the process group notices its closed connection and
        # ends this process.
        process_group.await_end(JAX_ERROR_S)
    if isinstance(error, UserError):
        code, sentence = 2, str(error)
    elif isinstance(error, KeyboardInterrupt):
        code, sentence = unsaved(error)
    else:
        first = str(error).strip().partition("\n")[0]
        code, sentence = 1, f"{type(error).__name__}: {first} See the output of that process."
    process_group.fail(code, sentence)
    atexit.register(_end_at_once, code)


def _end_at_once(code: int) -> None:
    """Exit at once, without JAX's exit handlers, which would wait for the other processes."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the output may be closed
            stream.flush()
    os._exit(code)


# ------------------------------------------------------------------------------------- differences


def facts(run: RunConfig) -> dict[str, str]:
    """Flags and versions that must be the same in all processes, by name."""
    found = {f"--{name}": str(value) for name, value in flat(run).items() if name not in OWN}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found | {"Python": platform.python_version()}


def refuse_differences(processes: Sequence[dict[str, str]]) -> None:
    """Raise an error if the processes differ in their flags or versions.

    Args:
        processes: Flags and versions of each process, by name.

    Raises:
        UserError: The processes differ; the message names the facts and the processes.
    """
    found = []
    for name in dict.fromkeys(name for each in processes for name in each):
        by_value: dict[str, list[int]] = {}
        for number, each in enumerate(processes):
            by_value.setdefault(each.get(name, "missing"), []).append(number)
        if len(by_value) > 1:
            values = (f"{value} in {_numbered(where)}" for value, where in by_value.items())
            found.append(f"{name}: {', '.join(values)}")
    if found:
        more = f" and {len(found) - 5} more" if found[5:] else ""
        raise UserError(
            f"The processes of this run differ in {'; '.join(found[:5])}{more}. Start all with "
            f"one command, the same packages and one kind of machine."
        )


def _numbered(numbers: list[int]) -> str:
    """List process numbers in words, with ranges of consecutive numbers.

    >>> _numbered([1]), _numbered([0, 2, 3, 4])
    ('process 1', 'processes 0, 2 to 4')
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    more = " and others" if words[4:] else ""
    return f"process{'' if len(numbers) == 1 else 'es'} {', '.join(words[:4])}{more}"


# ------------------------------------------------------------------------------------------ devices


def share_devices(processes: Sequence[tuple[str, Sequence[str]]]) -> list[list[int] | None]:
    """Divide the GPUs of each host among the processes on that host.

    Processes of one host that see the same GPUs share them evenly. A process that sees GPUs of its
    own, as under some schedulers, uses all of them.

    Args:
        processes: Host name and visible GPUs (UUIDs) of each process.

    Returns:
        For each process, the indices of the visible GPUs that it uses; None if it uses all of them.

    Raises:
        UserError: the processes of a host cannot share its GPUs evenly.

    >>> share_devices([("a", "01"), ("a", "01"), ("b", "01")])
    [[0], [1], None]
    """
    shares: list[list[int] | None] = []
    for number, (host, gpus) in enumerate(processes):
        same = [
            other
            for other, (its_host, its_gpus) in enumerate(processes)
            if its_host == host and list(its_gpus) == list(gpus)
        ]
        if len(same) == 1 or not gpus:
            shares.append(None)
            continue
        if len(gpus) % len(same):
            raise UserError(
                f"{host} has {len(same)} processes and {len(gpus)} "
                f"GPU{'' if len(gpus) == 1 else 's'}, which cannot be shared evenly. "
                f"Start one process per GPU, or one per host."
            )
        size = len(gpus) // len(same)
        shares.append(list(range(same.index(number) * size, (same.index(number) + 1) * size)))
    return shares


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _initialize(place: Place, port: int, devices: list[int] | None) -> None:
    # training/runtime/signals.py handles SIGTERM. JAX's preemption service would replace that
    # handler.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        f"{_bracketed(place.address[0])}:{port}",
        place.num_processes,
        place.process_id,
        local_device_ids=devices,
        cluster_detection_method="deactivate",
    )


def _devices() -> str:
    try:
        kinds = [device.device_kind for device in jax.local_devices()]
    except RuntimeError as error:
        raise UserError(
            f"JAX finds no device to train on ({' '.join(str(error).split())}). "
            f"Check JAX_PLATFORMS and the driver."
        ) from error
    return f"{len(kinds)} x {kinds[0]}"
