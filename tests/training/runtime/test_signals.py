"""Signals in one process, and the messages that a step carries between processes.

Whole runs are in tests/integration/test_signals.py.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from consyn_jax.data.loader import prefetch
from consyn_jax.distributed.mesh import build_mesh, parse_mesh
from consyn_jax.training.runtime import signals as module
from consyn_jax.training.runtime.signals import (
    SIGNALS,
    Signals,
    StopCoordinator,
    is_shared,
    signals_like,
    with_signals,
)
from consyn_jax.training.step import TrainState

# One process imports JAX, and forks for each case.
PROCESS = """
import json, os, signal, sys
from consyn_jax.errors import REPEAT_S
from consyn_jax.training.runtime.signals import Signals

def one(sent):
    ends, said = os.pipe()
    if (pid := os.fork()) == 0:
        os.dup2(said, 2)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if "nohup" in sent else signal.SIG_DFL)
        with Signals() as signals:
            for name in sent:
                if name == "closed":
                    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
                elif name == "later":
                    signals._repeats._first_s -= REPEAT_S
                elif name != "nohup":
                    os.kill(os.getpid(), signal.Signals[name])
        os.dup2(said, 2)
        os.write(2, str(signals.received).encode())
        os._exit(0)
    os.close(said)
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status), os.read(ends, 10_000).decode()

print(json.dumps([one(sent) for sent in json.loads(sys.argv[1])]))
"""
CASES = [
    (["SIGTERM"], 0, "SIGTERM"),
    (["SIGUSR1"], 0, "SIGUSR1"),
    (["SIGTERM", "SIGTERM"], 0, "SIGTERM"),  # as Slurm sends it at the time limit
    (["SIGINT", "SIGTERM", "SIGINT"], 0, "SIGINT"),
    (["SIGTERM", "SIGTERM", "later", "SIGTERM"], 143, ""),
    (["SIGTERM", "later", "SIGINT"], 130, ""),
    (["SIGINT", "later", "SIGTERM"], 143, ""),
    (["SIGUSR1", "SIGUSR1", "SIGTERM"], 0, "SIGUSR1"),  # Slurm warns, and later ends
    (["SIGTERM", "SIGUSR1"], 0, "SIGTERM"),
    (["SIGUSR1", "SIGTERM", "SIGTERM"], 0, "SIGUSR1"),
    (["SIGUSR1", "SIGTERM", "later", "SIGTERM"], 143, ""),
    (["SIGHUP"], 0, "SIGHUP"),
    (["SIGHUP", "SIGHUP", "SIGHUP"], 0, "SIGHUP"),  # of the kernel, the shell and the session
    (["SIGTERM", "SIGHUP"], 0, "SIGTERM"),
    (["SIGHUP", "SIGTERM"], 0, "SIGHUP"),
    (["SIGHUP", "SIGTERM", "later", "SIGTERM"], 143, ""),
    (["nohup", "SIGHUP"], 0, "None"),
    (["nohup", "SIGHUP", "SIGTERM"], 0, "SIGTERM"),
    (["closed", "SIGHUP"], 0, "SIGHUP"),  # what it says is refused
]


def heard(sent: list[str]) -> str:
    """What is said of the first signal that is not ignored."""
    signals = [name for name in sent if "nohup" not in sent or name not in ("nohup", "SIGHUP")]
    if not signals:
        return ""
    return (
        f"\n{signals[0]}: the run will save after this step and stop. A second signal at least "
        "2 seconds later stops it at once, without saving.\n"
    )


def test_the_second_signal_ends_at_once_and_a_warning_is_none() -> None:
    given = json.dumps([sent for sent, *_ in CASES])
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, given],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert json.loads(done.stdout) == [
        [code, ("" if "closed" in sent else heard(sent)) + received]
        for sent, code, received in CASES
    ]


def test_handlers_are_restored() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with Signals():
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before


# --------------------------------------------------------------------------- inside the train step

MESSAGE = ("signalled", "idle", "requested")


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    return build_mesh(parse_mesh("data=2,fsdp=2,tensor=2", 8))


def count(
    state: TrainState, batch: dict[str, jax.Array]
) -> tuple[TrainState, dict[str, jax.Array]]:
    assert set(batch) == {"labels"}
    total = jnp.sum(batch["labels"])
    return state._replace(step=state.step + 1, params=state.params + total), {"loss": total}


def state() -> TrainState:
    return TrainState(jnp.int32(4), jnp.float32(1.5), {"m": jnp.float32(2)}, jnp.int32(0))


@pytest.mark.parametrize(
    ("rows", "all_read"),
    [
        ([[0, 0, 0]], [0, 0, 0]),
        ([[0, 0, 0], [15, 0, 0]], [15, 0, 0]),
        ([[10, 0, 1], [15, 1, 0], [0, 0, 0]], [15, 1, 1]),
    ],
)
def test_all_processes_read_the_message_of_one_device(
    mesh: jax.sharding.Mesh, rows: list[list[int]], all_read: list[int]
) -> None:
    like = signals_like(mesh)
    assert like.sharding.shard_shape(like.shape) == (1, 3)
    said = jax.device_put(np.array(rows + [[0, 0, 0]] * (8 - len(rows)), np.int32), like.sharding)
    batch = {"labels": jnp.ones(3), SIGNALS: said}
    after, metrics = jax.jit(with_signals(count))(state(), batch)
    assert {name: float(value) for name, value in metrics.items()} == {
        "loss": 3,
        **dict(zip(MESSAGE, all_read, strict=True)),
    }
    assert (int(after.step), float(after.params)) == ((4, 1.5) if metrics["idle"] else (5, 4.5))
    assert all(metrics[name].is_fully_replicated for name in MESSAGE)


def test_a_mesh_of_one_process_is_not_shared(mesh: jax.sharding.Mesh) -> None:
    assert not is_shared(mesh)


# --------------------------------------------------------------------------------- the coordinator


class FakeProcessGroup:
    """The other processes, as `StopCoordinator` sees them."""

    def __init__(self) -> None:
        self.noted: str | None = None

    def note(self, text: str) -> None:
        self.noted = text


@pytest.fixture
def coordinator(mesh: jax.sharding.Mesh, monkeypatch: pytest.MonkeyPatch) -> StopCoordinator:
    """The coordinator of one of several processes."""
    monkeypatch.setattr(module, "is_shared", lambda mesh: True)
    monkeypatch.setattr(module, "current_process_group", FakeProcessGroup)
    return StopCoordinator(Signals(), mesh, save_minutes=2.0)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The time, which changes only when a test changes it."""
    time = {"s": 1000.0}
    monkeypatch.setattr(module, "monotonic", lambda: time["s"])
    return time


