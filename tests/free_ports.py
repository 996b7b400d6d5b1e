"""Free ports for servers that tests start."""

import secrets
import socket
from contextlib import suppress
from pathlib import Path

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
FIRST = 20_000  # above those that a local Ray gives to its workers (10,002 to 19,999)


def free_port() -> int:
    """A free port outside the range from which the system gives ports to others.

    A port of that range may be taken, by an outgoing connection or whoever asks for any port,
    before the server of the test takes it.
    """
    own = int(RANGE.read_text().split()[0]) if RANGE.exists() else 32_768
    while True:
        port = FIRST + secrets.randbelow(max(own, FIRST + 5000) - FIRST)
        with suppress(OSError), socket.create_server(("", port)):
            return port
