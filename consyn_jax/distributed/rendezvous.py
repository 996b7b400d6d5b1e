"""The rendezvous: the processes of a run connect to process 0 when they start."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from consyn_jax.distributed.cluster import Place
from consyn_jax.distributed.process_group import PARTING_S, Connection, ProcessGroup
from consyn_jax.errors import ProcessMissing, UserError, listed

RETRY_S = 0.2


def meet(
    place: Place,
    arrive_s: float,
    about: Any,
    answer: Callable[[list[Any]], Any],
    prog: str,
) -> tuple[ProcessGroup, Any]:
    """Connect this process with the other processes of the run.

    Args:
        place: Number of this process, and address of process 0.
        arrive_s: Seconds after which a process that has not connected counts as missing.
        about: JSON value that describes this process to process 0.
        answer: Function that receives the `about` of every process and returns a JSON value for all
            processes. It is called in process 0. If it raises a UserError, all processes end.

    Returns:
        The process group, and the answer.

    Raises:
        UserError: A process was started twice, or `answer` raised a `UserError`. Every process
            raises the same message. If a process of another launch connects by mistake, only that
            process raises an error, and process 0 keeps waiting for the missing processes.
        ProcessMissing: Process 0 does not answer, or other processes did not connect. Every process
            raises the same message.
    """
    hello = {
        "process_id": place.process_id,
        "num_processes": place.num_processes,
        "start": place.start,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "about": about,
    }
    if place.process_id:
        return _be_guest(place.address, arrive_s, hello, prog)
    return _be_host(place.address, arrive_s, hello, answer, prog)


def _be_guest(
    address: tuple[str, int], arrive_s: float, hello: dict[str, Any], prog: str
) -> tuple[ProcessGroup, Any]:
    connection = _connect(address, arrive_s, hello)
    match connection.first_message(2 * arrive_s):
        case ["welcome", names, answer]:
            return ProcessGroup(hello["process_id"], names, {0: connection}, prog), answer
        case ["refused", message]:
            pass
        case ["stranger", name]:
            message = (
                f"At --coordinator_address {address[0]}:{address[1]}, {name} answers, but this "
                f"process belongs to {_start(hello)}. Give one of the two launches another port."
            )
        case ["missing", message]:
            connection.socket.close()
            raise ProcessMissing(message)
        case _:
            message = (
                f"A program other than process 0 of this run answers at --coordinator_address "
                f"{address[0]}:{address[1]}. Give a port that is free on that host."
            )
    connection.socket.close()
    raise UserError(message)


def _be_host(
    address: tuple[str, int],
    arrive_s: float,
    hello: dict[str, Any],
    answer: Callable[[list[Any]], Any],
    prog: str,
) -> tuple[ProcessGroup, Any]:
    arrived = _await_others(address, arrive_s, hello)
    try:
        _check_numbers(address, arrive_s, hello, [other for other, _ in arrived])
        arrived.sort(key=lambda each: each[0]["process_id"])
        everyone = [hello, *(other for other, _ in arrived)]
        answered = answer([each["about"] for each in everyone])
    except (UserError, ProcessMissing) as refused:
        kind = "refused" if isinstance(refused, UserError) else "missing"
        for _, connection in arrived:
            connection.send(kind, str(refused))
            connection.socket.close()
        raise
    names = [_name(each) for each in everyone]
    for _, connection in arrived:
        connection.send("welcome", names, answered)
    connections = {other["process_id"]: connection for other, connection in arrived}
    return ProcessGroup(0, names, connections, prog), answered


def _name(hello: dict[str, Any]) -> str:
    return f"process {hello['process_id']} (pid {hello['pid']} on {hello['host']})"


def _start(hello: dict[str, Any]) -> str:
    return hello["start"] or "a launch without a scheduler"


def _await_others(
    address: tuple[str, int], arrive_s: float, hello: dict[str, Any]
) -> list[tuple[dict[str, Any], Connection]]:
    """In process 0, wait until all other processes have connected or the time is over.

    Returns:
        The greeting and the connection of each process that has connected.
    """
    try:
        server = _listen_on(address[1])
    except OSError as error:
        why = (
            "another process listens there: a second one with --process_id 0, or another run"
            if error.errno == errno.EADDRINUSE
            else error.strerror
        )
        raise UserError(
            f"Port {address[1]} of --coordinator_address cannot be used on this host: {why}. "
            f"Give all processes a port that is free."
        ) from error
    arrived: list[tuple[dict[str, Any], Connection]] = []
    with server:
        deadline = time.monotonic() + arrive_s
        while (
            len(arrived) < hello["num_processes"] - 1 and (left := deadline - time.monotonic()) > 0
        ):
            server.settimeout(left)
            try:
                connection = Connection(server.accept()[0])
            except TimeoutError:
                break
            other = _greeting(connection)
            if other is None:  # not a process of any run
                connection.socket.close()
            elif other["start"] != hello["start"]:
                connection.send("stranger", f"{_name(hello)} of {_start(hello)}")
                connection.socket.close()
            else:
                arrived.append((other, connection))
                # Each process waits no longer than `arrive_s` after its own start.
                deadline = min(deadline, time.monotonic() + arrive_s - other["waited_s"])
    return arrived


def _greeting(connection: Connection) -> dict[str, Any] | None:
    """Read the greeting of a process that has connected; None if no valid greeting arrives."""
    match connection.first_message(RETRY_S * 10):
        case [
            "hello",
            {
                "process_id": int(),
                "num_processes": int(),
                "start": str(),
                "waited_s": float(),
                "pid": _,
                "host": _,
                "about": _,
            } as other,
        ]:
            return other
    return None


def _listen_on(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
        )
    return socket.create_server(("", port), backlog=1024)


def _check_numbers(
    address: tuple[str, int],
    arrive_s: float,
    hello: dict[str, Any],
    others: list[dict[str, Any]],
) -> None:
    """Check that every process number occurs exactly once.

    Raises:
        UserError: Several processes have the same number; the message names them.
        ProcessMissing: A number is missing.
    """
    count = hello["num_processes"]
    for other in others:
        if other["num_processes"] != count:
            raise UserError(
                f"{_name(other)} has --num_processes {other['num_processes']}, but process 0 has "
                f"{count}. Give all processes the same --num_processes."
            )
    by_number: dict[int, list[dict[str, Any]]] = {}
    for each in (hello, *others):
        by_number.setdefault(each["process_id"], []).append(each)
    for number, same in by_number.items():
        if len(same) > 1:
            raise UserError(
                f"--process_id {number} was given to {len(same)} processes: "
                f"{' and '.join(_name(each) for each in same)}. Give each process its own."
            )
    missing = [str(number) for number in range(count) if number not in by_number]
    if missing:
        words = f"process{'' if len(missing) == 1 else 'es'} {listed(missing, 10)}"
        raise ProcessMissing(
            f"Of {count} processes, {words} did not connect to {address[0]}:{address[1]} within "
            f"{arrive_s:.0f} s. Start all processes with the same --coordinator_address, look at "
            f"the output of the missing ones, and raise --rendezvous_seconds if they start slowly."
        )


def _connect(address: tuple[str, int], arrive_s: float, hello: dict[str, Any]) -> Connection:
    """Connect to process 0, and send the greeting of this process.

    Raises:
        ProcessMissing: Process 0 does not answer in time.
    """
    began, why = time.monotonic(), ""
    while (waited_s := time.monotonic() - began) < arrive_s:
        try:
            opened = socket.create_connection(address, timeout=PARTING_S)
        except OSError as error:  # process 0 may not have started yet
            why = error.strerror or str(error)
        else:
            # While nothing listens on the port, TCP may connect a socket on this host to itself.
            if opened.getsockname() != opened.getpeername():
                connection = Connection(opened)
                connection.send("hello", hello | {"waited_s": waited_s})
                return connection
            opened.close()
        time.sleep(RETRY_S)
    raise ProcessMissing(
        f"Process 0 does not answer at --coordinator_address {address[0]}:{address[1]} within "
        f"{arrive_s:.0f} s ({why}). Check the address, that process 0 runs there, and that no "
        f"firewall blocks the port."
    )
