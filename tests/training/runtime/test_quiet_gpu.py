"""Nothing disturbs the timing of kernels, as far as this process can tell."""

import os
import sys
import types
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import Mock

import jax
import pytest

from consyn_jax.training.runtime import quiet_gpu
from consyn_jax.training.runtime.kernel_choices import KERNELS
from consyn_jax.training.runtime.quiet_gpu import other_processes, tune_alone
from consyn_jax.training.runtime.watchdog import Watchdog


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


def run(directory: Path, waits: bool, compiles: Callable[[], object] = lambda: None) -> list[str]:
    """What `tune_alone` warns of; checks whether it waits for the compiler.

    Args:
        compiles: What the compiler does at its end.
    """
    said, watchdog, may_end = list[str](), Mock(spec=Watchdog), Event()
    with ThreadPoolExecutor(2) as pool:
        compiling: Future[Any] = pool.submit(lambda: may_end.wait() and compiles())
        tuning = pool.submit(tune_alone, compiling, directory, watchdog, said.append)
        try:
            assert wait([tuning], 0.3 if waits else 60).done == (set() if waits else {tuning})
        finally:
            may_end.set()
        assert (tuning.result() > 0) == waits
    assert watchdog.at.called == waits
    return said


def test_on_a_gpu_the_state_waits_for_the_tuning(
    users: dict[str, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = {"gemm.textproto"}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(quiet_gpu, "names_of_choices", choices.copy)
    assert run(tmp_path, True, lambda: choices.add("1.textproto")) == []
    users["GPU-1"].append(4321)
    [sentence] = run(tmp_path, True, lambda: choices.add("2.textproto"))
    assert "Process 4321 used the same GPU while XLA timed kernels" in sentence
    assert run(tmp_path, True) == []  # the program was kept, and nothing timed
    (tmp_path / KERNELS).write_text('{"made_with": {}, "choices": {}}', encoding="utf-8")
    assert run(tmp_path, False) == []  # kept choices are not timed again


def test_a_step_that_does_not_fit_ends_the_run_before_its_state_is_created(
    users: dict[str, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    failed: Future[Any] = Future()
    failed.set_exception(MemoryError("too large"))
    with pytest.raises(MemoryError, match="too large"):
        tune_alone(failed, tmp_path, Mock(spec=Watchdog), Mock())


def test_on_a_cpu_the_state_is_created_meanwhile(
    users: dict[str, list[int]], tmp_path: Path
) -> None:
    users["GPU-1"].append(4321)
    assert run(tmp_path, False) == []
