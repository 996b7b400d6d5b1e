"""Signals in every phase of a run, in one process and in several.

The run saves at the end of the step, and the next start continues as if nothing had happened.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from .conftest import Run
from .nursery import FLAGS, MAIN_WAITS, Child, Nursery, of_process

OFTEN = ["--eval_steps", "6", "--save_steps", "9"]
LIMIT_S = 30  # from the signal to the exit, besides what a whole run takes on this machine now

# Code that makes a process send itself a signal in some phase.
SELF = (
    MAIN_WAITS
    + """
import os, signal, tempfile
from consyn_jax.data import loader
from consyn_jax.training import loop, trainer
from consyn_jax.training.checkpointing import manager
sent = threading.Event()
"""
)
WRAP = """
inner = {place}
def then_signal(*args, **more):
    if {when}:
        {first}
        open(f"{{tempfile.gettempdir()}}/signalled-{{os.getpid()}}", "w").close()
        for _ in range({times}):
            os.kill(os.getpid(), signal.{name})
            time.sleep(0.003)
        sent.set()
        time.sleep({late})
    return inner(*args, **more)
{place} = then_signal
"""
# No batch for the second step after the save before the signal has come.
HELD = """
read = loader.BatchLoader.batch
def held(self, step):
    if step > 9:
        sent.wait()
    return read(self, step)
loader.BatchLoader.batch = held
"""


def signalling(
    place: str,
    *,
    when: str = "True",
    first: str = "pass",
    late: float = 0,
    name: str = "SIGTERM",
    times: int = 1,
) -> str:
    about = {"when": when, "first": first, "late": late, "name": name, "times": times}
    return SELF + WRAP.format(place=place, **about)


# A command whose terminal is its own, as that of a shell is.
TERMINAL = """
import fcntl, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from consyn_jax.cli.train import main
sys.exit(main(sys.argv[1:]))
"""
# Twice, as Slurm sends it at the time limit.
COMPILING = signalling("trainer.ConsynTrainer.compile_train_step", times=2)
EVALUATING = signalling("loop.Training._evaluate", name="SIGUSR1")
SAVING = signalling("manager.Checkpoints._commit_on_all", when="args[1] == 9", times=2) + HELD
# For the batch of step 13.
WAITING = signalling(
    "loader.BatchLoader.batch", when="args[1] == 12", first="main_waits(0.5)", late=5, name="SIGINT"
)


def ended(child: Child, limit_s: float) -> int:
    """The exit code, which must come within `limit_s` of a signal that the process sent itself."""
    code, now = child.wait(), time.time()
    stamp = Path(tempfile.gettempdir()) / f"signalled-{child.pid}"
    if stamp.exists():
        assert now - stamp.stat().st_mtime < limit_s
        stamp.unlink()
    return code


@pytest.fixture(scope="module")
def timed(
    nursery: Nursery, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, float]:
    """An uninterrupted run of one process, and its seconds."""
    path, began = tmp_path_factory.mktemp("whole") / "run", time.monotonic()
    child = nursery.start(*FLAGS, *OFTEN, "--data", corpus, "--output", path)
    assert child.wait() == 0, child.said
    return Run(path, 0, child.said), time.monotonic() - began


@pytest.fixture
def whole(timed: tuple[Run, float]) -> Run:
    return timed[0]


@pytest.fixture
def limit_s(timed: tuple[Run, float]) -> float:
    return LIMIT_S + timed[1]


@pytest.mark.slow
def test_one_process(
    whole: Run, limit_s: float, nursery: Nursery, corpus: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    flags = [*FLAGS, *OFTEN, "--data", corpus, "--output", path]
    for before, name, steps in (
        (COMPILING, "SIGTERM", {1}),
        (EVALUATING, "SIGUSR1", {6}),
        (SAVING, "SIGTERM", {9, 10, 11}),
        (WAITING, "SIGINT", {12}),
    ):
        child = nursery.start(*flags, before=before)
        assert ended(child, limit_s) == 75, child.said
        stopped = Run(path, 75, child.said)
        assert (stopped.lines[-1]["event"], stopped.lines[-1]["signal"]) == ("signal", name)
        assert stopped.lines[-1]["step"] in steps
        assert stopped.said.count("\n") == 3, "an empty line, the signal, the outcome"
    child = nursery.start(*flags)
    assert child.wait() == 0, child.said
    run = Run(path, 0, child.said)
    assert (run.numbers, run.weights) == (whole.numbers, whole.weights)
    assert run.events.count("resume") == 4


@pytest.mark.slow
def test_a_closed_terminal(corpus: Path, tmp_path: Path) -> None:
    """The kernel sends SIGHUP, and refuses all that is printed from then on."""
    path = tmp_path / "run"
    flags = [*FLAGS, "--max_steps", "100000", "--data", corpus, "--output", path]
    flags.remove("--quiet")
    command = [sys.executable, "-c", TERMINAL, *map(str, flags)]
    terminal, theirs = os.openpty()
    child = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    reader = threading.Thread(target=drain, args=(terminal,), daemon=True)
    reader.start()
    metrics, deadline = path / "metrics.jsonl", time.monotonic() + 240
    while not metrics.exists() or metrics.read_text().count('"train/loss"') < 7:
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.close(terminal)
    assert child.wait(240) == 75
    stopped = Run(path, 75, "")
    assert (stopped.lines[-1]["event"], stopped.lines[-1]["signal"]) == ("signal", "SIGHUP")
    assert (path / "checkpoints" / str(stopped.lines[-1]["step"])).is_dir()


def drain(terminal: int) -> None:
    """Read a terminal until it is closed, so that what is printed there does not wait."""
    with suppress(OSError):
        while os.read(terminal, 65536):
            pass


@pytest.mark.slow
def test_two_processes(
    whole: Run, limit_s: float, nursery: Nursery, corpus: Path, tmp_path: Path
) -> None:
    """One of them gets the signal."""
    path = tmp_path / "run"
    flags = [*FLAGS, *OFTEN, "--data", corpus, "--output", path]
    for number, before, name, steps in (
        (1, COMPILING, "SIGTERM", {1, 2}),
        (0, EVALUATING, "SIGUSR1", {7, 8}),
        (1, WAITING, "SIGINT", {12}),
    ):
        children = nursery.together(*flags, before=of_process(number, before))
        codes = [ended(child, limit_s) for child in children]
        assert codes == [75, 75], [child.said for child in children]
        last = Run(path, 75, "").lines[-1]
        assert (last["event"], last["signal"]) == ("signal", name)
        assert last["step"] in steps
        assert [
            f"{name}: the run will save after this step" in child.said for child in children
        ] == [number == 0, number == 1]
        assert all(
            f"consyn-train: {name} at step {last['step']}: the state is saved in {path}."
            in child.said
            for child in children
        )
    child = nursery.start(*flags)
    assert child.wait() == 0, child.said
    done = Run(path, 0, child.said)
    assert [line["step"] for line in done.numbers] == [line["step"] for line in whole.numbers]
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        ours, theirs = (
            [line[name] for line in run.numbers if name in line] for run in (done, whole)
        )
        assert len(ours) >= 3
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
