"""The findings of a verification: what differs from the records, and what agrees."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from consyn_jax.errors import UserError, counted
from consyn_jax.files import irregular
from consyn_jax.training.checkpointing.checkpoint_files import is_hollow

READERS = 4  # files hashed at once; hashlib releases the interpreter lock
SHOWN = 10  # files of one kind named in messages
MISSING = "does not exist"


@dataclass
class Findings:
    """Lines about what differs from the records, what could not be checked, and what agrees.

    Attributes:
        differs: What differs. Each line begins with what was compared, as in "data: ...".
        unchecked: What could not be checked, in the same form, with the reason.
        agrees: What agrees, in the same form.
    """

    differs: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    agrees: list[str] = field(default_factory=list)

    @contextmanager
    def checking(self, kind: str, place: Path) -> Iterator[None]:
        """Turn an error in a `with` block into a finding, so that later checks still run.

        Args:
            place: Path for the message, used if the error has no path.
        """
        try:
            yield
        except OSError as error:
            self.unreadable(kind, place, error)
        except UserError as error:
            self.differs.append(f"{kind}: {error}")

    def unreadable(self, kind: str, place: Path, error: OSError) -> None:
        """Add the finding that a file or directory cannot be read.

        Args:
            place: Path for the message, used if the error has no path.
        """
        reason = error.strerror or type(error).__name__
        self.differs.append(f"{kind}: {error.filename or place} cannot be read ({reason})")

    def is_regular(self, kind: str, path: Path) -> bool:
        """Return whether a path is a regular file or a directory; if not, add a finding."""
        if (stray := irregular(path, inside=False)) is not None:
            self.differs.append(f"{kind}: {path} is {stray[1]}, so it is not read")
        return stray is None

    def files(self, kind: str, faults: Iterable[str], count: int, what: str) -> None:
        """Add findings about faulty files; if there are none, add that all `count` files agree.

        Args:
            what: Noun for one file.
        """
        found = sorted(faults)
        self.differs += [f"{kind}: {fault}" for fault in found[:SHOWN]]
        if found[SHOWN:]:
            self.differs.append(f"{kind}: {counted(len(found) - SHOWN, 'more file')} differ")
        if not found and count:
            self.agrees.append(f"{kind}: {counted(count, what)}")


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def changed_files(
    expected: dict[Path, str], sha256: Callable[[Path], str] = sha256_of
) -> tuple[list[str], list[Path]]:
    """Compare files with their expected SHA-256.

    Args:
        sha256: Function that returns the SHA-256 of a file, computed or from a cache.

    Returns:
        A clause about each file that differs or cannot be read, and the files that do not exist.
    """

    def look(item: tuple[Path, str]) -> str | None:
        path, digest = item
        try:
            if not path.exists():
                return MISSING
            if not path.is_file() or is_hollow(path):  # reading a pipe would never end
                return f"{path} is not a regular file"
            is_same = sha256(path) == digest
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
        except UserError:
            return f"{path} cannot be read"
        return None if is_same else f"{path} has changed"

    with ThreadPoolExecutor(READERS) as readers:
        faults = dict(zip(expected, readers.map(look, expected.items()), strict=True))
    missing = [path for path, fault in faults.items() if fault is MISSING]
    return [fault for fault in faults.values() if fault and fault is not MISSING], missing
