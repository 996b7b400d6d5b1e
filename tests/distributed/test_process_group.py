"""A group of processes without JAX: gathering, notes, and how one ends the others."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from free_ports import free_port
from threads import close, together

from consyn_jax.distributed.process_group import CONTINUE_ADVICE, LOST, ProcessGroup


@pytest.fixture
def three() -> Iterator[list[ProcessGroup]]:
    outcomes = together(1, 0, 2, count=3)
    assert [answer for _, answer in outcomes] == [["about 0", "about 1", "about 2"]] * 3
    groups = [group for group, _ in outcomes]
    yield sorted(groups, key=lambda group: group.process_id)
    close(groups)


def test_processes_gather_texts_and_receive_notes(three: list[ProcessGroup]) -> None:
    with ThreadPoolExecutor(3) as threads:
        for number in range(3):
            texts = [f"{number} {group.process_id}" for group in three]
            assert list(threads.map(ProcessGroup.gather, three, texts)) == [texts] * 3
    three[2].note("SIGTERM")
    while not all(group.noted == "SIGTERM" for group in three):
        time.sleep(0.01)
    name = f"process 2 (pid {os.getpid()} on {socket.gethostname()})"
    assert [group.names[2] for group in three] == [name] * 3


PROCESS = """
import os, signal, sys, time
import consyn_jax.distributed.process_group as p
from consyn_jax.errors import leave_out_overwrite
from consyn_jax.distributed.cluster import Place
from consyn_jax.distributed.rendezvous import meet
port, count, number, deed = *map(int, sys.argv[1:4]), sys.argv[4]
p.BEAT_S, p.LOST_S = 0.2, 4.0
group, _ = meet(Place(("localhost", port), count, number), 120.0, None, lambda abouts: None, "consyn-train")
group.describe = lambda everyone: f"late: {everyone}"
def before_end(stuck):
    alone = number == 0 and any(each.closed for each in group._connections.values())
    print(("stuck, alone" if alone else "stuck") if stuck else "ended", flush=True)
group.before_end = before_end
group.progress = {"step": number}
if sys.argv[5] == "overwritten": leave_out_overwrite()
group.gather("")
time.sleep(0.5)
match deed:
    case "die": os.kill(os.getpid(), signal.SIGKILL)
    case "freeze": os.kill(os.getpid(), signal.SIGSTOP)
    case "fail":
        group.fail(2, "--data x is not there.")
        os._exit(2)
    case "stick": group.stuck()
time.sleep(240)
"""


def outcomes(deed: str, by: int, count: int = 3, run: str = "") -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each process when process `by` does the deed.

    `run` is "overwritten" if --overwrite has deleted an old run.
    """
    command = [sys.executable, "-c", PROCESS, str(free_port()), str(count)]
    processes = [
        subprocess.Popen(
            [*command, str(number), deed if number == by else "wait", run],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    found: list[Any] = [None] * count
    for number in sorted(range(count), key=lambda number: number == by):
        if number == by and deed == "freeze":
            processes[number].send_signal(signal.SIGKILL)
        out, err = processes[number].communicate(timeout=240)
        err = err.replace(f"pid {processes[by].pid} on {socket.gethostname()}", "PID")
        # The limit, or more beside load.
        err = re.sub(r"(?<=no heartbeat for )([4-9]|\d\d+) s", "N s", err)
        found[number] = (processes[number].returncode, out, err)
    return found


@pytest.mark.parametrize("by", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("deed", "words", "run"),
    [("die", "is gone", ""), ("freeze", "has sent no heartbeat for N s", "overwritten")],
)
def test_a_dead_or_frozen_process_ends_the_others_and_is_named(
    deed: str, words: str, run: str, by: int
) -> None:
    """The advice leaves out --overwrite only if it would delete the new run."""
    advice = CONTINUE_ADVICE
    if run:
        advice = advice.replace("command", "command without --overwrite")
    message = f"\nconsyn-train: process {by} (PID) {words}, so the run ends. {advice}\n"
    for number, outcome in enumerate(outcomes(deed, by, run=run)):
        assert number == by or outcome == (LOST, "ended\n", message)


@pytest.mark.parametrize("by", [0, 1])
def test_all_processes_report_the_mistake_of_one(by: int) -> None:
    message = f"\nconsyn-train: process {by} (PID): --data x is not there.\n"
    for number, (code, _, err) in enumerate(outcomes("fail", by)):
        assert (code, err) == (2, "" if number == by else message)


@pytest.mark.parametrize("by", [0, 2])
def test_a_stuck_run_ends_with_the_same_message_everywhere(by: int) -> None:
    everyone = [{"step": number} for number in range(3)]
    assert outcomes("stick", by) == [(LOST, "stuck\n", f"\nconsyn-train: late: {everyone}\n")] * 3
