"""How processes find each other, and how they part: those here are real, and do without JAX."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import pytest

from consyn_jax.config import UserError
from consyn_jax.distributed import meeting
from consyn_jax.distributed.launch import facts, find_cluster, refuse_differences, share_devices
from consyn_jax.distributed.meeting import meet
from consyn_jax.distributed.peers import AGAIN, LOST, Peers
from consyn_jax.resolve import resolve

SCHEDULERS = ("SLURM_", "OMPI_", "KUBERNETES_")


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


# --------------------------------------------------------------------------------------------------------------------- clusters


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No scheduler around."""
    for name in [name for name in os.environ if name.startswith(SCHEDULERS)]:
        monkeypatch.delenv(name)
    return monkeypatch


def found(**flags: Any) -> tuple[tuple[str, int], int, int]:
    return find_cluster(resolve({"model": "haiku", "distributed": True, **flags})[0].hardware)


def test_the_three_flags_say_all(bare: pytest.MonkeyPatch) -> None:
    assert found(coordinator_address="node1:1234", num_processes=4, process_id=3) == (("node1", 1234), 4, 3)
    assert found(coordinator_address="[fe80::1]:1234", num_processes=1, process_id=0) == (("fe80::1", 1234), 1, 0)


def test_slurm_is_found(bare: pytest.MonkeyPatch) -> None:
    values = {"JOB_ID": "65537", "STEP_NODELIST": "node[007-009],other", "NTASKS": "24", "PROCID": "17", "LOCALID": "1"}
    for name, value in values.items():
        bare.setenv(f"SLURM_{name}", value)
    assert found() == (("node007", 61441), 24, 17)


def test_open_mpi_is_found(bare: pytest.MonkeyPatch) -> None:
    values = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
    for name, value in {**values, "OMPI_COMM_WORLD_LOCAL_RANK": "0"}.items():
        bare.setenv(name, value)
    (host, _), count, number = found()
    assert (host, count, number) == ("10.96.0.1", 2, 1)


class _Fails:
    @staticmethod
    def load_incluster_config() -> None:
        raise RuntimeError("Service host/port is not set.")


def test_no_cluster_is_a_sentence(bare: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--distributed finds no Slurm, Open MPI or Kubernetes around this process\. Give --coordinator_address HOST:PORT"):
        found()
    bare.setenv("OMPI_COMM_WORLD_SIZE", "2")  # Open MPI 5
    with pytest.raises(UserError, match=r"give --coordinator_address HOST:PORT --num_processes \$OMPI_COMM_WORLD_SIZE --process_id"):
        found()
    bare.delenv("OMPI_COMM_WORLD_SIZE")
    bare.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    bare.setitem(sys.modules, "kubernetes", None)
    with warnings.catch_warnings(), pytest.raises(UserError, match=r"needs the package kubernetes to ask the cluster"):
        found()
    fake = ModuleType("kubernetes")
    fake.config = _Fails  # type: ignore[attr-defined]
    bare.setitem(sys.modules, "kubernetes", fake)
    with pytest.raises(UserError, match=r"does not get from the cluster which process this is: Service host/port is not set\.\. Give --coord"):
        found()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"process_id": 1}, r"--process_id belongs to --distributed\. Give that, too"),
        ({"distributed": True, "num_processes": 2}, r"--distributed has no --coordinator_address and no --process_id\. Give all three, or none"),
        ({"distributed": True, "coordinator_address": "node1", "num_processes": 2, "process_id": 0}, r"wants HOST:PORT, as in node1:1234, not 'node1'"),
        ({"distributed": True, "coordinator_address": "node1:0", "num_processes": 2, "process_id": 0}, r"wants HOST:PORT"),
        ({"distributed": True, "coordinator_address": "a:²", "num_processes": 2, "process_id": 0}, r"wants HOST:PORT, as in node1:1234, not 'a:²'"),
        ({"distributed": True, "coordinator_address": "a:1", "num_processes": 0, "process_id": 0}, r"--num_processes must be at least 1, not 0"),
        ({"distributed": True, "coordinator_address": "a:1", "num_processes": 2, "process_id": 2}, r"--process_id 2 is not one of 2 processes"),
        ({"distributed": True, "coordinator_address": "a:1", "num_processes": 2, "process_id": -1}, r"--process_id -1 is not one of 2 processes"),
        ({"watchdog_minutes": -1}, r"--watchdog_minutes must not be negative"),
    ],
)
def test_flags_that_cannot_be(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve({"model": "haiku", **flags})


# ---------------------------------------------------------------------------------------------------------------------- sameness


def test_what_differs_is_named_with_its_processes() -> None:
    same = {"--lr": "0.001", "jax": "0.10.2"}
    refuse_differences([same, same])
    told = [same, same | {"--lr": "0.002"}, same, same | {"jax": "0.9.1"}]
    with pytest.raises(UserError) as refused:
        refuse_differences(told)
    assert str(refused.value) == (
        "The processes of this run differ in --lr: 0.001 in processes 0, 2, 3, 0.002 in process 1; "
        "jax: 0.10.2 in processes 0 to 2, 0.9.1 in process 3. Start all with the same command, packages and kind of machine."
    )
    with pytest.raises(UserError, match=r"--a: 1 in process 0, missing in process 1;.* and 2 more\. Start"):
        refuse_differences([{f"--{letter}": "1" for letter in "abcdefg"}, {}])


def test_flags_and_versions_are_compared_and_what_is_each_process_own_is_not() -> None:
    one = facts(resolve({"model": "haiku", "process_id": 0, "num_processes": 2, "coordinator_address": "a:1", "distributed": True, "quiet": True})[0])
    other = facts(resolve({"model": "haiku", "process_id": 1, "num_processes": 2, "coordinator_address": "b:1", "distributed": True, "data": ["x"]})[0])
    assert one == other
    assert {"--lr", "--output", "--save_steps", "jax", "jaxlib", "flax", "Python"} <= set(one)


@pytest.mark.parametrize(
    ("processes", "shares"),
    [
        ([("a", "01234567"), ("b", "01234567")], [None, None]),  # one a host
        ([("a", "01")] * 2 + [("b", "01")] * 2, [[0], [1], [0], [1]]),  # one a GPU
        ([("a", "0123"), ("b", "0123"), ("a", "0123")], [[0, 1], None, [2, 3]]),
        ([("a", "0"), ("a", "1")], [None, None]),  # the scheduler gave each its own
        ([("a", ""), ("a", "")], [None, None]),  # no GPU
    ],
)
def test_processes_of_a_host_share_its_gpus(processes: list[tuple[str, str]], shares: list[Any]) -> None:
    assert share_devices([(host, list(gpus)) for host, gpus in processes]) == shares


def test_more_processes_than_gpus_are_refused() -> None:
    with pytest.raises(UserError, match=r"On a are 3 processes and 2 GPUs, which cannot be shared evenly\. Start one process a GPU, or one a host\."):
        share_devices([("a", ["0", "1"])] * 3)


# ----------------------------------------------------------------------------------------------------------------------- meeting


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "ARRIVE_S", 1.0)


