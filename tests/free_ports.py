"""Free ports for servers that tests start."""

import secrets
import socket
from contextlib import suppress
from pathlib import Path

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
FIRST = 15_000


def free_port() -> int:
    """A port that stays free until the server of the test takes it.

    The system gives ports of its own range to outgoing connections and to whoever asks for any
    port, so one of that range may be taken in between.
    """
    own = int(RANGE.read_text().split()[0]) if RANGE.exists() else 32_768
    while True:
        port = FIRST + secrets.randbelow(max(own, FIRST + 5000) - FIRST)
        with suppress(OSError), socket.create_server(("", port)):
            return port
