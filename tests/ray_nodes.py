"""A Ray cluster of two nodes on this machine, for tests and benchmarks: two raylets, loopback, free
ports, a token, a directory of its own; every process of it is found by a mark and killed at the end.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from free_ports import free_port

HOST = "127.0.0.1"
STARTS_S = 240.0
OBJECT_STORE_BYTES = 200_000_000
# A killed node, which refuses connections, is noticed within two seconds, not within twenty. A slow
# one may take its time to answer.
HEALTH = {"period_ms": "500", "timeout_ms": "60000", "failure_threshold": "3"}
WAITS = """
import logging, sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
until = time.monotonic() + float(sys.argv[3])
while sum(node["Alive"] for node in ray.nodes()) != int(sys.argv[2]):
    assert time.monotonic() < until, ray.nodes()
    time.sleep(0.1)
"""


def missing() -> str:
    """What this machine lacks, as a reason; "" if it lacks nothing."""
    return "" if importlib.util.find_spec("ray") else "needs ray, which the extra cluster brings"


class Nodes:
    """A head node and others, each with as many processors as `processors` says."""

    def __init__(self, place: Path, processors: int) -> None:
        self.processors = processors
        self.mark = secrets.token_hex(8)
        self.place, self._started = place, list[subprocess.Popen[bytes]]()
        self.address = f"{HOST}:{free_port()}"
        (place / "token").write_text(secrets.token_hex(32))
        self.environment = {
            **os.environ,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(place / "token"),
            "RAY_worker_niceness": "0",
            **{f"RAY_health_check_{name}": value for name, value in HEALTH.items()},
        }

    def start(self) -> None:
        """Start the head node."""
        port = self.address.split(":")[1]
        self._start(
            *("--head", f"--port={port}", f"--temp-dir={self.place}", "--include-dashboard=false")
        )
        self.wait(1)

    def add(self) -> None:
        """Start another node."""
        self._start(f"--address={self.address}")

    @property
    def newest(self) -> str:
        """The mark of the node that was started last."""
        return f"{self.mark}-{len(self._started)}"

    def _start(self, *flags: str) -> None:
        mark = f"{self.mark}-{len(self._started) + 1}"
        process = subprocess.Popen(
            [
                *(
                    sys.executable,
                    "-m",
                    "ray.scripts.scripts",
                    "start",
                    *flags,
                    f"--num-cpus={self.processors}",
                ),
                *(f"--object-store-memory={OBJECT_STORE_BYTES}", f"--node-ip-address={HOST}"),
                *("--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats", "--block"),
            ],
            env={**self.environment, "RAY_NODE_MARK": mark},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._started.append(process)

    def wait(self, count: int) -> None:
        """Wait until so many nodes are alive."""
        until = time.monotonic() + STARTS_S
        host, port = self.address.split(":")
        while True:
            with suppress(OSError):
                socket.create_connection((host, int(port)), timeout=1).close()
                break
            assert time.monotonic() < until, "the head node does not answer"
            time.sleep(0.1)
        command = [sys.executable, "-c", WAITS, self.address, str(count), str(STARTS_S)]
        subprocess.run(command, env=self.environment, check=True, timeout=2 * STARTS_S)

    def processes(self, mark: str, *words: str) -> list[int]:
        """Processes of a node, or of all with the cluster's mark, whose command has all words."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if f"RAY_NODE_MARK={mark}".encode() not in (path / "environ").read_bytes():
                    continue
                command = (path / "cmdline").read_bytes().decode(errors="replace")
                if command and all(word in command for word in words):
                    found.append(int(path.name))
        return found

    def workers(self) -> list[int]:
        """The processes that work on blocks, on all nodes; others of Ray have names like theirs."""
        names = ("ray::work", "ray::IDLE")
        return [pid for name in names for pid in self.processes(self.mark, name)]

    def kill(self, mark: str) -> None:
        """Kill the raylet of a node, and let the rest of the node die of it."""
        for pid in self.processes(mark, "raylet/raylet"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill all processes of the cluster."""
        until = time.monotonic() + STARTS_S
        while found := self.processes(self.mark):
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert time.monotonic() < until, "a process of Ray cannot be killed"
            time.sleep(0.05)
        for process in self._started:
            process.wait()


@contextmanager
def running(processors: int = 1) -> Iterator[Nodes]:
    """A cluster with its head node."""
    place = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # paths of sockets are short
    nodes = Nodes(place, processors)
    try:
        nodes.start()
        yield nodes
    finally:
        nodes.close()
        shutil.rmtree(place, ignore_errors=True)
