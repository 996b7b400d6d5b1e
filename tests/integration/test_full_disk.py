"""Runs on a disk that fills up, a real one of 8 MB that only they see: they go on, or stop with a
sentence, and lose no good checkpoint."""

import re
from pathlib import Path

import pytest

from .conftest import Run, cannot_run
from .nursery import FLAGS, Nursery

pytestmark = pytest.mark.slow

OFTEN = ["--eval_steps", "6", "--save_steps", "3"]
NO_DISK = 99

# A disk of one's own, which `before_call` fills up at some time. At the end, what is on it is
# copied to where others see it.
DISK = """
import atexit, ctypes, os, shutil, signal
from consyn_jax.training import loop
from consyn_jax.training.checkpointing import manager as checkpoint
from consyn_jax.training.logging import metrics
from consyn_jax.training.run import directory as run_directory, ending
libc, path = ctypes.CDLL(None), {path!r}
filler = path + "/filler"
os.makedirs(path)
alone = 0x20000 if os.geteuid() == 0 else 0x10020000  # CLONE_NEWNS, CLONE_NEWUSER
if libc.unshare(alone) or libc.mount(None, b"/", None, 0x44000, None) or libc.mount(b"none", path.encode(), b"tmpfs", 0, b"size=8m"):
    os._exit({no_disk})

def fill():
    with open(filler, "ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                pass

def free():
    if os.path.exists(filler):
        os.unlink(filler)

def wrapped(inner, before, after=lambda *about: None):
    def call(*args, **more):
        before(*args)
        try:
            return inner(*args, **more)
        finally:
            after(*args)
    return call

@atexit.register
def keep():
    free()
    shutil.copytree(path, path + ".kept")
"""
CONFIG = "run_directory.RunDirectory.write_config = wrapped(run_directory.RunDirectory.write_config, lambda *_: fill())"
# A line that is longer than what is left of the last block. A checkpoint under way would fail before
# the line, and leave room for it.
LOG = """
savers, write = [], metrics.MetricsLog.write
checkpoint.Checkpoints.save = wrapped(checkpoint.Checkpoints.save, lambda self, *_: savers.append(self))
def long(log, step, tokens, values=None, **more):
    if step == 7: savers[-1].wait(), fill()
    return write(log, step, tokens, values if step < 7 else {**(values or {}), "long": "x" * 5000}, **more)
metrics.MetricsLog.write = long
"""
BEST = "loop.export_model = wrapped(loop.export_model, lambda place, *_: fill())"
# A signal, and then no room for the checkpoint.
SIGNAL = """
metrics.MetricsLog.write = wrapped(metrics.MetricsLog.write, lambda log, step, *_: step == 10 and os.kill(os.getpid(), signal.SIGTERM))
checkpoint.Checkpoints.save = wrapped(checkpoint.Checkpoints.save, lambda self, step, *_: step > 9 and (self.wait(), fill()), lambda *_: free())
"""
# For the checkpoint of step 9, and at the end for the report.
AT_TIMES = """
checkpoint.Checkpoints.save = wrapped(checkpoint.Checkpoints.save, lambda self, step, *_: step == 9 and (self.wait(), fill()), lambda *_: free())
ending.write_loss_plot = wrapped(ending.write_loss_plot, lambda *_: fill())
"""


@pytest.fixture(scope="module")
def whole(nursery: Nursery, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run with room enough."""
    path = tmp_path_factory.mktemp("whole") / "run"
    child = nursery.start(*FLAGS, *OFTEN, "--data", corpus, "--output", path)
    assert child.wait() == 0, child.said
    return Run(path, 0, child.said)


def on_full_disk(nursery: Nursery, corpus: Path, path: Path, deed: str) -> Run:
    child = nursery.start(
        *FLAGS,
        *OFTEN,
        "--data",
        corpus,
        "--output",
        path,
        before=DISK.format(path=str(path), no_disk=NO_DISK) + deed,
    )
    if child.wait() == NO_DISK:
        cannot_run("this machine lets no process mount a file system of its own")
    return Run(path.with_name("run.kept"), child.wait(), child.said)


@pytest.mark.parametrize(
    ("deed", "code", "sentence", "checkpoints"),
    [
        (
            CONFIG,
            2,
            r"{path}/config\.yaml cannot be written: No space left on device\. Make room, or name another --output\.",
            [],
        ),
        (LOG, 2, r"{path}/metrics\.jsonl .*No space left on device.*", [3, 6]),
        (
            BEST,
            2,
            r"The model {path}/best could not be written: No space left on device\. Once that is fixed, the same command continues from .*",
            [3],
        ),
        (
            SIGNAL,
            75,
            r"SIGTERM at step 11: the state could not be saved\. The same command continues from step 9\.",
            [3, 6, 9],
        ),
    ],
    ids=["config", "log", "model", "signal"],
)
def test_it_stops_with_a_sentence_and_goes_on_once_there_is_room(
    deed: str,
    code: int,
    sentence: str,
    checkpoints: list[int],
    whole: Run,
    nursery: Nursery,
    corpus: Path,
    tmp_path: Path,
) -> None:
    run = on_full_disk(nursery, corpus, tmp_path / "run", deed)
    assert run.code == code, run.said
    assert "Traceback" not in run.said
    last = run.said.splitlines()[-1]
    assert re.fullmatch(
        "consyn-train: " + sentence.replace("{path}", re.escape(str(tmp_path / "run"))), last
    ), run.said
    steps = sorted(
        int(path.name) for path in (run.path / "checkpoints").glob("*") if path.name.isdigit()
    )
    assert steps in (checkpoints, checkpoints[:-1]), "the last one may have been under way"
    again = nursery.start(*FLAGS, *OFTEN, "--data", corpus, "--output", run.path)
    assert again.wait() == 0, again.said
    assert (run.numbers, run.weights) == (whole.numbers, whole.weights)
    assert "warning" not in again.said


def test_it_goes_on_without_a_checkpoint_and_without_a_report(
    whole: Run,
    nursery: Nursery,
    corpus: Path,
    tmp_path: Path,
) -> None:
    run = on_full_disk(nursery, corpus, tmp_path / "run", AT_TIMES)
    assert run.code == 0, run.said
    assert (run.numbers, run.weights) == (whole.numbers, whole.weights)
    assert [line["step"] for line in run.lines if line.get("event") == "save"] == [3, 6, 12, 15, 16]
    first, second, third = re.findall(r"^warning: (.*)$", run.said, re.MULTILINE)
    assert first.startswith(
        f"The checkpoint of step 9 could not be written to {tmp_path / 'run' / 'checkpoints'}: it needs "
    )
    assert (
        second
        == "loss.png could not be written (No space left on device); the model and metrics.jsonl are complete."
    )
    assert third.startswith(
        "report.html could not be written (No space left on device); the run goes on"
    )
