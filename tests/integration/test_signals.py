"""A signal in any phase of a run, in one process and in several: saved at the next step's end, and gone on with as if nothing had been."""

import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from .conftest import Run
from .nursery import FLAGS, Child, Nursery, nursery, of_process  # noqa: F401

OFTEN = ["--eval_steps", "6", "--save_steps", "9"]
LIMIT_S = 30  # from the signal to the end

# What a process does to itself, by phase, and the step at whose end the run is saved.
SELF = "import os, signal, tempfile, time\nfrom consyn_jax.training import checkpoint, trainer\nfrom consyn_jax.data import loader\n"
WRAP = """
inner = {place}
def then_signal(*args, **more):
    if {when}:
        time.sleep({late})
        open(f"{{tempfile.gettempdir()}}/signalled-{{os.getpid()}}", "w").close()
        os.kill(os.getpid(), signal.{name})
        time.sleep({late})
    return inner(*args, **more)
{place} = then_signal
"""


def signalling(place: str, *, when: str = "True", late: float = 0, name: str = "SIGTERM") -> str:
    return SELF + WRAP.format(place=place, when=when, late=late, name=name)


COMPILING = signalling("trainer.ConsynTrainer.compile_train_step")
EVALUATING = signalling("trainer.ConsynTrainer._evaluate", name="SIGUSR1")
SAVING = signalling("checkpoint.Checkpoints._commit_everywhere", when="args[1] == 9")
WAITING = signalling("loader.BatchLoader.batch", when="args[1] == 12", late=2, name="SIGINT")  # for the batch of step 13


def ended(child: Child) -> int:
    """The exit code, in time behind the signal that the process gave itself, if it did."""
    code, now = child.wait(), time.time()
    stamp = Path(tempfile.gettempdir()) / f"signalled-{child.pid}"
    if stamp.exists():
        assert now - stamp.stat().st_mtime < LIMIT_S
        stamp.unlink()
    return code


@pytest.fixture(scope="module")
def whole(nursery: Nursery, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:  # noqa: F811
    """The run that nobody stopped, by one process."""
    path = tmp_path_factory.mktemp("whole") / "run"
    child = nursery.start(*FLAGS, *OFTEN, "--data", corpus, "--output", path)
    assert child.wait() == 0, child.said
    return Run(path, 0, child.said)


@pytest.mark.slow
def test_one_process(whole: Run, nursery: Nursery, corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "run"
    flags = [*FLAGS, *OFTEN, "--data", corpus, "--output", path]
    for before, name, steps in ((COMPILING, "SIGTERM", {1}), (EVALUATING, "SIGUSR1", {6}), (SAVING, "SIGTERM", {9, 10, 11}), (WAITING, "SIGINT", {12})):
        child = nursery.start(*flags, before=before)
        assert ended(child) == 75, child.said
        stopped = Run(path, 75, child.said)
        assert (stopped.lines[-1]["event"], stopped.lines[-1]["signal"]) == ("signal", name)
        assert stopped.lines[-1]["step"] in steps
        assert stopped.said.count("\n") == 3, "an empty line, that it came, and that all is saved"
    child = nursery.start(*flags)
    assert child.wait() == 0, child.said
    run = Run(path, 0, child.said)
    assert (run.numbers, run.weights) == (whole.numbers, whole.weights)
    assert run.events.count("resume") == 4


@pytest.mark.slow
def test_two_processes(whole: Run, nursery: Nursery, corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    """The signal comes to one of them."""
    path = tmp_path / "run"
    flags = [*FLAGS, *OFTEN, "--data", corpus, "--output", path]
    for number, before, name, steps in ((1, COMPILING, "SIGTERM", {1, 2}), (0, EVALUATING, "SIGUSR1", {7, 8}), (1, WAITING, "SIGINT", {12})):
        children = nursery.together(*flags, before=of_process(number, before))
        assert [ended(child) for child in children] == [75, 75], [child.said for child in children]
        last = Run(path, 75, "").lines[-1]
        assert (last["event"], last["signal"]) == ("signal", name)
        assert last["step"] in steps
        assert [f"{name}: the run is saved after this step" in child.said for child in children] == [number == 0, number == 1]
        assert all(f"consyn-train: {name} at step {last['step']}: the state is saved in {path}." in child.said for child in children)
    child = nursery.start(*flags)
    assert child.wait() == 0, child.said
    done = Run(path, 0, child.said)
    assert [line["step"] for line in done.numbers] == [line["step"] for line in whole.numbers]
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        ours, theirs = ([line[name] for line in run.numbers if name in line] for run in (done, whole))
        assert len(ours) >= 3
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
