"""One writer for a place in a bucket: a lease that is taken and renewed by conditional writes.

The lease is an object that its holder writes again every `RENEW_S`. Clocks of different machines
are not compared: a process that wants the lease of another watches the object by its own clock. It
takes the lease over once the object has not changed for `LEASE_S`, on the condition that it is the
one that was watched. The holder stops writing `MARGIN_S` before anybody can have waited so long.
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

# A lost process keeps others out for LEASE_S. A server that is down for less costs nothing.
LEASE_S, RENEW_S, MARGIN_S = 90.0, 15.0, 15.0
POLLS = 3  # looks at another's lease in the time between two of its renewals


class Lease:
    """The right to write below a prefix of a bucket.

    Args:
        key: the object of the lease.
        place: the prefix, for messages.
        holder: a random word that no other start has.
        clock, sleep: as of `time`; seconds.

    Attributes:
        lost: whether another process has taken it, which is final.
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
        """Take the lease, waiting for the end of one that a process has left without releasing it.

        Args:
            say: called with a sentence before it waits.

        Raises:
            UserError: another process holds it, or the store does not keep to conditions.
            BucketError: the store does not answer.
        """
        while not self._take(None):
            if (seen := self._bucket.read(self._key)) is None:
                continue  # released between the two requests
            say(
                f"{self._place} has the lease of {_holder(seen[0])}; if that process is gone, it "
                f"ends within {LEASE_S:g} s."
            )
            self._watch(*seen)
            if self._take(seen[1]):
                return
        if self._bucket.put(self._key, self._content(), None) is not None:
            raise UserError(
                f"The store of {self._place} ignores the condition If-None-Match, so two runs "
                "could write there at once. Use one that has conditional writes."
            )

    def _watch(self, content: bytes, version: str) -> None:
        """Wait until another's lease has ended, or is gone.

        Raises:
            UserError: its holder renews it.
        """
        until = self._clock() + LEASE_S
        while self._clock() < until:
            self._sleep(RENEW_S / POLLS)
            if (found := self._bucket.read(self._key)) is None:
                return
            if found[1] != version:
                raise UserError(
                    f"{self._place} is in use by {_holder(content)}, which renews its lease there. "
                    "Wait for its end, or name another --remote."
                )

    def _take(self, expected: str | None) -> bool:
        began = self._clock()
        version = self._bucket.put(self._key, self._content(), expected)
        if version is not None:
            self._version, self._valid_from = version, began
        return version is not None

    def _content(self) -> bytes:
        self._renewals += 1  # so that no two writes have the same ETag, which is a hash
        host = socket.gethostname()
        about = {"holder": self._holder, "host": host, "pid": os.getpid(), "n": self._renewals}
        return json.dumps(about).encode()

    def renew(self) -> None:
        """Renew the lease, or find that it is lost.

        Raises:
            BucketError: the store does not answer; the lease is valid for as long as it was.
        """
        with self._guard:
            if self.lost or self._version is None or self._take(self._version):
                return
            found = self._bucket.read(self._key)
            # An earlier renewal may have arrived, and its answer not.
            is_own = found is not None and _read(found[0]).get("holder") == self._holder
            self.lost = found is None or not is_own or not self._take(found[1])

    def start(self) -> None:
        """Renew the lease in the background until `release`."""
        self._thread.start()

    def _keep(self) -> None:
        while not self._stop.wait(RENEW_S):
            try:
                self.renew()
            except BucketError:  # what is uploaded meanwhile fails with the same, and warns
                continue

    def release(self) -> None:
        """End the lease, so that another process need not wait for it.

        Raises:
            BucketError: the store does not answer; the lease ends by itself.
        """
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._guard:
            # Nobody else can have taken a valid one.
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
