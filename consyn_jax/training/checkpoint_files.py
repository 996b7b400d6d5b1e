"""The files of checkpoints: of which steps there are any, their checksums, and what is wrong with them. Without JAX."""

from __future__ import annotations

import os
import re
from pathlib import Path

import xxhash

from consyn_jax.validation import natural

CHECKSUMS = "CHECKSUMS"
READ_BYTES = 1 << 20
LARGEST_CHECKSUMS = 1 << 26  # bytes of them: those of half a million files


def saved_steps(directory: Path) -> list[int]:
    """Steps with a checkpoint, ascending; one that is still being written has another name."""
    if not directory.exists():
        return []
    return sorted(step for path in directory.iterdir() if (step := natural(path.name)) is not None and path.is_dir())


def files(directory: Path) -> list[str]:
    """Names of the files of a checkpoint, without its checksums and what file managers and network file systems hide there."""
    names = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file() and path.name[0] != ".")
    return sorted(name for name in names if name != CHECKSUMS)


def digest(file: Path, flush: bool = False) -> str:
    """XXH3-128 of a file; with `flush`, it is on the disk when this returns."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(READ_BYTES))
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            digest.update(buffer[:count])
        if flush:
            os.fsync(opened.fileno())
    return digest.hexdigest()


def flush(directory: Path) -> None:
    """Bring the names in a directory to the disk."""
    opened = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def damage(directory: Path, part: int = 0, parts: int = 1, only: str | None = None) -> str | None:
    """What is wrong with the files of a checkpoint, against its checksums; None if nothing.

    Args:
        part, parts: every `parts`-th file is read, from the `part`-th on.
        only: read none but this file.
    """
    try:
        sums = directory / CHECKSUMS
        if not sums.is_file():
            return f"{CHECKSUMS} is missing"
        if sums.stat().st_size > LARGEST_CHECKSUMS:
            return f"{CHECKSUMS} is unreadable"
        lines = sums.read_text(encoding="utf-8").splitlines()
        expected = {match[2]: match[1] for line in lines if (match := re.fullmatch(r"([0-9a-f]{32})  (.+)", line))}
        names = files(directory)
        if len(expected) != len(lines):
            return f"{CHECKSUMS} is unreadable"
        if missing := sorted(expected.keys() - set(names)):
            return f"{missing[0]} is missing"
        if unknown := sorted(set(names) - expected.keys()):
            return f"{unknown[0]} is not in {CHECKSUMS}"
        for name in [only] if only else names[part::parts]:
            if digest(directory / name) != expected[name]:
                return f"{name} is not what was written"
    except UnicodeDecodeError:
        return f"{CHECKSUMS} is unreadable"
    except OSError as error:
        return f"{Path(error.filename or directory).name} cannot be read ({error.strerror})"
    return None
