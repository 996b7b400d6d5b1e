"""Several hosts: clocks apart, and ports that are closed."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from consyn_jax.doctor import host_facts
from consyn_jax.doctor.host_checks import check_hosts
from consyn_jax.doctor.host_facts import Process, read_hosts
from consyn_jax.doctor.machine_findings import FAIL, PASS, WARN


@pytest.mark.parametrize(
    ("offset", "status", "words"),
    [
        (0.003, PASS, "3 processes, at most 0.005 s apart"),
        (-0.4, PASS, "at most 0.402 s apart"),
        (-2.5, WARN, "differ from a's: b: -2.5 s"),
        (3600.0, FAIL, "differ from a's: b: +3.6e+03 s"),
    ],
)
def test_clocks(offset: float, status: str, words: str) -> None:
    processes = [Process("a", 0, 0.001), Process("b", offset, 0.002), Process("c", 0.001, 0.002)]
    clocks, network = check_hosts(processes)
    assert (clocks.name, clocks.status, network.status) == ("clocks", status, PASS)
    assert words in clocks.found


def test_a_slow_comparison_blames_no_clock() -> None:
    assert check_hosts([Process("a", 0, 0), Process("b", 3.0, 2.8)])[0].status == PASS


def test_a_closed_port_is_named() -> None:
    _, network = check_hosts(
        [Process("a", 0, 0), Process("b", 0, 0, ("a (timed out)", "a (timed out)"))]
    )
    assert (network.status, network.found) == (FAIL, "no connection: b to a (timed out)")


class Group:
    """Threads that gather as processes do."""

    def __init__(self, number: int, board: Any) -> None:
        self.process_id, self.board, self.count = number, board, 0

    def gather(self, own: str) -> list[str]:
        texts, barrier = self.board
        texts[self.count, self.process_id] = own
        barrier.wait(30)
        self.count += 1
        return [texts[self.count - 1, number] for number in range(barrier.parties)]


def test_clocks_and_connections_between_processes_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import threading

    real = time.time

    def apart() -> float:  # the second process's clock is an hour ahead
        return real() + (3600 if threading.current_thread().name.endswith("_1") else 0)

    monkeypatch.setattr(host_facts.time, "time", apart)
    monkeypatch.setattr(host_facts.socket, "gethostname", lambda: "localhost")
    board: Any = ({}, threading.Barrier(2))
    with ThreadPoolExecutor(2, thread_name_prefix="clock") as threads:
        waiting = threading.Barrier(2)

        def one(_: int) -> Any:
            waiting.wait(30)
            number = int(threading.current_thread().name.rpartition("_")[2])
            return read_hosts(Group(number, board))  # type: ignore[arg-type]

        both = list(threads.map(one, range(2)))
    assert both[0] == both[1]
    first, second = both[0]
    assert first.offset_s == 0
    assert abs(second.offset_s - 3600) < 5
    assert (first.unreachable, second.unreachable) == ((), ())
    assert check_hosts(both[0])[0].status == FAIL
    assert json.dumps([first.host, second.host]) == '["localhost", "localhost"]'
