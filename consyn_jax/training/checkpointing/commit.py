"""Commit written files as a checkpoint, and remove old checkpoints.

All files are written to a directory with a temporary name, and flushed to the disk. Renaming the
directory to its step commits the checkpoint. An old checkpoint is renamed before it is removed. So
after a kill at any moment, every directory with the name of a step is a complete checkpoint.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from consyn_jax.files import flush, make_directory, open_regular
from consyn_jax.training.checkpointing.checkpoint_files import (
    CHECKSUMS,
    DAMAGED,
    PROVENANCE,
    STATE,
    UNFINISHED,
    file_hash,
    file_names,
)
from consyn_jax.training.checkpointing.orbax_writes import (
    lower_priority,
    refusal,
    write_at_low_priority,
)

RECORD = "run.json"  # the run record of a checkpoint
# A file in a directory that is being written. If the directory was deleted and created again by
# Orbax, this file is missing.
BEGUN = ".begun"


def unfinished(step: int, mark: str = "") -> str:
    """Name of the directory of a checkpoint that is being written or removed."""
    return f"{step}{UNFINISHED}{mark}"


def prepare(target: Path, size: int) -> None:
    """Create an empty directory for a checkpoint's files.

    Raises:
        OSError: The disk has less than `size` bytes free, or cannot be written.
    """
    make_directory(target.parent)
    remove_unfinished(target.parent)
    free = shutil.disk_usage(target.parent).free
    if free < size:
        raise OSError(
            errno.ENOSPC, f"it needs {size / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free"
        )
    (target / STATE).mkdir(parents=True)
    (target / BEGUN).touch()


def remove_unfinished(directory: Path) -> None:
    """Remove the leftovers of interrupted saves and removals."""
    for left in directory.glob(f"*{UNFINISHED}*"):
        shutil.rmtree(left, ignore_errors=True)


@dataclass(frozen=True)
class Written:
    """Number of bytes that a process has written for a checkpoint, and the duration of the write.

    Attributes:
        seconds: duration of the write. On a CPU, this includes only the flushes to the disk,
            because training slows down the rest of the write.
    """

    num_bytes: int
    seconds: float


@dataclass(frozen=True)
class WrittenPart:
    """The files of a checkpoint that one process has written, or the error that stopped it.

    Attributes:
        hashes: Hash of each file, by name.
        error: The error that stopped the process; None after success.
        written: Size and duration of the write; None after an error.
    """

    hashes: dict[str, str] = field(default_factory=dict)
    error: Exception | None = None
    written: Written | None = None

    @property
    def defect(self) -> Exception | None:
        """The error, or None if there is none or if the operating system caused it."""
        return None if refusal(self.error) else self.error

    def message(self) -> str:
        """Serialise this result for the other processes."""
        return json.dumps([refusal(self.error), self.error and repr(self.error), self.hashes])


def write_part(target: Path, futures: list[Any]) -> WrittenPart:
    """Wait until Orbax has written this process's share of the arrays; then hash the files."""
    own, began = f"{STATE}/ocdbt.process_{jax.process_index()}/", time.monotonic()
    try:
        write_at_low_priority(futures)
        names = [name for name in file_names(target) if name.startswith(own)]
        # Hash in a thread: it rarely holds the interpreter lock.
        with ThreadPoolExecutor(1, CHECKSUMS, lower_priority) as reader:
            hashed = list(reader.map(lambda name: _hash_and_flush(target / name), names))
        flushed_s = sum(seconds for _, seconds in hashed)
        on_cpu = jax.default_backend() == "cpu"
        written = Written(
            sum((target / name).stat().st_size for name in names),
            flushed_s if on_cpu else time.monotonic() - began,
        )
        hashes = dict(zip(names, (each for each, _ in hashed), strict=True))
        return WrittenPart(hashes, written=written)
    except Exception as error:  # noqa: BLE001 - sent to the other processes, which wait for it
        return WrittenPart(error=deleted(target) or error)


def _hash_and_flush(file: Path) -> tuple[str, float]:
    """Hash a file and flush it to the disk; return the hash and the seconds for the flush."""
    content_hash, began = file_hash(file), time.monotonic()
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    return content_hash, time.monotonic() - began


