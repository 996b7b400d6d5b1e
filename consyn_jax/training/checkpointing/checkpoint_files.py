"""The files of checkpoints: saved steps, checksums and damage; does not import JAX."""

from __future__ import annotations

import os
import re
from pathlib import Path

import xxhash

from consyn_jax.errors import visible
from consyn_jax.files import irregular
from consyn_jax.integers import natural

CHECKSUMS = "CHECKSUMS"
STATE = "state"  # the arrays of a checkpoint
PROVENANCE = "provenance.json"  # of a run, a checkpoint or a model
# Text after the step in the name of a checkpoint that is being written or removed.
UNFINISHED = ".orbax-checkpoint-tmp"
DAMAGED = ".damaged"  # after the step, in the new name of a damaged checkpoint
READ_BYTES = 1 << 20
LARGE = 1 << 30  # bytes
LARGEST_CHECKSUMS = 1 << 26  # bytes: half a million files


def step_of(name: str) -> int | None:
    """The step in the name of a checkpoint's directory; None if no checkpoint has such a name.

    >>> step_of("20"), step_of("020"), step_of("20.damaged-1")
    (20, None, None)
    """
    step = natural(name)
    return step if str(step) == name else None


def saved_steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending.

    An incomplete checkpoint is not in a directory named by a step.
    """
    if not directory.exists():
        return []
    return sorted(
        step
        for path in directory.iterdir()
        if (step := step_of(path.name)) is not None and path.is_dir()
    )


def misnamed(directory: Path) -> Path | None:
    """Find a directory named by a number that is not a valid checkpoint name, such as `020`."""
    if not directory.exists():
        return None
    others = (path for path in directory.iterdir() if step_of(path.name) is None)
    return next((path for path in others if path.name.isdecimal()), None)


def file_names(directory: Path) -> list[str]:
    """Names of the files of a checkpoint, except its checksums.

    Hidden files are left out, because file managers and network file systems create them.
    """
    names = (
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_file() and path.name[0] != "."
    )
    return sorted(name for name in names if name != CHECKSUMS)


def is_hollow(file: Path) -> bool:
    """Whether a large file is sparse: no run writes such files, and reading could take hours."""
    status = file.stat()
    return status.st_size > LARGE and status.st_blocks * 512 < status.st_size // 1000


def file_hash(file: Path, flush: bool = False) -> str:
    """XXH3-128 hash of a file; `flush` also flushes the file to the disk."""
    content_hash, buffer = xxhash.xxh3_128(), memoryview(bytearray(READ_BYTES))
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            content_hash.update(buffer[:count])
        if flush:
            os.fsync(opened.fileno())
    return content_hash.hexdigest()


def damage(directory: Path, part: int = 0, parts: int = 1, only: str | None = None) -> str | None:
    """Verify the files of a checkpoint; return the first fault as text, or None.

    A link, a pipe or a device among the files is a fault, and is not opened.

    Args:
        part, parts: Read only every `parts`-th file, starting with file number `part`.
        only: Read only the file of this name.
    """
    try:
        for stray in filter(None, map(irregular, sorted(directory.iterdir()))):
            return f"{visible(stray[0].relative_to(directory).as_posix())} is {stray[1]}"
        sums = directory / CHECKSUMS
        if not sums.is_file():
            return f"{CHECKSUMS} is missing"
        if sums.stat().st_size > LARGEST_CHECKSUMS:
            return f"{CHECKSUMS} is unreadable"
        lines = sums.read_text(encoding="utf-8").splitlines()
        expected = {
            match[2]: match[1]
            for line in lines
            if (match := re.fullmatch(r"([0-9a-f]{32})  (.+)", line))
        }
        names = file_names(directory)
        if len(expected) != len(lines):
            return f"{CHECKSUMS} is unreadable"
        if missing := sorted(expected.keys() - set(names)):
            return f"{visible(missing[0])} is missing"
        if unknown := sorted(set(names) - expected.keys()):
            return f"{visible(unknown[0])} is not in {CHECKSUMS}"
        for name in [only] if only else names[part::parts]:
            file = directory / name
            if is_hollow(file) or file_hash(file) != expected[name]:
                return f"{visible(name)} is not what was written"
    except UnicodeDecodeError:
        return f"{CHECKSUMS} is unreadable"
    except OSError as error:
        return (
            f"{visible(Path(error.filename or directory).name)} cannot be read ({error.strerror})"
        )
    return None
