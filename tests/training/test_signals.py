"""Signals in one process, and what a step carries from process to process. Whole runs: tests/integration/test_signals.py."""

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
from consyn_jax.training import signals as module
from consyn_jax.training.signals import SIGNALS, Agreement, Signals, is_shared, signals_like, with_signals
from consyn_jax.training.step import TrainState

# One process imports JAX, and forks for each case.
PROCESS = """
import json, os, signal, sys
from consyn_jax.training.signals import Signals

def one(sent):
    ends, said = os.pipe()
    if (pid := os.fork()) == 0:
        os.dup2(said, 2)
        with Signals() as signals:
            for name in sent:
                os.kill(os.getpid(), signal.Signals[name])
        os.write(2, signals.received.encode())
        os._exit(0)
    os.close(said)
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status), os.read(ends, 10_000).decode()

print(json.dumps([one(sent) for sent in json.loads(sys.argv[1])]))
"""
CASES = [
    (["SIGTERM"], 0, "SIGTERM"),
    (["SIGUSR1"], 0, "SIGUSR1"),
    (["SIGTERM", "SIGINT"], 130, ""),
    (["SIGINT", "SIGTERM"], 143, ""),
    (["SIGUSR1", "SIGUSR1", "SIGTERM"], 0, "SIGUSR1"),  # Slurm warns, and later ends
    (["SIGTERM", "SIGUSR1"], 0, "SIGTERM"),
    (["SIGUSR1", "SIGTERM", "SIGTERM"], 143, ""),
]


def test_the_second_signal_ends_at_once_and_a_warning_is_none() -> None:
    given = json.dumps([sent for sent, *_ in CASES])
    done = subprocess.run([sys.executable, "-c", PROCESS, given], capture_output=True, text=True, timeout=120, check=True)
    sentence = "\n{}: the run is saved after this step and ends; a second signal ends it at once, unsaved.\n"
    assert json.loads(done.stdout) == [[code, sentence.format(sent[0]) + received] for sent, code, received in CASES]


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with Signals():
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] != before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


# ----------------------------------------------------------------------------------------------------------------- in the step

WORDS = ("signalled", "idle", "due")


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    return build_mesh(parse_mesh("data=2,fsdp=2,tensor=2", 8))


