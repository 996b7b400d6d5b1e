"""SHA-256 hashes of files, cached until a file changes."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from consyn_jax.errors import UserError
from consyn_jax.files import cache_directory, write_whole

MEMORY = "digests.json"
MOST = 100_000
SMALL = 1 << 20
# Two changes of a file within one tick of the file system's clock give the same time stamp. So a
# hash is cached only if the last change of the file is older than this. FAT has the coarsest clock,
# with ticks of two seconds.
SETTLED_NS = 2_000_000_000


class FileHashes:
    """A context manager that returns hexadecimal SHA-256 hashes of files and caches them.

    A file is read again only if its path, inode, size or time stamps have changed. Reading takes
    about a second per GB. At the end of the context, new hashes are stored for later processes.
    """

    def __init__(self) -> None:
        self._place = cache_directory() / MEMORY
        try:
            known = json.loads(self._place.read_bytes())
        except (OSError, ValueError, RecursionError):  # missing or damaged
            known = {}
        self._known: dict[str, Any] = known if isinstance(known, dict) else {}
        self._new: dict[str, list[Any]] = {}

    def __call__(self, path: Path) -> str:
        """Return the hash of one file.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            status = path.stat()
            if known := self._known_hash(path, status):
                return known
            digest = hash_of(path)
        except OSError as error:
            raise UserError(
                f"{path} cannot be read: {error.strerror}. Check its permissions."
            ) from error
        self._remember(path, status, digest)
        return digest

    def unknown(self, paths: Iterable[Path]) -> list[Path]:
        """List the files whose hashes are not cached; leave out small files."""
        found = [(path, path.stat()) for path in paths if path.is_file()]
        return [
            path
            for path, status in found
            if status.st_size > SMALL and not self._known_hash(path, status)
        ]

    def learn(self, path: Path, size: int, modified_ns: int, digest: str) -> None:
        """Cache a hash that another process computed, if the file has not changed since.

        Args:
            size, modified_ns: size and time stamp of the file when it was hashed.
        """
        status = path.stat()
        if (status.st_size, status.st_mtime_ns) == (size, modified_ns):
            self._remember(path, status, digest)

    def _known_hash(self, path: Path, status: os.stat_result) -> str:
        known = self._known.get(str(path.resolve()))
        if isinstance(known, list) and known[:-1] == _state(status):
            return str(known[-1])
        return ""

    def _remember(self, path: Path, status: os.stat_result, digest: str) -> None:
        changed_ns = max(status.st_mtime_ns, status.st_ctime_ns)
        if status.st_size > SMALL and time.time_ns() - changed_ns > SETTLED_NS:
            self._new[str(path.resolve())] = [*_state(status), digest]

    def __enter__(self) -> FileHashes:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._new:
            return
        kept = {name: entry for name, entry in self._known.items() if name not in self._new}
        entries = list({**kept, **self._new}.items())[-MOST:]
        with suppress(OSError):  # the cache only saves time
            self._place.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._place, json.dumps(dict(entries)))


def hash_of(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(status: os.stat_result) -> list[int]:
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
