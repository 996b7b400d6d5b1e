"""One writer for each run directory, on file systems with and without locks."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from consyn_jax.errors import UserError
from consyn_jax.training.run import lock as module
from consyn_jax.training.run.lock import LOCK, RunLock, check_free, is_held, read_holder

HOLD = """
import sys, time
from pathlib import Path
from consyn_jax.training.run.lock import RunLock
RunLock(Path(sys.argv[1]))
print(flush=True)
time.sleep(600)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds `tmp_path`."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_a_second_process_is_refused_and_the_holder_is_named(
    other: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    since = json.loads(read_holder(tmp_path))["since"]
    who = f"pid {other.pid} on {socket.gethostname()}, since {since}"
    words = (
        f"--output {tmp_path} is in use by another process: {who}. Wait for that process, or name "
        "another directory."
    )
    for attempt in (RunLock, check_free):
        with pytest.raises(UserError) as refused:
            attempt(tmp_path)
        assert str(refused.value) == words


def test_the_lock_of_a_killed_process_is_taken_over(
    other: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    check_free(tmp_path)
    lock = RunLock(tmp_path)
    assert json.loads(read_holder(tmp_path))["pid"] == os.getpid()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_only_checks_is_not_in_the_way(tmp_path: Path) -> None:
    check_free(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / LOCK).touch()
    looks = os.open(tmp_path / LOCK, os.O_RDWR)
    fcntl.flock(looks, fcntl.LOCK_SH)
    check_free(tmp_path)
    threading.Timer(0.15, os.close, [looks]).start()
    RunLock(tmp_path).release()


@pytest.mark.parametrize("content", ["", "{", "[" * 3000, "[1]", '{"pid": "x"}', "\udcff"])
def test_a_file_that_names_no_process_is_taken_over(content: str, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_bytes(content.encode(errors="surrogateescape"))
    RunLock(tmp_path).release()
    descriptor = os.open(tmp_path / LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(UserError, match=r"is in use by another process\. Wait for that process"):
        RunLock(tmp_path)
    os.close(descriptor)


def test_other_errors_of_locking_are_raised(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fcntl, "flock", _refusing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        RunLock(tmp_path)


# ----------------------------------------------------------------------- file systems without locks


def _refusing(number: int) -> Callable[..., None]:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", _refusing(errno.ENOLCK))
    for name, value in {"SETTLE_S": 0.05, "WATCH_S": 0.6, "BEAT_S": 0.1}.items():
        monkeypatch.setattr(module, name, value)


def hold(path: Path, **changes: Any) -> None:
    """The file as another process left it."""
    (path / LOCK).write_text(
        json.dumps(
            {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": "then",
                "born": module._start_time(os.getpid()),
            }
            | changes
        )
    )


def test_a_living_process_of_this_host_holds_it(without_locks: None, tmp_path: Path) -> None:
    hold(tmp_path)
    check_free(tmp_path)
    with pytest.raises(
        UserError,
        match=rf"another process: pid {os.getpid()} on {socket.gethostname()}, since then",
    ):
        RunLock(tmp_path)


def test_a_dead_process_or_a_later_one_with_its_pid_does_not(
    without_locks: None, tmp_path: Path
) -> None:
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert module._start_time(process.pid) is None, "a zombie"
        hold(tmp_path, pid=process.pid, born="x")
        RunLock(tmp_path).release()
    hold(tmp_path, pid="x")
    RunLock(tmp_path).release()
    hold(tmp_path, born="another boot 17")
    lock = RunLock(tmp_path)
    assert read_holder(tmp_path) == lock.holder
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_process_of_another_host_holds_it_as_long_as_it_touches_the_file(
    without_locks: None, tmp_path: Path
) -> None:
    hold(tmp_path, host="elsewhere")
    RunLock(tmp_path).release()
    mine = RunLock(tmp_path)
    mine.holder = json.dumps({"pid": 1, "host": "elsewhere", "since": "then"})
    (tmp_path / LOCK).write_text(mine.holder)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.02):
            mine.beat()

    with ThreadPoolExecutor(1) as threads:
        threads.submit(beat)
        try:
            with pytest.raises(UserError, match="pid 1 on elsewhere, since then"):
                RunLock(tmp_path)
        finally:
            stop.set()


TAKE = """
import errno, fcntl, sys
from pathlib import Path
from consyn_jax.training.run.lock import RunLock, UserError
def flock(*_): raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = flock
try:
    RunLock(Path(sys.argv[1]))
    print("has it", flush=True)
except UserError as refused:
    print(str(refused).partition(":")[0], flush=True)
sys.stdin.read()
"""


def test_of_two_processes_that_take_it_at_once_one_has_it(tmp_path: Path) -> None:
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TAKE, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.stdout.readline().strip() for process in both if process.stdout]
    for process in both:  # they hold it until both have tried
        process.communicate(timeout=240)
    assert sorted(outputs) == [f"--output {tmp_path} is in use by another process", "has it"]


def test_a_lock_that_cannot_be_read_has_no_holder(tmp_path: Path) -> None:
    assert read_holder(tmp_path) == ""
    (tmp_path / LOCK).write_bytes(b'{"pid": 7, "host": "\xff"}')
    assert read_holder(tmp_path) == ""


def test_whether_a_directory_is_held_is_known_without_writing(tmp_path: Path) -> None:
    assert not is_held(tmp_path)
    lock = RunLock(tmp_path)
    assert is_held(tmp_path)
    content = (tmp_path / LOCK).read_bytes()
    lock.release()
    (tmp_path / LOCK).write_bytes(content)
    assert not is_held(tmp_path), "the file alone is no lock"
    reader = os.open(tmp_path / LOCK, os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_SH)
    assert not is_held(tmp_path), "a process that looks has no lock"
    os.close(reader)
    assert (tmp_path / LOCK).read_bytes() == content


def test_without_locks_the_holder_decides(without_locks: None, tmp_path: Path) -> None:
    hold(tmp_path)
    assert is_held(tmp_path)
    hold(tmp_path, born="another boot 17")
    assert not is_held(tmp_path)
    (tmp_path / LOCK).write_text("")
    assert not is_held(tmp_path)


def test_a_lock_that_may_not_be_opened_is_reported_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(module, "open_regular", refuse)
    check_free(tmp_path)


def test_the_name_of_a_process_may_look_like_its_state() -> None:
    own, before = Path("/proc/self/comm"), module._start_time(os.getpid())
    name = own.read_text()
    try:
        own.write_text("a) Z 1 2")
        assert module._start_time(os.getpid()) == before
    finally:
        own.write_text(name)
