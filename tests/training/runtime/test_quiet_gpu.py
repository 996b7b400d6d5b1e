"""Nothing disturbs the timing of kernels, as far as this process can tell."""

import os
import sys
import types
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import jax
import pytest

from consyn_jax.training.runtime import quiet_gpu
from consyn_jax.training.runtime.kernel_choices import KERNELS
from consyn_jax.training.runtime.quiet_gpu import other_processes, tune_alone


class NVMLError(Exception):
    """As in pynvml."""


@pytest.fixture
def users(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Processes on each GPU, as a driver tells them; a GPU that is not in here cannot be asked."""
    found = {"GPU-0": [os.getpid()], "GPU-1": [os.getpid()]}
    module: Any = types.ModuleType("pynvml")

    def running(gpu: str) -> list[types.SimpleNamespace]:
        if gpu not in found:
            raise NVMLError("not supported")
        return [types.SimpleNamespace(pid=pid) for pid in found[gpu]]

    module.NVMLError = NVMLError
    module.nvmlInit = module.nvmlShutdown = lambda: None
    module.nvmlDeviceGetHandleByUUID = lambda gpu: gpu
    module.nvmlDeviceGetComputeRunningProcesses = running
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(quiet_gpu, "visible_gpus", lambda: list(found))
    return found


@pytest.mark.parametrize(
    ("on_gpus", "others"),
    [
        ({"GPU-0": [os.getpid()], "GPU-1": [os.getpid(), 7, 5]}, [5, 7]),
        ({"GPU-0": [os.getpid()], "GPU-1": [os.getpid()]}, []),
        ({"GPU-0": [5], "GPU-1": [7]}, []),  # ids of the host: one of them may be this process
    ],
)
def test_other_processes_are_found_where_this_one_is(
    users: dict[str, list[int]], on_gpus: dict[str, list[int]], others: list[int]
) -> None:
    users.update(on_gpus)
    assert other_processes(["GPU-0", "GPU-1"]) == others


def test_nothing_is_known_of_a_gpu_that_cannot_be_asked(users: dict[str, list[int]]) -> None:
    users["GPU-0"].append(5)
    assert other_processes(["GPU-0", "GPU-9"]) == []


def run(directory: Path) -> tuple[bool, list[str]]:
    """Whether the compiler had ended when `tune_alone` came back, and what it warned of."""
    said: list[str] = []
    may_end = Event()
    with ThreadPoolExecutor(2) as pool:
        compiling: Future[Any] = pool.submit(may_end.wait)
        waiting = pool.submit(tune_alone, compiling, directory, said.append)
        came_back = not wait_a_little(waiting)
        may_end.set()
        waiting.result()
    return not came_back, said


def wait_a_little(future: Future[Any]) -> bool:
    """Whether a future is still running after a moment in which it could have ended."""
    try:
        future.result(0.3)
    except TimeoutError:
        return True
    return False


def test_on_a_gpu_the_state_waits_for_the_tuning(
    users: dict[str, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert run(tmp_path) == (True, [])
    users["GPU-1"].append(4321)
    waited, [sentence] = run(tmp_path)
    assert waited
    assert "Process 4321 also used a GPU of this run" in sentence
    (tmp_path / KERNELS).write_text('{"made_with": {}, "choices": {}}', encoding="utf-8")
    assert run(tmp_path) == (False, [])  # kept choices are not timed again


def test_on_a_cpu_the_state_is_created_meanwhile(
    users: dict[str, list[int]], tmp_path: Path
) -> None:
    users["GPU-1"].append(4321)
    assert run(tmp_path) == (False, [])
