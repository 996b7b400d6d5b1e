"""A lease that allows one writer below a prefix of a bucket, based on conditional writes.

The lease is an object in the bucket. Its holder rewrites the object every `RENEW_S` seconds. A
process that wants the lease reads the object repeatedly. If the object has not changed for
`LEASE_S` seconds, the process takes the lease by a write that requires the unchanged version. Each
process uses only its own clock, because clocks of machines differ. A holder that cannot renew its
lease stops writing `MARGIN_S` seconds before another process can take it.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from consyn_jax.errors import UserError, in_line
from consyn_jax.remote.bucket import Bucket, BucketError

# Seconds. After a crash of the holder, others wait for LEASE_S. A shorter outage of the server has
# no effect.
LEASE_S, RENEW_S, MARGIN_S = 90.0, 15.0, 15.0
POLLS = 3  # reads of another process's lease per RENEW_S


class Lease:
    """The right to write below a prefix of a bucket.

    Args:
        key: key of the object that represents the lease.
        place: the prefix, for messages.
        holder: a random string that identifies this process.
        clock, sleep: functions such as `time.monotonic` and `time.sleep`, in seconds.

    Attributes:
        lost: whether another process has taken the lease; it stays true from then on.
    """

    def __init__(
        self,
        bucket: Bucket,
        key: str,
        place: str,
        holder: str,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._bucket, self._key, self._place, self._holder = bucket, key, place, holder
        self._clock, self._sleep = clock, sleep
        self._version: str | None = None
        self._valid_from = 0.0
        self._renewals = 0
        self.lost = False
        self._guard = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    @property
    def is_valid(self) -> bool:
        """Whether this process may write now."""
        held = self._version is not None and not self.lost
        return held and self._clock() < self._valid_from + LEASE_S - MARGIN_S

    def acquire(self, say: Callable[[str], None] = lambda sentence: None) -> None:
        """Take the lease; if another process holds it, wait as long as a lease lasts.

        Args:
            say: called with a message for the user before waiting.

        Raises:
            UserError: another process has renewed the lease meanwhile, or the server does not
                support conditional writes.
        """
        while not self._take(None):
            if (seen := self._bucket.read(self._key)) is None:
                continue  # released between the two requests
            say(
                f"{self._place} is leased by {_holder(seen[0])}. If that process is gone, its "
                f"lease ends within {LEASE_S:g} s."
            )
            self._watch(*seen)
            if self._take(seen[1]):
                return
        if self._bucket.put(self._key, self._content(), None) is not None:
            raise UserError(
                f"The store of {self._place} ignores the condition If-None-Match, so two runs "
                "could write there at the same time. Use a store that supports conditional writes."
            )

    def _watch(self, content: bytes, version: str) -> None:
        """Wait until another process's lease has expired or is deleted.

        Raises:
            UserError: the other process renews the lease.
        """
        until = self._clock() + LEASE_S
        while self._clock() < until:
            self._sleep(RENEW_S / POLLS)
            if (found := self._bucket.read(self._key)) is None:
                return
            if found[1] != version:
                raise UserError(
                    f"{self._place} is in use by {_holder(content)}, which is still running. "
                    "Wait until that process ends, or give another --remote."
                )

    def _take(self, expected: str | None) -> bool:
        began = self._clock()
        version = self._bucket.put(self._key, self._content(), expected)
        if version is not None:
            self._version, self._valid_from = version, began
        return version is not None

    def _content(self) -> bytes:
        self._renewals += 1  # makes every ETag new: an ETag is a hash of the content
        host = socket.gethostname()
        about = {"holder": self._holder, "host": host, "pid": os.getpid(), "n": self._renewals}
        return json.dumps(about).encode()

    def renew(self) -> None:
        """Renew the lease; set `lost` if another process has taken it.

        Raises:
            BucketError: the request fails; the lease is not extended.
        """
        with self._guard:
            if self.lost or self._version is None or self._take(self._version):
                return
            found = self._bucket.read(self._key)
            # The version is also new if an earlier renewal succeeded but its response was lost.
            is_own = found is not None and _read(found[0]).get("holder") == self._holder
            self.lost = found is None or not is_own or not self._take(found[1])

    def start(self) -> None:
        """Renew the lease in the background until `release`."""
        self._thread.start()

    def _keep(self) -> None:
        while not self._stop.wait(RENEW_S):
            try:
                self.renew()
            except BucketError:  # uploads fail with the same error and print a warning
                continue

    def stop(self) -> None:
        """Stop renewing the lease, so that it expires."""
        self._stop.set()

    def release(self) -> None:
        """Delete the lease, so that another process can take it at once.

        Raises:
            BucketError: the request fails; the lease then expires after `LEASE_S`.
        """
        self.stop()
        if self._thread.is_alive():
            self._thread.join()
        with self._guard:
            # While the lease is valid, the object cannot belong to another process.
            if self.is_valid:
                self._bucket.delete([self._key])
            self._version = None


def _read(content: bytes) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _holder(content: bytes) -> str:
    about = _read(content)
    return in_line(f"process {about.get('pid', '?')!s:.20} on {about.get('host', '?')!s:.100}")
