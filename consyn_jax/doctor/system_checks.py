"""Judge the disk and the limits of the operating system."""

from __future__ import annotations

from consyn_jax.doctor.machine_findings import FAIL, INFO, PASS, WARN, Finding, size
from consyn_jax.doctor.system_facts import MISSING, SHARED_BY_ALL, Limits, Storage

# A checkpoint takes 12 bytes per parameter: haiku 40 MB, verse 1.5 GB, stanza 16 GB. A save needs
# room for one more checkpoint.
LEAST_FREE, LITTLE_FREE = 1e9, 20e9  # bytes
LEAST_FILES, FEW_FILES = 1_000, 100_000  # files that can still be created
SLOW_WRITE = 50e6  # bytes per second; a checkpoint of verse then takes half a minute
# Linux allows 1,024 open files by default. A run has tens of them open before it opens its data.
LEAST_OPEN, FEW_OPEN = 256, 1024
# NCCL's guide asks for --shm-size=1g in containers, where Docker gives 64 MB by default.
SHARED_MEMORY, LEAST_SHARED_MEMORY = 1 << 30, 16 << 20
VOLATILE = {"tmpfs": "a reboot", "ramfs": "a reboot", "overlay": "the container"}


def check_storage(storage: Storage) -> list[Finding]:
    """Judge the disk: free space, speed, file locks, and whether files are permanent."""
    where = storage.directory
    if storage.refusal and storage.free >= LEAST_FREE:
        return [
            Finding(
                "output directory",
                FAIL,
                f"{where}: nothing can be written: {storage.refusal}",
                "Give another directory with --output, or correct its permissions or quota.",
            )
        ]
    found = [_space(storage)]
    if (files := _files(storage)) is not None:
        found.append(files)
    if storage.kind in VOLATILE:
        lasts = VOLATILE[storage.kind]
        found.append(
            Finding(
                "file system",
                WARN,
                f"{storage.kind}, whose files do not outlive {lasts}",
                "Give --output a directory on a disk that outlives the run, or mount one there.",
            )
        )
    else:
        found.append(Finding("file system", PASS, storage.kind or "of unknown type"))
    if storage.write_rate is not None and storage.read_rate is not None:
        found.append(_speed(storage.write_rate, storage.read_rate))
    if storage.locks is not None:
        found.append(_locks(storage))
    return found


def _space(storage: Storage) -> Finding:
    found = f"{size(storage.free)} free of {size(storage.total)} at {storage.directory}"
    if storage.free < LEAST_FREE:
        advice = "Delete something there, or give a directory on another disk with --output."
        return Finding("disk space", FAIL, found, advice)
    if storage.free < LITTLE_FREE:
        advice = (
            "A checkpoint takes 12 bytes per parameter, and a save needs room for one more "
            "checkpoint. --keep_last 1 keeps fewer checkpoints."
        )
        return Finding("disk space", WARN, found, advice)
    return Finding("disk space", PASS, found)


def _files(storage: Storage) -> Finding | None:
    """Warn if only a few more files can be created; otherwise return None."""
    count = storage.free_files
    if count is None or count >= FEW_FILES:
        return None
    found = f"{count:,} more files can be created at {storage.directory}"
    advice = "Delete small files there, or give a directory on another disk with --output."
    return Finding("disk files", FAIL if count < LEAST_FILES else WARN, found, advice)


def _speed(write_rate: float, read_rate: float) -> Finding:
    found = f"writes {size(write_rate)}/s, reads {size(read_rate)}/s"
    if write_rate < SLOW_WRITE:
        advice = "Save less often with --save_steps, or give a local disk with --output."
        return Finding("disk speed", WARN, found, advice)
    return Finding("disk speed", PASS, found)


def _locks(storage: Storage) -> Finding:
    if storage.locks == MISSING:
        advice = (
            "Do not start two runs with the same --output; without file locks, a run notices "
            "another run only after some seconds."
        )
        return Finding("file locks", WARN, f"none ({storage.kind})", advice)
    if storage.locks == SHARED_BY_ALL:
        advice = (
            "Mount the file system with locks that work between processes (flock), or use another "
            "--output; otherwise two runs could write into one directory."
        )
        return Finding("file locks", FAIL, "a second process got a lock that was held", advice)
    return Finding("file locks", PASS, "a held lock keeps other processes out")


def check_limits(limits: Limits, num_gpus: int) -> list[Finding]:
    """Judge cores, memory, open files and shared memory."""
    machine = f"{limits.cores} core{'' if limits.cores == 1 else 's'}, {size(limits.memory)} memory"
    return [
        Finding("machine", INFO, machine),
        _open_files(limits),
        _shared_memory(limits, num_gpus),
    ]


def _open_files(limits: Limits) -> Finding:
    soft, hard = limits.open_files, limits.most_open_files
    found = f"limit {_number(soft)}, which this user may raise to {_number(hard)}"
    if soft >= FEW_OPEN:
        return Finding("open files", PASS, found)
    if hard >= FEW_OPEN:
        advice = f"Run ulimit -n {_number(min(hard, 65_536), '')} in the shell before the run."
    else:
        advice = "Ask the administrator for a limit of 65536 (nofile in limits.conf, or --ulimit)."
    return Finding("open files", FAIL if soft < LEAST_OPEN else WARN, found, advice)


def _number(count: float, group: str = ",") -> str:
    return "unlimited" if count == float("inf") else f"{count:{group}.0f}"


def _shared_memory(limits: Limits, num_gpus: int) -> Finding:
    total, free = limits.shared_memory, limits.shared_memory_free or 0
    found = "/dev/shm is missing" if total is None else f"/dev/shm: {size(free)} of {size(total)}"
    if num_gpus < 2:
        return Finding("shared memory", INFO if total is None else PASS, found)
    advice = "Start the container with --shm-size=1g or more; NCCL shares memory between GPUs."
    if free < LEAST_SHARED_MEMORY:
        return Finding("shared memory", FAIL, found, advice)
    if (total or 0) < SHARED_MEMORY:
        return Finding("shared memory", WARN, found, advice)
    return Finding("shared memory", PASS, found)
