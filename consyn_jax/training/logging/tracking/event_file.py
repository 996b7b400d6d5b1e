"""Files of events that TensorBoard reads."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any


class EventFile:
    """A file of events for TensorBoard, each of which the system has once it is written.

    tensorboardX's own writers queue events for a thread, which a full disk kills so that training
    hangs, or flush the disk after each event, which takes longer than a small step.
    """

    def __init__(self, directory: Path) -> None:
        # Two starts within a second would share a name, and the second would overwrite the first.
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
        """Bring the events to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Bring the events to the disk, and close the file; safe to call twice."""
        if not self._file.closed:
            self.flush()
            self._file.close()