def deleted(target: Path) -> OSError | None:
    """Return an error if `target` was deleted during the write; otherwise None.

    Orbax raises various errors in this case.
    """
    if (target / BEGUN).exists():
        return None
    return FileNotFoundError(errno.ENOENT, f"{target} was deleted")


def discard(target: Path) -> None:
    """Remove the files of a failed write.

    If the directory was deleted during the write, Orbax may have created its parent directories
    again. Empty parent directories are removed.
    """
    was_deleted = deleted(target) is not None
    shutil.rmtree(target, ignore_errors=True)
    if was_deleted:
        for directory in (target.parent, target.parent.parent):
            with suppress(OSError):  # it is not empty
                directory.rmdir()


def merge_parts(
    own: WrittenPart, messages: list[str], step: int
) -> tuple[str | None, dict[str, str]]:
    """Combine the results of all processes.

    Returns:
        The message of the operating system if it refused a write in any process, otherwise None;
        and the hashes of all files.

    Raises:
        Exception: A process failed for another reason. That process raises its error; all other
            processes raise RuntimeError.
    """
    parts = [json.loads(message) for message in messages]
    if defects := [
        f"process {number}: {error}"
        for number, (refused, error, _) in enumerate(parts)
        if error and not refused
    ]:
        raise own.defect or RuntimeError(
            f"the checkpoint of step {step} failed in {'; '.join(defects)}"
        )
    refused = next((refused for refused, *_ in parts if refused), None)
    return refused, {name: known for *_, hashes in parts for name, known in hashes.items()}


def give_name(
    target: Path,
    place: Path,
    run: dict[str, Any],
    hashes: dict[str, str],
    provenance: Callable[[dict[str, str]], str] | None = None,
) -> None:
    """Write the remaining files to `target`, and rename it to `place` to commit the checkpoint.

    Args:
        run: The run record.
        hashes: Hashes of files that are already flushed to the disk.
        provenance: Function that makes the content of provenance.json from the hashes of the
            state's files.
    """

    def hashed(name: str) -> str:
        return hashes.get(name) or file_hash(target / name, flush=True)

    _write(target / RECORD, json.dumps(run))
    sums = {name: hashed(name) for name in file_names(target)}
    if provenance is not None:
        _write(target / PROVENANCE, provenance(_of_state(sums)))
        sums[PROVENANCE] = hashed(PROVENANCE)
    lines = [f"{known}  {name}\n" for name, known in sorted(sums.items())]
    _write(target / CHECKSUMS, "".join(lines))
    file_hash(target / CHECKSUMS, flush=True)
    for directory in [*(path for path in target.rglob("*") if path.is_dir()), target]:
        flush(directory)
    (target / BEGUN).unlink(missing_ok=True)
    target.rename(place)


def _of_state(sums: dict[str, str]) -> dict[str, str]:
    return {name: known for name, known in sums.items() if name.startswith(f"{STATE}/")}


def _write(file: Path, text: str) -> None:
    with open(file, "x", encoding="utf-8", opener=open_regular) as opened:
        opened.write(text)


def kept_steps(steps: list[int], last: int, every: int | None) -> list[int]:
    """Steps of the checkpoints to keep, out of ascending `steps`.

    Args:
        last: Number of newest checkpoints to keep.
        every: Also keep checkpoints whose step is a multiple of this.
    """
    return [step for step in steps if step in steps[-last:] or (every and step % every == 0)]


def rotate(directory: Path, old: list[int], damaged: Collection[int]) -> None:
    """Flush the rename of the new checkpoint to the disk, and then remove old checkpoints."""
    flush(directory)
    remove_unfinished(directory)  # Orbax may have written after the removal of a failed attempt
    remove(directory, old, damaged)


def remove(directory: Path, steps: list[int], damaged: Collection[int]) -> None:
    """Remove checkpoints; damaged ones are renamed instead."""
    for step in steps:
        place = directory / str(step)
        if step in damaged:
            asides = (place.with_name(f"{step}{DAMAGED}-{n}") for n in itertools.count(1))
            place.rename(next(path for path in asides if not path.exists()))
        elif place.exists():
            shutil.rmtree(place.rename(place.with_name(unfinished(step))))
