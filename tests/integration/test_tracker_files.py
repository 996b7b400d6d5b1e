"""TensorBoard's and Weights & Biases' files of a run that was killed and resumed."""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard_files import read_back, tensorboard_events

from consyn_jax.training.logging.tracking.wandb_rows import _records, _values

from .conftest import CHANGING, TRACKED, Run, command

pytestmark = pytest.mark.slow

# Steps 1 to 9; lines at 1, 2, 4, 6, 8, 9, evaluations at 3, 6, 9: some with a line, some without.
STEPS = ["--max_steps", "9", "--logging_steps", "2", "--histograms"]
KILL = """
import os, signal

class Kill:
    def on_step(self, run, values):
        if values["step"] == 8 and run.resumed_from is None:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def resumed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that `kill -9` ended after step 8, and its resume."""
    here = tmp_path_factory.mktemp("resumed")
    (here / "killing.py").write_text(KILL)
    flags = [*TRACKED, *STEPS, "--data", corpus, "--validation_fraction", "0.2", "--output", "run"]
    flags += ["--logging_backend", "both", "killing:Kill"]
    keep = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    path = os.environ.get("PYTHONPATH", str(Path.cwd()))
    own = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "PYTHONPATH": path}
    own["WANDB__SERVICE_WAIT"] = "240"  # seconds for its process to start
    for code in (-signal.SIGKILL, 0):
        done = subprocess.run(
            command(*flags), cwd=here, env=keep | own, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr
    run = Run(here / "run", 0, done.stderr)
    assert run.events.count("resume") == 1
    return run


def numbers(line: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in line.items() if key not in ("step", "event")}


def test_tensorboard_has_every_number_of_the_log_once(resumed: Run) -> None:
    expected: dict[str, dict[int, float]] = {}
    for line in resumed.lines:
        if "event" not in line:
            for name, value in numbers(line).items():
                # Where there is a line and an evaluation, the line's tokens and time count.
                expected.setdefault(name, {}).setdefault(line["step"], float(np.float32(value)))
    found = read_back(resumed.path / "logs")
    assert found == expected


def test_histograms_of_every_layer_are_there_at_each_evaluation(resumed: Run) -> None:
    found: dict[str, list[int]] = {}
    files = sorted((resumed.path / "logs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for event in [event for file in files for event in tensorboard_events(file)]:
        for value in event.summary.value:
            if value.HasField("histo"):
                assert sum(value.histo.bucket) == value.histo.num > 0
                found.setdefault(value.tag, []).append(event.step)
    assert {"weights/embedding", "weights/q/0", "gradients/q/0"} <= {*found}
    assert {step for steps in found.values() for step in steps} == {3, 6, 9}


def test_wandb_has_every_row_once(resumed: Run) -> None:
    files = sorted((resumed.path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1, "one run"
    rows = [row for file in files for data in _records(file.read_bytes()) if (row := _values(data))]
    metrics = [row for row in rows if "tokens" in row]

    def key(row: dict[str, Any]) -> tuple[int, bool]:
        return row["step"], "eval/loss" in row

    lines = [line for line in resumed.lines if "event" not in line]
    assert sorted(map(key, metrics)) == sorted(map(key, lines))
    by_key = {key(line): line for line in lines}
    for row in metrics:
        line = by_key[key(row)]
        assert {*numbers(row)} >= {*numbers(line)}
        same = {
            name: value for name, value in numbers(line).items() if not CHANGING.fullmatch(name)
        }
        assert {name: row[name] for name in same} == same
    assert sum("weights/q/0._type" in row or "weights/q/0.bins" in row for row in rows) >= 3
