"""Compare the clocks of several hosts, and test the connections between them."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from consyn_jax.distributed.process_group import ProcessGroup

REACH_S = 5.0  # time limit of one connection attempt
ROUNDS = 3  # comparisons of clocks; the one with the quickest gather counts


@dataclass(frozen=True)
class Process:
    """One process of the group: its host, its clock, and the hosts that it cannot reach.

    Attributes:
        offset_s: how far this host's clock is ahead of process 0's clock.
        uncertainty_s: the largest possible error of `offset_s`.
        unreachable: the hosts to which this process could not connect, each with the reason.
    """

    host: str
    offset_s: float
    uncertainty_s: float
    unreachable: tuple[str, ...] = ()


def read_hosts(group: ProcessGroup) -> list[Process]:
    """Compare the clocks and test all connections.

    All processes must call this; each gets the full list, in the order of the process ids.
    """
    offsets = _offsets(group)
    unreachable = _try_connections(group)
    own = [offsets[0], offsets[1], *unreachable]
    hosts = _names(group)
    everyone = [json.loads(text) for text in group.gather(json.dumps(own))]
    return [
        Process(host, offset, uncertainty, tuple(failed))
        for host, (offset, uncertainty, *failed) in zip(hosts, everyone, strict=True)
    ]


def _names(group: ProcessGroup) -> list[str]:
    return group.gather(socket.gethostname())


def _offsets(group: ProcessGroup) -> tuple[float, float]:
    """Return how far this host's clock is ahead of process 0's clock, and the error, in seconds.

    Each process reads its clock when a gather returns. The gather returns in this process and in
    process 0 at times that differ by at most the duration of the gather.
    """
    best = (0.0, float("inf"))
    for _ in range(ROUNDS):
        group.gather("")  # so that the next gather waits for no late process
        began = time.monotonic()
        group.gather("")
        took, now = time.monotonic() - began, time.time()
        first = json.loads(group.gather(json.dumps(now))[0])
        if took < best[1]:
            best = (now - first, took)
    return best


def _try_connections(group: ProcessGroup) -> list[str]:
    """Connect to a new port of every other process; return the hosts that fail, with reasons."""
    with _listening() as server:
        address = [socket.gethostname(), server.getsockname()[1], group.process_id]
        everyone = [json.loads(text) for text in group.gather(json.dumps(address))]
        failed = _unreachable(everyone, group.process_id)
        group.gather("")  # other processes may still be connecting
    return failed


def _unreachable(everyone: Sequence[Any], own: int) -> list[str]:
    failed = []
    for host, port, number in everyone:
        if number == own:
            continue
        try:
            with socket.create_connection((host, port), timeout=REACH_S):
                pass
        except OSError as error:
            failed.append(f"{host} ({error.strerror or error})")
    return failed


class _listening:
    """Context manager that opens a port and accepts connections until the block ends."""

    def __enter__(self) -> socket.socket:
        if socket.has_dualstack_ipv6():
            self._server = socket.create_server(
                ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
        else:
            self._server = socket.create_server(("", 0), backlog=1024)
        threading.Thread(target=self._accept, daemon=True).start()
        return self._server

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                self._server.accept()[0].close()

    def __exit__(self, *_: object) -> None:
        self._server.close()
