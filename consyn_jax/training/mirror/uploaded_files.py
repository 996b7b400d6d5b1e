"""Select the files of a run directory to upload, and read files that may grow meanwhile."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def files_of(path: Path) -> Iterator[Path]:
    """Yield a file, or the files in a directory, without hidden files and symbolic links."""
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in found:
        is_hidden = any(part.startswith(".") for part in file.relative_to(path.parent).parts)
        if file.is_file() and not file.is_symlink() and not is_hidden:
            yield file


def as_it_is(descriptor: int) -> io.BufferedReader:
    """Open a file for reading; bytes that are appended after this call are not read."""
    return io.BufferedReader(_Bounded(descriptor), 1 << 20)


class _Bounded(io.RawIOBase):
    """Reads a file up to the size that the file had when this object was made."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._place = descriptor, 0
        self._size = os.fstat(descriptor).st_size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        begins = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}
        self._place = max(0, begins[whence] + place)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, into: Any) -> int:
        wanted = max(0, min(len(into), self._size - self._place))
        data = os.pread(self._descriptor, wanted, self._place)
        into[: len(data)] = data
        self._place += len(data)
        return len(data)