def together(*numbers: int, count: int, port: int | None = None, answer: Any = lambda abouts: abouts) -> list[Any]:
    """What `meet` comes to for processes with these numbers, which are threads here: their `Peers` and the answer, or the sentence."""
    address = ("localhost", port or free_port())

    def one(number: int) -> Any:
        try:
            return meet(address, count, number, f"about {number}", answer, "consyn-train")
        except UserError as refused:
            return str(refused)

    with ThreadPoolExecutor(len(numbers)) as threads:
        return list(threads.map(one, numbers))


@pytest.fixture
def three() -> Iterator[list[Peers]]:
    outcomes = together(1, 0, 2, count=3)
    assert [told for _, told in outcomes] == [["about 0", "about 1", "about 2"]] * 3
    yield [outcomes[1][0], outcomes[0][0], outcomes[2][0]]
    for peers, _ in outcomes:
        peers.leave()
    for peers, _ in outcomes:
        peers.close()


def test_processes_gather_what_each_says_and_hear_notes(three: list[Peers]) -> None:
    with ThreadPoolExecutor(3) as threads:
        for question in range(3):
            assert list(threads.map(lambda peers, asked=question: peers.gather(f"{asked} {peers.process_id}"), three)) == [
                [f"{question} {number}" for number in range(3)]
            ] * 3
    heard = threading.Event()
    three[2].note("SIGTERM")
    while not all(peers.noted == "SIGTERM" for peers in three):
        heard.wait(0.01)
    assert [peers.names[2] for peers in three] == [f"process 2 (pid {os.getpid()} on {socket.gethostname()})"] * 3


def test_a_stranger_at_the_door_is_not_let_in() -> None:
    port = free_port()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(lambda: together(0, count=2, port=port)[0])
        with ExitStack() as stack:
            for greeting in (b"GET / HTTP/1.1\r\n\r\n", b'["hello", {"process_id": "1"}]\n', b"[" * 100_000 + b"\n"):
                while True:
                    try:
                        stranger = stack.enter_context(socket.create_connection(("localhost", port), timeout=5))
                        break
                    except ConnectionRefusedError:
                        continue
                stranger.sendall(greeting)
            (guest, _), (host, told) = together(1, count=2, port=port)[0], waiting.result()
    assert told == ["about 0", "about 1"]
    for peers in (host, guest):
        peers.leave()
    for peers in (host, guest):
        peers.close()


