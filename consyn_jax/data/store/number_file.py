"""Read files of numbers in place.

Files are read with `pread` and not through a memory map. Mapped pages would count as memory of the
process, and access to a map of a truncated file would fail with SIGBUS. A read of 4 KB takes about
a microsecond either way. Memory does not grow with the size of the store: each thread that checks a
shard has one buffer, and the number of open files is bounded.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np

from consyn_jax.errors import UserError

OPEN_FILES = 128
# Large enough that other threads run most of the time while one thread hashes, and small enough for
# the processor's cache.
CHUNK_BYTES = 1 << 19


class NumberFile:
    """Numbers of one type in a file, read in place from any thread.

    The file stays open only while it is among the `OPEN_FILES` most recently read files.

    Args:
        count: number of numbers in the file.
        offset: number of bytes before the first number.
    """

    def __init__(self, path: str, dtype: np.dtype, count: int, offset: int = 0) -> None:
        self.path, self.dtype, self.count, self.offset = path, dtype, count, offset
        self.opened: _OpenFile | None = None  # set and reset by `_open_files`

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill the contiguous array `out` with the numbers from `start` on, converted to its dtype.

        Raises:
            UserError: the file cannot be read, or was truncated.
        """
        target = out if out.dtype == self.dtype else np.empty(len(out), self.dtype)
        try:
            file, position = _open_files.get(self), self.offset + start * self.dtype.itemsize
            found = os.preadv(file.descriptor, [target.data], position)
            while found < target.nbytes:  # network file systems may return less
                more = os.preadv(file.descriptor, [target.data.cast("B")[found:]], position + found)
                if not more:
                    raise UserError(
                        f"{self.path} was truncated while it was read. Do not change "
                        "the data during a run, and start again."
                    )
                found += more
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be read: {error.strerror}. "
                "Check the path, its permissions and the disk."
            ) from error
        if target is not out:
            out[:] = target

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Iterate over the numbers start .. stop, `CHUNK_BYTES` at a time.

        All chunks share one buffer, so each chunk overwrites the previous one.
        """
        stop = self.count if stop is None else stop
        buffer = np.empty(max(min(CHUNK_BYTES // self.dtype.itemsize, stop - start), 0), self.dtype)
        for at in range(start, stop, max(len(buffer), 1)):
            part = buffer[: stop - at]
            self.read(at, part)
            yield part

    def mapped(self) -> np.ndarray:
        """Return a memory map of all numbers, for searching and for reading the whole file."""
        if not self.count:
            return np.empty(0, self.dtype)
        return np.memmap(self.path, self.dtype, "r", offset=self.offset, shape=(self.count,)).view(
            np.ndarray
        )


class _OpenFile:
    """A file descriptor that is closed when the last reference to this object is gone."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self, close: Any = os.close) -> None:
        if hasattr(self, "descriptor"):
            close(self.descriptor)


class _OpenFiles:
    """Keeps only the `limit` most recently read files open.

    A store of terabytes has more shards than the limit of open files per process.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        # Weak references, so that a discarded store closes its files.
        self._recent: OrderedDict[int, weakref.ref[NumberFile]] = OrderedDict()

    def get(self, file: NumberFile) -> _OpenFile:
        with self._lock:
            opened = file.opened
            if opened is None:
                opened = file.opened = _OpenFile(file.path)
                # A deleted `NumberFile` may have had the same id. Remove its entry, so that the new
                # entry does not inherit its position.
                self._recent.pop(id(file), None)
                self._recent[id(file)] = weakref.ref(file)
                while len(self._recent) > self.limit:
                    oldest = self._recent.popitem(last=False)[1]()
                    if oldest is not None:
                        oldest.opened = None
            self._recent.move_to_end(id(file))
            return opened


_open_files = _OpenFiles(OPEN_FILES)
