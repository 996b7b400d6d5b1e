"""Joining processes into one run: the cluster, what may differ between them, and their GPUs."""

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType, ModuleType
from typing import Any

import pytest
from threads import together

from consyn_jax import errors
from consyn_jax.distributed import launch
from consyn_jax.distributed.cluster import Place, find_cluster
from consyn_jax.distributed.launch import facts, refuse_differences, runtime, share_devices
from consyn_jax.distributed.process_group import CONTINUE_ADVICE, LOST, ProcessGroup
from consyn_jax.errors import Interrupted, Unsaved, UserError, settled
from consyn_jax.resolve import resolve

SCHEDULERS = ("SLURM_", "OMPI_", "KUBERNETES_")


def process(address: str, count: int, number: int) -> dict[str, Any]:
    """The three flags."""
    where = {"coordinator_address": address, "num_processes": count, "process_id": number}
    return {"distributed": True, **where}


# -------------------------------------------------------------------------------------- the cluster


@pytest.fixture
def no_scheduler(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [name for name in os.environ if name.startswith(SCHEDULERS)]:
        monkeypatch.delenv(name)
    return monkeypatch


def found(flags: dict[str, Any] | None = None) -> Place:
    given = flags or {"distributed": True}
    return find_cluster(resolve({"model": "haiku", **given})[0].hardware)


def test_the_three_flags_suffice(no_scheduler: pytest.MonkeyPatch) -> None:
    assert found(process("node1:1234", 4, 3)) == Place(("node1", 1234), 4, 3)
    assert found(process("[fe80::1]:1234", 1, 0)) == Place(("fe80::1", 1234), 1, 0)


def test_slurm_is_found(no_scheduler: pytest.MonkeyPatch) -> None:
    values = {
        "JOB_ID": "65537",
        "STEP_NODELIST": "node[007-009],other",
        "NTASKS": "24",
        "PROCID": "17",
        "LOCALID": "1",
    }
    for name, value in values.items():
        no_scheduler.setenv(f"SLURM_{name}", value)
    assert found() == Place(("node007", 61441), 24, 17)


def test_steps_of_a_slurm_job_have_their_own_ports_and_names(
    no_scheduler: pytest.MonkeyPatch,
) -> None:
    """Steps may run at the same time, and a requeued job has the number of the first start."""
    values = {"STEP_NODELIST": "node7", "NTASKS": "2", "PROCID": "1", "LOCALID": "1"}
    for name, value in values.items():
        no_scheduler.setenv(f"SLURM_{name}", value)
    places = {}
    for job, step, restarts in ((4096, 0, ""), (4096, 1, ""), (4097, 0, ""), (4096, 0, "2")):
        no_scheduler.setenv("SLURM_JOB_ID", str(job))
        no_scheduler.setenv("SLURM_STEP_ID", str(step))
        if restarts:
            no_scheduler.setenv("SLURM_RESTART_COUNT", restarts)
        places[job, step, restarts] = found()
    assert places[4096, 0, ""] == (("node7", 61440), 2, 1, "step 0 of Slurm job 4096, restart 0")
    assert {where: place.address[1] for where, place in places.items()} == {
        (4096, 0, ""): 61440,
        (4096, 1, ""): 61697,
        (4097, 0, ""): 61441,
        (4096, 0, "2"): 61440,
    }
    assert len({place.start for place in places.values()}) == 4
    assert found(process("node1:1234", 4, 3)).start == "", "who gives the flags may mix launchers"


def test_open_mpi_is_found(no_scheduler: pytest.MonkeyPatch) -> None:
    values = {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    }
    for name, value in values.items():
        no_scheduler.setenv(name, value)
    no_scheduler.setenv("SLURM_STEP_ID", "0")  # of the daemons, on some hosts only
    (host, _), count, number, start = found()
    assert (host, count, number, start) == ("10.96.0.1", 2, 1, "")


class _Fails:
    @staticmethod
    def load_incluster_config() -> None:
        raise RuntimeError("Service host/port is not set.")


def test_no_cluster_is_one_sentence(no_scheduler: pytest.MonkeyPatch) -> None:
    words = (
        r"--distributed does not find Slurm, Open MPI or Kubernetes\. "
        r"Give --coordinator_address HOST:PORT"
    )
    with pytest.raises(UserError, match=words):
        found()
    no_scheduler.setenv("OMPI_COMM_WORLD_SIZE", "2")  # Open MPI 5
    words = (
        r"give --coordinator_address HOST:PORT --num_processes \$OMPI_COMM_WORLD_SIZE --process_id"
    )
    with pytest.raises(UserError, match=words):
        found()
    no_scheduler.delenv("OMPI_COMM_WORLD_SIZE")
    no_scheduler.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    no_scheduler.setitem(sys.modules, "kubernetes", None)
    words = "needs the package kubernetes to ask the cluster"
    with warnings.catch_warnings(), pytest.raises(UserError, match=words):
        found()
    fake = ModuleType("kubernetes")
    fake.config = _Fails  # type: ignore[attr-defined]
    no_scheduler.setitem(sys.modules, "kubernetes", fake)
    words = (
        r"cannot learn from the cluster which process this is: Service host/port is not set\. "
        r"Give --coord"
    )
    with pytest.raises(UserError, match=words):
        found()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"process_id": 1}, r"--process_id needs --distributed\. Add --distributed"),
        (
            {"distributed": True, "num_processes": 2},
            r"^--coordinator_address and --process_id are missing\. Give all of --coordinator_address, ",
        ),
        (process("node1", 2, 0), r"must be HOST:PORT, as in node1:1234, not 'node1'"),
        (process("node1:0", 2, 0), r"must be HOST:PORT"),
        (process("a:²", 2, 0), r"must be HOST:PORT, as in node1:1234, not 'a:²'"),
        (process("a:1", 0, 0), r"--num_processes must be at least 1, not 0"),
        (process("a:1", 2, 2), r"--process_id 2 is out of range for --num_processes 2"),
        (process("a:1", 2, -1), r"--process_id -1 is out of range for --num_processes 2"),
        ({"watchdog_minutes": -1}, r"--watchdog_minutes must not be negative"),
        ({"rendezvous_seconds": 0.0}, r"must be from 1 to 86400 \(a day\), but is 0\.0\."),
        ({"rendezvous_seconds": 1e6}, r"--rendezvous_seconds must be from 1 to"),
    ],
)
def test_impossible_flags_are_refused(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve({"model": "haiku", **flags})


# -------------------------------------------------------------------------------------- differences


def test_differences_are_named_with_their_processes() -> None:
    same = {"--lr": "0.001", "jax": "0.10.2"}
    refuse_differences([same, same])
    processes = [same, same | {"--lr": "0.002"}, same, same | {"jax": "0.9.1"}]
    with pytest.raises(UserError) as refused:
        refuse_differences(processes)
    assert str(refused.value) == (
        "The processes of this run differ in --lr: 0.001 in processes 0, 2, 3, 0.002 in process 1; "
        "jax: 0.10.2 in processes 0 to 2, 0.9.1 in process 3. "
        "Start all with one command, the same packages and one kind of machine."
    )
    words = r"--a: 1 in process 0, missing in process 1;.* and 2 more\. Start"
    with pytest.raises(UserError, match=words):
        refuse_differences([{f"--{letter}": "1" for letter in "abcdefg"}, {}])


def test_flags_and_versions_are_compared_except_those_that_may_differ() -> None:
    one, other = (
        facts(resolve({"model": "haiku", **flags})[0])
        for flags in (
            process("a:1", 2, 0) | {"quiet": True},
            process("b:1", 2, 1) | {"data": ["x"]},
        )
    )
    assert one == other
    assert {"--lr", "--output", "--save_steps", "jax", "jaxlib", "flax", "Python"} <= set(one)


# ------------------------------------------------------------------------------------------ devices


@pytest.mark.parametrize(
    ("processes", "shares"),
    [
        ([("a", "01234567"), ("b", "01234567")], [None, None]),  # one per host
        ([("a", "01")] * 2 + [("b", "01")] * 2, [[0], [1], [0], [1]]),  # one per GPU
        ([("a", "0123"), ("b", "0123"), ("a", "0123")], [[0, 1], None, [2, 3]]),
        ([("a", "0"), ("a", "1")], [None, None]),  # shared out by the scheduler
        ([("a", ""), ("a", "")], [None, None]),  # no GPU
    ],
)
def test_processes_of_a_host_share_its_gpus(
    processes: list[tuple[str, str]], shares: list[Any]
) -> None:
    assert share_devices([(host, list(gpus)) for host, gpus in processes]) == shares


def test_more_processes_than_gpus_are_refused() -> None:
    words = (
        r"^a has 3 processes and 2 GPUs, which cannot be shared evenly\. "
        r"Start one process per GPU, or one per host\."
    )
    with pytest.raises(UserError, match=words):
        share_devices([("a", ["0", "1"])] * 3)


# ---------------------------------------------------------------------------------------- the end


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> list[ProcessGroup]:
    """Two processes as threads; the main thread is process 1."""
    groups = sorted((group for group, _ in together(0, 1, count=2)), key=lambda g: g.process_id)

    def meet(place: Place, *more: object) -> tuple[ProcessGroup, dict[str, Any]]:
        is_main = threading.current_thread() is threading.main_thread()
        return groups[1 if is_main else 0], {"port": 1, "devices": [None, None]}

    monkeypatch.setattr(launch, "meet", meet)
    monkeypatch.setattr(launch, "_initialize", lambda *more: None)
    monkeypatch.setattr(launch, "_devices", lambda: "1 x cpu")
    monkeypatch.setattr(launch.jax.distributed, "shutdown", lambda: None)
    return groups


@pytest.fixture
def dropped() -> Iterator[list[int]]:
    """Signals that no code has settled. All are raised as commands raise SIGTERM."""
    found: list[int] = []

    def come(number: int, frame: FrameType | None) -> None:
        raise Unsaved(number, found.append)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, come) for number in numbers}
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)


