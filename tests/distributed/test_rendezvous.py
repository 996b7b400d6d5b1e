"""The rendezvous, between threads: who is let in, and what is reported of wrong launches."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from free_ports import free_port
from threads import close, together

from consyn_jax.errors import UserError

SHORT = 1.0


def test_strangers_are_not_let_in() -> None:
    port = free_port()
    greetings = (
        b"GET / HTTP/1.1\r\n\r\n",
        b'["hello", {"process_id": "1"}]\n',
        b"[" * 100_000 + b"\n",
    )
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(lambda: together(0, count=2, port=port)[0])
        with ExitStack() as stack:
            for greeting in greetings:
                stack.enter_context(connection(port)).sendall(greeting)
            (guest, _), (host, answer) = together(1, count=2, port=port)[0], waiting.result()
    assert answer == ["about 0", "about 1"]
    close([host, guest])


def connection(port: int) -> socket.socket:
    """A connection to the port, once someone listens there."""
    while True:
        try:
            return socket.create_connection(("localhost", port), timeout=5)
        except ConnectionRefusedError:
            continue


def test_all_who_came_learn_who_is_missing() -> None:
    words = "Of 4 processes, processes 1, 3 did not connect to localhost:"
    assert all(outcome.startswith(words) for outcome in together(0, 2, count=4, arrive_s=SHORT))


def test_a_number_that_is_given_twice() -> None:
    name = f"process 1 (pid {os.getpid()} on {socket.gethostname()})"
    words = (
        f"--process_id 1 was given to 2 processes: {name} and {name}. Give each process its own."
    )
    assert together(0, 1, 1, count=3, arrive_s=SHORT) == [words] * 3
    words = "another process listens there: a second one with --process_id 0, or another run"
    assert sum(words in outcome for outcome in together(0, 0, count=2, arrive_s=SHORT)) == 1


def test_different_numbers_of_processes() -> None:
    port = free_port()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(together, 0, count=2, port=port, arrive_s=SHORT)
        second = threads.submit(together, 2, count=3, port=port, arrive_s=SHORT)
        assert first.result() == second.result()
    words = (
        "has --num_processes 3, but process 0 has 2. Give all processes the same --num_processes."
    )
    assert words in first.result()[0]


def test_all_processes_get_the_same_refusal() -> None:
    def refuse(abouts: list[Any]) -> Any:
        raise UserError("They differ.")

    assert together(0, 1, 2, count=3, answer=refuse) == ["They differ."] * 3


def test_nobody_at_the_address() -> None:
    (outcome,) = together(1, count=2, arrive_s=SHORT)
    assert "Process 0 does not answer at --coordinator_address localhost:" in outcome
    assert (
        "within 1 s (Connection refused). Check the address, that process 0 runs there, "
        "and that no firewall blocks the port."
    ) in outcome


def test_another_program_at_the_address() -> None:
    with socket.create_server(("", 0)) as other, ThreadPoolExecutor(1) as threads:

        def greet() -> None:
            with other.accept()[0] as guest:
                guest.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        threads.submit(greet)
        port = other.getsockname()[1]
        (outcome,) = together(1, count=2, port=port, arrive_s=SHORT)
    assert outcome == (
        f"A program other than process 0 of this run answers at --coordinator_address "
        f"localhost:{port}. Give a port that is free on that host."
    )


def test_two_starts_at_one_port_do_not_join() -> None:
    """As of two steps of one Slurm job: the guest of the other learns whom it found."""
    port = free_port()
    with ThreadPoolExecutor(1) as threads:
        step_0 = "step 0 of Slurm job 17, restart 1"
        waiting = threads.submit(lambda: together(0, count=2, port=port, start=step_0)[0])
        connection(port).close()
        (stranger,) = together(1, count=2, port=port, start="step 1 of Slurm job 17, restart 1")
        assert stranger == (
            f"At --coordinator_address localhost:{port}, process 0 (pid {os.getpid()} on "
            f"{socket.gethostname()}) of step 0 of Slurm job 17, restart 1 answers, but this "
            "process belongs to step 1 of Slurm job 17, restart 1. Give one of the two launches "
            "another port."
        )
        (by_hand,) = together(1, count=2, port=port)
        assert "but this process belongs to a launch without a scheduler." in by_hand
        (guest, _), (host, _) = (together(1, count=2, port=port, start=step_0)[0], waiting.result())
    close([host, guest])
