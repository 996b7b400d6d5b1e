"""Open MPI starts the processes of a run, passes a signal on to them, and continues the run."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import Run, cannot_run
from .nursery import FLAGS, slow

pytestmark = pytest.mark.slow

MORE = [*FLAGS, "--eval_steps", "3"]
PROGRAM = "import sys\nfrom consyn_jax.cli.train import main\nsys.exit(main())\n"


def start(*flags: object, before: str = "") -> subprocess.Popen[str]:
    """Two processes of one device each, under `mpirun`."""
    if shutil.which("mpirun") is None:
        cannot_run("Open MPI is not installed: no mpirun")
    # Seconds from a TERM until the processes have it, and from then until they are killed. The run
    # has far more left.
    patience = ["--mca", "odls_base_sigkill_timeout", "10"]
    options = ["--allow-run-as-root", "--oversubscribe", *patience, "-n", "2"]
    command = [sys.executable, "-c", before + PROGRAM, *map(str, flags), "--distributed"]
    own = {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        ["mpirun", *options, *command],
        env=os.environ | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that nobody stops."""
    path = tmp_path_factory.mktemp("mpirun") / "whole"
    with start(*MORE, "--data", corpus, "--output", path) as process:
        said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said
    return Run(path, 0, said)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 75)])
def test_a_stopped_run_goes_on_bit_for_bit(
    number: signal.Signals, code: int, whole: Run, corpus: Path, tmp_path: Path
) -> None:
    """After TERM, mpirun returns its own code and not that of the processes."""
    flags = [*MORE, "--data", corpus, "--output"]
    with start(*flags, tmp_path / "run", before=slow(3)) as process:
        metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 240
        while not metrics.exists() or metrics.read_text().count('"train/loss"') < 6:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        said = process.communicate(timeout=240)[0]
    assert process.returncode == code, said
    assert f"{number.name} at step" in said
    with start(*flags, tmp_path / "run") as process:
        said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said
    run = Run(tmp_path / "run", 0, said)
    assert run.events.count("resume") == 1
    assert run.numbers == whole.numbers
    assert run.weights == whole.weights