def message(coordinator: StopCoordinator) -> list[int]:
    (row,) = {tuple(row) for row in np.asarray(coordinator.message()[SIGNALS]).tolist()}
    return list(row)


def like(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    return {
        "labels": jax.ShapeDtypeStruct(
            (8, 2),
            jnp.int32,
            sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
        )
    }


def test_a_signal_is_sent_and_acted_on_once_all_know_it(
    coordinator: StopCoordinator, mesh: jax.sharding.Mesh
) -> None:
    with prefetch({"labels": np.full((8, 2), n)} for n in range(5)) as ready:
        batches = coordinator.batches(ready, like(mesh))
        next(batches)
        assert message(coordinator) == [0, 0, 0]
        coordinator._signals.received = "SIGTERM"
        assert next(batches)["labels"][0, 0] == 1
        assert message(coordinator) == [signal.SIGTERM, 0, 0]
    assert coordinator.stop_signal is None
    assert coordinator.read({"signalled": 0.0, "idle": 0.0})
    assert coordinator.stop_signal is None
    assert coordinator.read({"signalled": 10.0, "idle": 0.0})
    assert coordinator.stop_signal == "SIGUSR1"


@pytest.mark.parametrize("who", ["this process", "another"])
def test_a_process_that_waits_for_data_takes_part_in_idle_steps(
    who: str, coordinator: StopCoordinator, mesh: jax.sharding.Mesh
) -> None:
    come = threading.Event()

    def slow() -> Iterator[dict[str, np.ndarray]]:
        yield {"labels": np.ones((8, 2), np.int32)}
        come.wait(60)

    with prefetch(slow(), interrupted=coordinator.stops_waiting) as ready:
        batches = coordinator.batches(ready, like(mesh))
        next(batches)
        assert message(coordinator) == [0, 0, 0]
        if who == "this process":
            coordinator._signals.received = "SIGTERM"
        else:
            coordinator._process_group.noted = "SIGTERM"  # type: ignore[union-attr]
        for _ in range(2):
            assert not next(batches)["labels"].any()
            assert message(coordinator) == [signal.SIGTERM, 1, 0]
        come.set()
    assert coordinator._process_group.noted == "SIGTERM"  # type: ignore[union-attr]
    assert not coordinator.read({"signalled": 15.0, "idle": 1.0})
    assert coordinator.stop_signal == "SIGTERM"


def test_the_end_of_the_data_is_not_a_wait(
    coordinator: StopCoordinator, mesh: jax.sharding.Mesh
) -> None:
    coordinator._signals.received = "SIGTERM"
    with prefetch(
        iter([{"labels": np.ones((8, 2), np.int32)}]), interrupted=coordinator.stops_waiting
    ) as ready:
        while ready._ready.qsize() < 2:
            os.sched_yield()
        assert len(list(coordinator.batches(ready, like(mesh)))) == 1


def test_a_single_process_acts_on_its_own_signal_and_keeps_its_batches(
    mesh: jax.sharding.Mesh,
) -> None:
    coordinator = StopCoordinator(signals := Signals(), mesh)
    with prefetch(iter([{"labels": 1}]), interrupted=coordinator.stops_waiting) as ready:
        assert list(coordinator.batches(ready, {})) == [{"labels": 1}]
    assert coordinator.message() == {}
    assert coordinator.stop_signal is None
    assert not coordinator.stops_waiting()
    signals.received = "SIGINT"
    assert coordinator.stop_signal == "SIGINT"
    assert coordinator.stops_waiting()
    assert coordinator.read({"loss": 1.0})


def test_all_processes_save_by_the_clock_of_process_0(
    coordinator: StopCoordinator, clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock["s"] += 119
    assert message(coordinator) == [0, 0, 0]
    clock["s"] += 1
    assert message(coordinator) == [0, 0, 1]
    assert not coordinator.save_now, "the others do not know yet"
    assert coordinator.read({"signalled": 0.0, "idle": 0.0, "requested": 1.0})
    assert coordinator.read({"signalled": 0.0, "idle": 0.0, "requested": 0.0})
    assert coordinator.save_now
    coordinator.restart_save_clock()
    assert not coordinator.save_now
    assert message(coordinator) == [0, 0, 0]
    clock["s"] += 1000
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert message(coordinator) == [0, 0, 0]
    assert coordinator.read({"signalled": 0.0, "idle": 0.0, "requested": 1.0})
    assert coordinator.save_now


def test_all_processes_end_when_process_0_asks_for_it(
    coordinator: StopCoordinator, clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator.ask_to_end()
    clock["s"] += 1000
    assert message(coordinator) == [0, 0, 2], "the end comes with a checkpoint"
    assert not coordinator.ends_now, "the others do not know yet"
    assert coordinator.read({"signalled": 0.0, "idle": 0.0, "requested": 2.0})
    assert coordinator.read({"signalled": 0.0, "idle": 0.0, "requested": 0.0})
    assert coordinator.ends_now
    assert not coordinator.save_now
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert message(coordinator) == [0, 0, 0]


def test_a_single_process_ends_at_once(mesh: jax.sharding.Mesh) -> None:
    coordinator = StopCoordinator(Signals(), mesh)
    assert not coordinator.ends_now
    coordinator.ask_to_end()
    assert coordinator.ends_now


def test_a_single_process_saves_by_its_own_clock(
    mesh: jax.sharding.Mesh, clock: dict[str, float]
) -> None:
    by_minutes, by_steps = (
        StopCoordinator(Signals(), mesh, save_minutes=minutes) for minutes in (0.5, None)
    )
    clock["s"] += 29
    assert not by_minutes.save_now
    clock["s"] += 1
    assert by_minutes.save_now
    assert not by_steps.save_now
    by_minutes.restart_save_clock()
    assert not by_minutes.save_now
