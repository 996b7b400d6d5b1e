"""Files of numbers, read in place.

They are read with `pread`, not through a memory map. Mapped pages count as the process's memory,
and access to a map fails with SIGBUS when its file is truncated; a read of 4 KB takes about a
microsecond either way. The memory for reading does not grow with the store: one buffer per thread
while a shard is checked, and a bounded number of open files.
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
# Large enough that other threads run most of the time while one hashes, small enough for the
# processor's cache.
CHUNK_BYTES = 1 << 19


class NumberFile:
    """Numbers of one type in a file, read in place from any thread.

    The file stays open only while it is among those read most recently.

    Args:
        count: number of numbers in the file.
        offset: number of bytes before the first number.
    """

    def __init__(self, path: str, dtype: np.dtype, count: int, offset: int = 0) -> None:
        self.path, self.dtype, self.count, self.offset = path, dtype, count, offset
        self.opened: _OpenFile | None = None  # set and reset by `_open_files`

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill the contiguous `out` with the numbers from `start` on, converted to its dtype.

        Raises:
            UserError: the file cannot be read, or has become shorter.
        """
        target = out if out.dtype == self.dtype else np.empty(len(out), self.dtype)
        try:
            file, position = _open_files.get(self), self.offset + start * self.dtype.itemsize
            found = os.preadv(file.descriptor, [target.data], position)
            while found < target.nbytes:  # network file systems may return less
                more = os.preadv(file.descriptor, [target.data.cast("B")[found:]], position + found)
                if not more:
                    raise UserError(
                        f"{self.path} is shorter than it was when it was opened. Do not change "
                        "the data during a run, and start again."
                    )
                found += more
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be read: {error.strerror}. "
                "Check that it exists, its permissions and the disk."
            ) from error
        if target is not out:
            out[:] = target

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Iterate over the numbers start .. stop, `CHUNK_BYTES` at a time.

        All chunks share one buffer: each overwrites the previous one.
        """
        stop = self.count if stop is None else stop
        buffer = np.empty(max(min(CHUNK_BYTES // self.dtype.itemsize, stop - start), 0), self.dtype)
        for at in range(start, stop, max(len(buffer), 1)):
            part = buffer[: stop - at]
            self.read(at, part)
            yield part

    def mapped(self) -> np.ndarray:
        """A memory map of all numbers, for reading whole files and for searching."""
        if not self.count:
            return np.empty(0, self.dtype)
        return np.memmap(self.path, self.dtype, "r", offset=self.offset, shape=(self.count,)).view(
            np.ndarray
        )


class _OpenFile:
    """A file descriptor that is closed when its last reference goes."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self, close: Any = os.close) -> None:
        if hasattr(self, "descriptor"):
            close(self.descriptor)


class _OpenFiles:
    """Keeps only the `limit` most recently read files open.

    A store of terabytes has more shards than a process may have open files.
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
                # A deleted file may have had the same id; the new entry must not take its place in
                # the order.
                self._recent.pop(id(file), None)
                self._recent[id(file)] = weakref.ref(file)
                while len(self._recent) > self.limit:
                    oldest = self._recent.popitem(last=False)[1]()
                    if oldest is not None:
                        oldest.opened = None
            self._recent.move_to_end(id(file))
            return opened


_open_files = _OpenFiles(OPEN_FILES)
