"""Threads of uploads."""

import subprocess
import sys
import threading

import pytest

from consyn_jax.remote.daemon_threads import DaemonThreads


def test_tasks_run_in_no_more_threads_than_asked() -> None:
    threads, names = DaemonThreads(2), set()
    both = threading.Barrier(2, timeout=60)

    def task(number: int) -> int:
        names.add(threading.get_ident())
        if number < 2:
            both.wait()
        return number * number

    futures = [threads.submit(task, number) for number in range(5)]
    assert [future.result(60) for future in futures] == [0, 1, 4, 9, 16]
    threads.shutdown()
    assert len(names) == 2


def test_an_error_is_that_of_the_future() -> None:
    threads = DaemonThreads(1)
    with pytest.raises(ZeroDivisionError):
        threads.submit(lambda: 1 / 0).result(60)
    assert threads.submit(int, "7").result(60) == 7
    threads.shutdown()


def test_a_task_that_hangs_does_not_keep_the_process() -> None:
    code = "import threading; from consyn_jax.remote.daemon_threads import DaemonThreads as D; "
    code += "D(1).submit(threading.Event().wait)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