def main_is_in(function: str) -> bool:
    """Wait until the main thread is in a function; False if this takes too long."""
    names, until = set[str](), time.monotonic() + 60
    while function not in names and time.monotonic() < until:
        time.sleep(0.01)
        frame, names = sys._current_frames()[threading.main_thread().ident or 0], set()
        while frame is not None:
            names.add(frame.f_code.co_name)
            frame = frame.f_back
    return function in names


@pytest.mark.parametrize("said", ["", "SIGUSR1: the run is complete, and no longer waits."])
def test_a_signal_while_process_0_still_uploads_does_not_say_that_nothing_is_saved(
    said: str, two: list[ProcessGroup], dropped: list[int]
) -> None:
    """All processes end as process 0 does. SIGUSR1 comes twice, and ends no wait."""
    run = resolve({"model": "haiku", **process("localhost:1", 2, 1)})[0]
    main = threading.main_thread().ident or 0
    waits: list[bool] = []

    def upload() -> None:
        with runtime(run):
            for _ in range(2):
                waits.append(main_is_in("result"))
                if waits[-1]:
                    signal.pthread_kill(main, signal.SIGUSR1)
                time.sleep(0.1)
            if said:
                raise Interrupted(said)

    def wait() -> str:
        try:
            with runtime(run):
                return ""
        except Interrupted as ended:
            return str(ended)
        except Unsaved as stopped:
            return f"not saved: {settled(stopped)}"

    with ThreadPoolExecutor(1) as threads:
        uploads = threads.submit(upload)
        assert wait() == (f"{two[0].names[0]}: {said}" if said else "")
        assert str(uploads.exception() or "") == said
    assert waits == [True, True], "a signal was not sent"
    assert dropped == []


