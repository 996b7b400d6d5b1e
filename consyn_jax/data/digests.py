"""SHA-256 of files, remembered for as long as a file is not touched, and the directory where such things are kept."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from consyn_jax.config import UserError

MEMORY = "digests.json"
MOST = 100_000
SMALL = 1 << 20
# A file that changes twice within a tick of the file system's clock keeps its time. Two seconds are the coarsest in use (FAT).
SETTLED_NS = 2_000_000_000


def cache_directory() -> Path:
    """Where token stores are kept: $CONSYN_CACHE, else consyn_jax in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("CONSYN_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "consyn_jax"


class FileDigests:
    """The SHA-256 of files, in hexadecimal: read at about 1 GB/s, or remembered by place, inode, size and times of change.

    As a context manager, it remembers at its end what was read in it.
    """

    def __init__(self) -> None:
        self._place = cache_directory() / MEMORY
        try:
            known = json.loads(self._place.read_bytes())
        except (OSError, ValueError):  # nothing yet, or nothing that can be used
            known = {}
        self._known: dict[str, Any] = known if isinstance(known, dict) else {}
        self._new: dict[str, list[Any]] = {}

    def __call__(self, path: Path) -> str:
        """The digest of one file.

        Raises:
            UserError: it cannot be read.
        """
        try:
            status = path.stat()
            name, state = str(path.resolve()), [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
            known = self._known.get(name)
            if isinstance(known, list) and known[:-1] == state:
                return str(known[-1])
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error
        if status.st_size > SMALL and time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED_NS:
            self._new[name] = [*state, digest]
        return digest

    def __enter__(self) -> FileDigests:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._new:
            return
        entries = {**{name: entry for name, entry in self._known.items() if name not in self._new}, **self._new}
        fresh = self._place.with_name(f".{MEMORY}.{os.getpid()}")
        try:
            self._place.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(dict(list(entries.items())[-MOST:])))
            fresh.rename(self._place)
        except OSError:  # it is only there to save time
            with suppress(OSError):
                fresh.unlink()