def test_who_is_missing_is_said_to_all_who_came(hurried: None) -> None:
    words = "Of 4 processes, processes 1, 3 did not come to localhost:"
    assert all(outcome.startswith(words) for outcome in together(0, 2, count=4))


def test_a_number_that_is_given_twice(hurried: None) -> None:
    name = f"process 1 (pid {os.getpid()} on {socket.gethostname()})"
    assert together(0, 1, 1, count=3) == [f"--process_id 1 was given to 2: {name} and {name}. Give each process its own."] * 3
    outcomes = together(0, 0, count=2)
    assert sum("another process listens there: a second one with --process_id 0, or another run" in outcome for outcome in outcomes) == 1


def test_different_numbers_of_processes(hurried: None) -> None:
    port = free_port()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(together, 0, count=2, port=port)
        second = threads.submit(together, 2, count=3, port=port)
        assert first.result() == second.result()
    assert "was told of 3 processes, and process 0 of 2. Give all the same --num_processes." in first.result()[0]


def test_a_refusal_is_said_to_all() -> None:
    def refuse(abouts: list[Any]) -> Any:
        raise UserError("They differ.")

    assert together(0, 1, 2, count=3, answer=refuse) == ["They differ."] * 3


def test_nobody_at_the_address(hurried: None) -> None:
    outcomes = together(1, count=2)
    assert "Process 0 does not answer at --coordinator_address localhost:" in outcomes[0]
    assert "Connection refused, for 1 s. Check the address, that process 0 runs there, and that no firewall is between." in outcomes[0]
    with socket.create_server(("", 0)) as other, ThreadPoolExecutor(1) as threads:

        def greet() -> None:
            with other.accept()[0] as guest:
                guest.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        threads.submit(greet)
        assert "is not process 0 of this run. Give a port that is free there." in together(1, count=2, port=other.getsockname()[1])[0]


# ------------------------------------------------------------------------------------------------------------------------- ends

PROCESS = """
import os, signal, sys, time
import consyn_jax.distributed.peers as p
from consyn_jax.distributed.meeting import meet
port, count, number, deed = *map(int, sys.argv[1:4]), sys.argv[4]
p.BEAT_S, p.LOST_S = 0.2, 1.5
peers, _ = meet(("localhost", port), count, number, None, lambda abouts: None, "consyn-train")
peers.describe = lambda everyone: f"behind: {everyone}"
alone = lambda: number == 0 and any(line.closed for line in peers._lines.values())
peers.before_end = lambda stuck: print(("stuck, alone" if alone() else "stuck") if stuck else "ended", flush=True)
peers.progress = {"step": number}
peers.gather("")
time.sleep(0.5)
match deed:
    case "die": os.kill(os.getpid(), signal.SIGKILL)
    case "freeze": os.kill(os.getpid(), signal.SIGSTOP)
    case "fail":
        peers.fail(2, "--data x is not there.")
        os._exit(2)
    case "stick": peers.stuck()
time.sleep(20)
"""


def ends(deed: str, by: int, count: int = 3) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each process when one of them does that."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(port), str(count), str(number), deed if number == by else "wait"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    outcomes: list[Any] = [None] * count
    for number in sorted(range(count), key=lambda number: number == by):
        if number == by and deed == "freeze":
            processes[number].send_signal(signal.SIGKILL)
        said = processes[number].communicate(timeout=30)
        outcomes[number] = (processes[number].returncode, said[0], said[1].replace(f"pid {processes[by].pid} on {socket.gethostname()}", "PID"))
    return outcomes


@pytest.mark.parametrize("by", [0, 1])
@pytest.mark.parametrize(
    ("deed", "words"),
    [("die", "is gone"), ("freeze", "has given no sign of life for 2 s")],
)
def test_a_dead_or_frozen_process_ends_the_others_and_is_named(deed: str, words: str, by: int) -> None:
    outcomes = ends(deed, by)
    for number, (code, said, complained) in enumerate(outcomes):
        if number != by:
            assert (code, said, complained) == (LOST, "ended\n", f"\nconsyn-train: process {by} (PID) {words}, so the run ends. {AGAIN}\n")


@pytest.mark.parametrize("by", [0, 1])
def test_the_mistake_of_one_process_is_said_by_all(by: int) -> None:
    outcomes = ends("fail", by)
    for number, (code, _, complained) in enumerate(outcomes):
        assert (code, complained) == (2, "" if number == by else f"\nconsyn-train: process {by} (PID): --data x is not there.\n")


@pytest.mark.parametrize("by", [0, 2])
def test_where_nothing_moves_all_end_and_say_the_same(by: int) -> None:
    outcomes = ends("stick", by)
    everyone = json.dumps([{"step": number} for number in range(3)]).replace('"', "'")
    assert outcomes == [(LOST, "stuck\n", f"\nconsyn-train: behind: {everyone}\n")] * 3
