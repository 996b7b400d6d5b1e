"""Find the address of a Ray cluster, and check that a head node answers there.

Without this check, `ray.init` may wait for minutes, handle no signal during the wait, and abort the
process.
"""

from __future__ import annotations

import os
import socket
import time

from consyn_jax.errors import UserError, brief
from consyn_jax.integers import natural

LONGEST_S = 10.0  # longest wait for a connection, and for an answer
START = (
    "Start Ray on this machine (ray start --head, or ray start --address HEAD:6379 to join a "
    "cluster), or leave --ray_address out to start a local Ray instance."
)
# gRPC speaks HTTP/2: a client begins with these 24 bytes and a frame of settings, and the server
# sends a frame of settings.
_BEGINNING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_FRAME_HEAD, _SETTINGS = 9, 4  # bytes of a frame before its content; the type at byte 3


def named_address(address: str | None) -> tuple[str, str]:
    """Return the name of the flag or variable that gives the cluster's address, and the address.

    The address is "" if a local Ray instance is to be started.
    """
    variable = os.environ.get("RAY_ADDRESS", "")
    if address and (address != "auto" or variable in ("", "auto")):
        return "--ray_address", address
    return "RAY_ADDRESS", "" if variable == "local" else variable


def check_address(name: str, address: str) -> None:
    """Check that the head node of a Ray cluster answers at an address.

    Raises:
        UserError: the address is invalid, no server answers there, or the server is not the head
            node of a Ray cluster.
    """
    place, found = f"{name} {address}", address
    if address == "auto":
        found = _found_by_ray()
        if not found:
            return
        place = f"{place}, which Ray resolves to {found}"
    host, _, port = found.rpartition(":")
    if not host or "/" in found or not 0 < (natural(port) or 0) < 65536:
        raise UserError(
            f"{name} must be auto or HOST:PORT of the head node, as in node1:6379, not {found!r}."
        )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=LONGEST_S) as server:
            fault = "" if _uses_tls() else _fault_of(server)
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that no host can have
        reason = getattr(error, "strerror", None) or brief(error)
        raise UserError(f"No Ray cluster answers at {place} ({reason}). {START}") from error
    if fault:
        raise UserError(
            f"{place} is not the head node of a Ray cluster: {fault}. Give the port of ray start "
            "--head, which is 6379 unless --port names another."
        )


def _found_by_ray() -> str:
    """Return the address that Ray resolves "auto" to; "" if Ray has none or cannot be asked."""
    try:
        from ray._private.services import canonicalize_bootstrap_address
    except ImportError:
        return ""
    try:
        return canonicalize_bootstrap_address("auto") or ""
    except (ConnectionError, ValueError):  # a damaged record, too; `ray.init` raises it again
        return ""


def _uses_tls() -> bool:
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def _fault_of(server: socket.socket) -> str:
    """Send the first bytes of gRPC; say how the answer is wrong, or return "" if it is right.

    The head node of a Ray cluster is a gRPC server.
    """
    until, answer = time.monotonic() + LONGEST_S, b""
    try:
        server.sendall(_BEGINNING)
        while len(answer) < _FRAME_HEAD and (left_s := until - time.monotonic()) > 0:
            server.settimeout(left_s)
            more = server.recv(_FRAME_HEAD - len(answer))
            if not more:
                break
            answer += more
    except TimeoutError:
        pass
    except OSError as error:  # a server that closes the connection at once
        return f"it closes the connection ({error.strerror or brief(error)})"
    if len(answer) == _FRAME_HEAD and answer[3] == _SETTINGS:
        return ""
    if answer.startswith((b"HTTP/", b"<")):  # some send only a page, as to a very old client
        return "a web server answers there, such as Ray's dashboard"
    if answer:
        return "it answers in a protocol other than Ray's"
    return f"it does not answer in Ray's protocol within {LONGEST_S:g} seconds"
