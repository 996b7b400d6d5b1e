"""Write event files for TensorBoard."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any


class EventFile:
    """An event file for TensorBoard. `write` passes each event to the operating system immediately.

    The writers of tensorboardX do not suit long runs. `EventFileWriter` queues events for a thread;
    a full disk kills this thread, and training hangs. `EventsWriter` passes events on only when it
    flushes them to disk, which takes longer than a small step.
    """

    def __init__(self, directory: Path) -> None:
        # The name has nanoseconds, so that two starts within a second get different files.
        now = time.time_ns()
        place = f"{now // 10**9}.{socket.gethostname()}.{os.getpid()}.{now % 10**9:09d}"
        self._file = (directory / f"events.out.tfevents.{place}").open("xb", buffering=0)

    def write(self, event: Any) -> None:
        """Append an event.

        Raises:
            OSError: the disk is full, or the file cannot be written.
        """
        from tensorboardX.record_writer import masked_crc32c

        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        checks = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
        record = b"".join((length, next(checks), data, next(checks)))
        if self._file.write(record) != len(record):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flush(self) -> None:
        """Force all events to disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Force all events to disk, and close the file; safe to call twice."""
        if not self._file.closed:
            self.flush()
            self._file.close()
