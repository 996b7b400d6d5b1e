"""What answers at the address of a cluster, and signals while Ray starts."""

import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from consyn_jax.cli.prepare import _header
from consyn_jax.data.preparation.workers import ray_address
from consyn_jax.data.preparation.workers.ray_address import check_address, named_address
from consyn_jax.errors import UserError
from consyn_jax.prepare_config import EngineOptions, PrepareConfig

# The settings that a GCS of Ray 2.60 sends.
SETTINGS = b"\x00\x00\x18\x04\x00\x00\x00\x00\x00" + bytes(24)
WEB = b"HTTP/1.1 400 Bad Request\r\n\r\n"


class Server:
    """Accepts connections, and sends the same answer to each; without one it waits."""

    def __init__(self, answer: bytes | None) -> None:
        self._answer, self._listener = answer, socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            self._open.append(connection)
            if self._answer is not None:
                with suppress(OSError):  # the client has read enough, and closed the connection
                    connection.recv(64)
                    connection.sendall(self._answer)
                    connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # ends `accept`
        self._thread.join()  # it may just have accepted a connection
        for each in (self._listener, *self._open):
            each.close()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's thread may wait long for a busy processor."""
    monkeypatch.setattr(ray_address, "LONGEST_S", 120)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_USE_TLS", raising=False)


@pytest.fixture
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    if request.param is None:  # it never answers
        monkeypatch.setattr(ray_address, "LONGEST_S", 0.3)
    made = Server(request.param)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("server", "fault"),
    [
        (WEB, "is not the head node of a Ray cluster: a web server answers there"),
        (b"<!DOCTYPE HTML>", "is not the head node of a Ray cluster: a web server answers there"),
        (None, "is not the head node of a Ray cluster: it does not answer in Ray's protocol"),
        (b"", "is not the head node of a Ray cluster: it does not answer in Ray's protocol"),
        (b"SSH-2.0-OpenSSH_9\r\n", "it answers in a protocol other than Ray's"),
        (b"HT", "it answers in a protocol other than Ray's"),
    ],
    indirect=["server"],
)
def test_what_is_no_head_node_is_refused(server: Server, fault: str) -> None:
    with pytest.raises(UserError) as refused:
        check_address("--ray_address", server.address)
    assert str(refused.value).startswith(f"--ray_address {server.address} is not")
    assert fault in str(refused.value)


@pytest.mark.parametrize("server", [SETTINGS], indirect=True)
def test_a_head_node_is_accepted(server: Server) -> None:
    check_address("--ray_address", server.address)


def set_record(monkeypatch: pytest.MonkeyPatch, record: Callable[[str], str]) -> None:
    """Let Ray read its record of the last cluster with this function."""
    services = types.ModuleType("ray._private.services")
    services.canonicalize_bootstrap_address = record  # type: ignore[attr-defined]
    for name in ("ray", "ray._private"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, services.__name__, services)


@pytest.mark.parametrize("error", [ConnectionError, ValueError])
def test_a_record_that_ray_cannot_read_is_left_to_ray(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fails(address: str) -> str:
        raise error("Invalid address format")

    set_record(monkeypatch, fails)
    check_address("--ray_address", "auto")


@pytest.mark.parametrize("server", [WEB], indirect=True)
def test_auto_is_checked_too(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's record of the last cluster outlives a head node that was killed."""
    set_record(monkeypatch, lambda _: server.address)
    with pytest.raises(UserError, match=r"--ray_address auto, which Ray resolves to 127.* is not"):
        check_address("--ray_address", "auto")
    server.close()
    with pytest.raises(UserError, match=r"No Ray cluster answers at --ray_address auto, which Ray"):
        check_address("--ray_address", "auto")


def test_a_name_that_no_host_can_have_is_a_message() -> None:
    with pytest.raises(UserError, match="No Ray cluster answers at"):
        check_address("RAY_ADDRESS", f"{'a' * 70}:6379")


@pytest.mark.parametrize("server", [None], indirect=True)
def test_a_server_that_speaks_tls_is_left_to_ray(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_USE_TLS", "1")
    check_address("--ray_address", server.address)


def test_the_variable_replaces_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does in Ray."""
    monkeypatch.setenv("RAY_ADDRESS", "node1:6379")
    assert named_address("auto") == ("RAY_ADDRESS", "node1:6379")
    assert named_address("node2:6379") == ("--ray_address", "node2:6379")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert named_address("auto") == ("RAY_ADDRESS", "")
    assert ("workers", "tasks of Ray on this machine") in _header(
        PrepareConfig(workers=EngineOptions(engine="ray"))
    )


STUCK = """
import signal, subprocess, sys, time
from consyn_jax.data.preparation.workers import ray_signals
ray_signals.HELD_S = float(sys.argv[1])
ray_signals.Repeats.place = lambda self: sys.argv[2]
signal.signal(signal.SIGTERM, lambda *_: None)
started = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
def end():
    started.kill()
    started.wait()
with ray_signals.holding_signals(end):
    print(started.pid, flush=True)
    while True:
        time.sleep(600)
"""


@pytest.mark.parametrize(("held_s", "place"), [("600", "second"), ("0.1", "first")])
def test_a_signal_ends_a_command_that_waits_for_ray(held_s: str, place: str) -> None:
    """A second one at once; a first one after a while."""
    code = [sys.executable, "-c", STUCK, held_s, place]
    with subprocess.Popen(
        code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "Run the same command again without --overwrite to continue." in said
    assert time.monotonic() - began < 50