def count(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
    assert set(batch) == {"labels"}
    total = jnp.sum(batch["labels"])
    return state._replace(step=state.step + 1, params=state.params + total), {"loss": total}


def state() -> TrainState:
    return TrainState(jnp.int32(4), jnp.float32(1.5), {"m": jnp.float32(2)}, jnp.int32(0))


@pytest.mark.parametrize(
    ("rows", "all_read"), [([[0, 0, 0]], [0, 0, 0]), ([[0, 0, 0], [15, 0, 0]], [15, 0, 0]), ([[10, 0, 1], [15, 1, 0], [0, 0, 0]], [15, 1, 1])]
)
def test_what_one_device_says_all_read(mesh: jax.sharding.Mesh, rows: list[list[int]], all_read: list[int]) -> None:
    like = signals_like(mesh)
    assert like.sharding.shard_shape(like.shape) == (1, 3)
    said = jax.device_put(np.array(rows + [[0, 0, 0]] * (8 - len(rows)), np.int32), like.sharding)
    batch = {"labels": jnp.ones(3), SIGNALS: said}
    after, metrics = jax.jit(with_signals(count))(state(), batch)
    assert {name: float(value) for name, value in metrics.items()} == {"loss": 3, **dict(zip(WORDS, all_read, strict=True))}
    assert (int(after.step), float(after.params)) == ((4, 1.5) if metrics["idle"] else (5, 4.5))
    assert all(metrics[name].is_fully_replicated for name in WORDS)


def test_a_mesh_of_one_process_is_not_shared(mesh: jax.sharding.Mesh) -> None:
    assert not is_shared(mesh)


# ------------------------------------------------------------------------------------------------------------------- agreement


class FakePeers:
    """The other processes, as `Agreement` sees them."""

    def __init__(self) -> None:
        self.noted: str | None = None

    def note(self, text: str) -> None:
        self.noted = text


@pytest.fixture
def agreement(mesh: jax.sharding.Mesh, monkeypatch: pytest.MonkeyPatch) -> Agreement:
    """That of a process among others."""
    monkeypatch.setattr(module, "is_shared", lambda mesh: True)
    monkeypatch.setattr(module, "current_peers", FakePeers)
    return Agreement(Signals(), mesh, save_minutes=2.0)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The time, which stands still."""
    time = {"s": 1000.0}
    monkeypatch.setattr(module, "monotonic", lambda: time["s"])
    return time


def said(agreement: Agreement) -> list[int]:
    (row,) = {tuple(row) for row in np.asarray(agreement.said()[SIGNALS]).tolist()}
    return list(row)


def like(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    return {"labels": jax.ShapeDtypeStruct((8, 2), jnp.int32, sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))}


def test_a_signal_is_said_and_acted_on_when_all_know(agreement: Agreement, mesh: jax.sharding.Mesh) -> None:
    with prefetch({"labels": np.full((8, 2), n)} for n in range(5)) as ready:
        batches = agreement.batches(ready, like(mesh))
        next(batches)
        assert said(agreement) == [0, 0, 0]
        agreement._signals.received = "SIGTERM"
        assert next(batches)["labels"][0, 0] == 1
        assert said(agreement) == [signal.SIGTERM, 0, 0]
    assert agreement.stop is None
    assert agreement.counts({"signalled": 0.0, "idle": 0.0})
    assert agreement.stop is None
    assert agreement.counts({"signalled": 10.0, "idle": 0.0})
    assert agreement.stop == "SIGUSR1"


@pytest.mark.parametrize("who", ["this process", "another"])
def test_who_waits_for_data_takes_part_in_steps_that_do_not_count(who: str, agreement: Agreement, mesh: jax.sharding.Mesh) -> None:
    come = threading.Event()

    def slow() -> Iterator[dict[str, np.ndarray]]:
        yield {"labels": np.ones((8, 2), np.int32)}
        come.wait(60)

    with prefetch(slow(), interrupted=agreement.waits_in_vain) as ready:
        batches = agreement.batches(ready, like(mesh))
        next(batches)
        assert said(agreement) == [0, 0, 0]
        if who == "this process":
            agreement._signals.received = "SIGTERM"
        else:
            agreement._peers.noted = "SIGTERM"  # type: ignore[union-attr]
        for _ in range(2):
            assert not next(batches)["labels"].any()
            assert said(agreement) == [signal.SIGTERM, 1, 0]
        come.set()
    assert agreement._peers.noted == "SIGTERM"  # type: ignore[union-attr]
    assert not agreement.counts({"signalled": 15.0, "idle": 1.0})
    assert agreement.stop == "SIGTERM"


def test_the_end_of_the_data_is_no_waiting(agreement: Agreement, mesh: jax.sharding.Mesh) -> None:
    agreement._signals.received = "SIGTERM"
    with prefetch(iter([{"labels": np.ones((8, 2), np.int32)}]), interrupted=agreement.waits_in_vain) as ready:
        while ready._ready.qsize() < 2:
            os.sched_yield()
        assert len(list(agreement.batches(ready, like(mesh)))) == 1


def test_one_process_acts_on_its_own_signal_and_its_batches_stay_as_they_are(mesh: jax.sharding.Mesh) -> None:
    agreement = Agreement(signals := Signals(), mesh)
    with prefetch(iter([{"labels": 1}]), interrupted=agreement.waits_in_vain) as ready:
        assert list(agreement.batches(ready, {})) == [{"labels": 1}]
    assert agreement.said() == {}
    assert agreement.stop is None
    assert not agreement.waits_in_vain()
    signals.received = "SIGINT"
    assert agreement.stop == "SIGINT"
    assert agreement.waits_in_vain()
    assert agreement.counts({"loss": 1.0})


def test_the_clock_of_process_0_has_all_save(agreement: Agreement, clock: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    clock["s"] += 119
    assert said(agreement) == [0, 0, 0]
    clock["s"] += 1
    assert said(agreement) == [0, 0, 1]
    assert not agreement.saves, "the others do not know yet"
    assert agreement.counts({"signalled": 0.0, "idle": 0.0, "due": 1.0})
    assert agreement.counts({"signalled": 0.0, "idle": 0.0, "due": 0.0})
    assert agreement.saves
    agreement.saved()
    assert not agreement.saves
    assert said(agreement) == [0, 0, 0]
    clock["s"] += 1000
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert said(agreement) == [0, 0, 0]
    assert agreement.counts({"signalled": 0.0, "idle": 0.0, "due": 1.0})
    assert agreement.saves


def test_one_process_saves_by_its_own_clock(mesh: jax.sharding.Mesh, clock: dict[str, float]) -> None:
    by_minutes, by_steps = (Agreement(Signals(), mesh, save_minutes=minutes) for minutes in (0.5, None))
    clock["s"] += 29
    assert not by_minutes.saves
    clock["s"] += 1
    assert by_minutes.saves
    assert not by_steps.saves
    by_minutes.saved()
    assert not by_minutes.saves