class Uploading:
    """The processes of a run as process 1 sees them: process 0 uploads until process 1 fails."""

    process_id, names = 1, ["process 0 (pid 7 on node1)", "process 1 (pid 8 on node1)"]

    def __init__(self) -> None:
        self.failed: list[tuple[int, str]] = []
        self.is_over = threading.Event()

    def gather(self, own: str) -> list[str]:
        self.is_over.wait(60)
        self.is_over.set()
        return ["", own]

    def leave(self) -> None: ...

    def close(self) -> None: ...

    def fail(self, code: int, sentence: str) -> None:
        self.failed.append((code, sentence))
        raise Unsaved(signal.SIGTERM)  # a third signal


def test_a_second_signal_while_process_0_uploads_ends_all_processes(
    dropped: list[int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """SIGUSR1 and repeats of the first signal do not count as the second."""
    main, now = threading.main_thread().ident or 0, [0.0]
    group: Any = Uploading()
    waits: list[bool] = []
    received: list[str] = []

    def settle(stopped: KeyboardInterrupt) -> str:
        name = settled(stopped)
        received.append(name)  # the main thread is in `_shut_down`, and not yet in `result` again
        return name

    def end(code: int) -> None:
        group.is_over.set()
        sys.exit(code)

    def send() -> None:
        for number, at_s in (("USR1", 0), ("INT", 10), ("TERM", 11), ("USR1", 13), ("TERM", 14)):
            waits.append(main_is_in("result"))
            now[0], count = at_s, len(received) + 1
            if waits[-1]:
                signal.pthread_kill(main, signal.Signals[f"SIG{number}"])
            while len(received) < count and not group.is_over.is_set():
                time.sleep(0.01)

    monkeypatch.setattr(errors, "monotonic", lambda: now[0])
    monkeypatch.setattr(launch, "settled", settle)
    monkeypatch.setattr(launch, "_end_at_once", end)
    monkeypatch.setattr(launch, "set_current_process_group", lambda none: None)
    monkeypatch.setattr(launch.jax.distributed, "shutdown", lambda: None)
    with ThreadPoolExecutor(1) as threads:
        sent = threads.submit(send)
        with pytest.raises(SystemExit) as ended:
            launch._shut_down(group)
        sent.result()
    assert waits == [True] * 5
    assert ended.value.code == 143
    assert group.failed == [
        (
            LOST,
            "A second signal (SIGTERM) ended this process before the end of the run. "
            f"{CONTINUE_ADVICE}",
        )
    ]
    said = [line for line in capfd.readouterr().err.splitlines() if line]
    assert said == [
        f"{name}: this process has finished, and waits for process 0 (pid 7 on node1), which may "
        "still upload files. A second SIGINT or SIGTERM, at least 2 seconds after the first, ends "
        "all processes at once."
        for name in ("SIGUSR1", "SIGINT", "SIGUSR1")
    ]
    assert dropped == []
