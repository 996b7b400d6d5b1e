"""How the processes of one run find each other, and what is said of those that do not come, or come twice."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from consyn_jax.config import UserError
from consyn_jax.distributed.peers import PARTING_S, Line, Peers

ARRIVE_S = 40.0  # whoever has not come by then is missing
RETRY_S = 0.2


def meet(
    address: tuple[str, int], num_processes: int, process_id: int, about: Any, answer: Callable[[list[Any]], Any], prog: str
) -> tuple[Peers, Any]:
    """Find the other processes of this run.

    Args:
        address: host and port of process 0.
        about: what process 0 shall know of this one, as JSON.
        answer: in process 0, from the `about` of every process by number, what all are told, as JSON; its UserError refuses all.

    Returns:
        The processes, and the answer.

    Raises:
        UserError: process 0 is not there, others are missing or came twice, or were refused. Each process gets the sentence.
    """
    hello = {"process_id": process_id, "num_processes": num_processes, "pid": os.getpid(), "host": socket.gethostname(), "about": about}
    if process_id:
        line = _join(address, hello)
        match line.first(2 * ARRIVE_S):
            case ["welcome", names, told]:
                return Peers(process_id, names, {0: line}, prog), told
            case ["refused", sentence]:
                pass
            case _:
                where = f"--coordinator_address {address[0]}:{address[1]}"
                sentence = f"What answers at {where} is not process 0 of this run. Give a port that is free there."
        line.connection.close()
        raise UserError(sentence)
    arrived = _await_others(address, hello)
    try:
        _check_numbers(address, hello, [other for other, _ in arrived])
        arrived.sort(key=lambda each: each[0]["process_id"])
        everyone = [hello, *(other for other, _ in arrived)]
        told = answer([each["about"] for each in everyone])
    except UserError as refused:
        for _, line in arrived:
            line.send("refused", str(refused))
            line.connection.close()
        raise
    names = [_name(each) for each in everyone]
    for _, line in arrived:
        line.send("welcome", names, told)
    return Peers(0, names, {other["process_id"]: line for other, line in arrived}, prog), told


def _name(hello: dict[str, Any]) -> str:
    return f"process {hello['process_id']} (pid {hello['pid']} on {hello['host']})"


def _await_others(address: tuple[str, int], hello: dict[str, Any]) -> list[tuple[dict[str, Any], Line]]:
    """Process 0: those that come in time, and what each says of itself."""
    try:
        server = _listen_on(address[1])
    except OSError as error:
        why = "another process listens there: a second one with --process_id 0, or another run" if error.errno == errno.EADDRINUSE else error.strerror
        raise UserError(f"Port {address[1]} of --coordinator_address cannot be used on this host: {why}. Give a free port to all.") from error
    arrived: list[tuple[dict[str, Any], Line]] = []
    with server:
        deadline = time.monotonic() + ARRIVE_S
        while len(arrived) < hello["num_processes"] - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                line = Line(server.accept()[0])
            except TimeoutError:
                break
            match line.first(RETRY_S * 10):
                case ["hello", {"process_id": int(), "num_processes": int(), "waited_s": float(waited_s), "pid": _, "host": _, "about": _} as other]:
                    arrived.append((other, line))
                    deadline = min(deadline, time.monotonic() + ARRIVE_S - waited_s)  # it waits since then
                case _:
                    line.connection.close()  # some stranger
    return arrived


def _listen_on(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


def _check_numbers(address: tuple[str, int], hello: dict[str, Any], others: list[dict[str, Any]]) -> None:
    """Every number from 0 on is there once.

    Raises:
        UserError: naming those that are not.
    """
    count = hello["num_processes"]
    for other in others:
        if other["num_processes"] != count:
            raise UserError(f"{_name(other)} was told of {other['num_processes']} processes, and process 0 of {count}. Give all the same --num_processes.")
    by_number: dict[int, list[dict[str, Any]]] = {}
    for each in (hello, *others):
        by_number.setdefault(each["process_id"], []).append(each)
    for number, same in by_number.items():
        if len(same) > 1:
            raise UserError(f"--process_id {number} was given to {len(same)}: {' and '.join(_name(each) for each in same)}. Give each process its own.")
    missing = [str(number) for number in range(count) if number not in by_number]
    if missing:
        words = f"process{'' if len(missing) == 1 else 'es'} {', '.join(missing[:10])}{' and more' if missing[10:] else ''}"
        raise UserError(
            f"Of {count} processes, {words} did not come to {address[0]}:{address[1]} within {ARRIVE_S:.0f} s. "
            f"Start all with the same --coordinator_address, and see in the output of those what keeps them."
        )


def _join(address: tuple[str, int], hello: dict[str, Any]) -> Line:
    """A connection to process 0, which has been greeted.

    Raises:
        UserError: nobody is there in time.
    """
    began, why = time.monotonic(), ""
    while (waited_s := time.monotonic() - began) < ARRIVE_S:
        try:
            connection = socket.create_connection(address, timeout=PARTING_S)
        except OSError as error:  # it has not come yet, perhaps
            why = error.strerror or str(error)
        else:
            if connection.getsockname() != connection.getpeername():  # the kernel connects a port that nobody has to itself, now and then
                line = Line(connection)
                line.send("hello", hello | {"waited_s": waited_s})
                return line
            connection.close()
        time.sleep(RETRY_S)
    raise UserError(
        f"Process 0 does not answer at --coordinator_address {address[0]}:{address[1]}: {why}, for {ARRIVE_S:.0f} s. "
        f"Check the address, that process 0 runs there, and that no firewall is between."
    )
