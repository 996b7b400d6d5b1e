"""A run that is killed again and again ends as the run that nobody touched.

Short here; the whole of it: `CONSYN_SOAK_KILLS=50 pytest tests/integration/test_soak.py`.
"""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from .conftest import MODEL, Run, start

KILLS = int(os.environ.get("CONSYN_SOAK_KILLS", "3"))
STEPS = max(40, 8 * KILLS)
START_S = 6.0  # about what a process takes to its first step
FLAGS = [*MODEL, "--max_steps", str(STEPS), "--max_tokens", "32", "--batch_size", "8", "--validation_fraction", "0.2", "--dropout", "0.1"]
FLAGS += ["--logging_steps", "3", "--eval_steps", "7", "--save_steps", "5", "--logging_backend", "none", "--quiet", "--optimizer", "muon"]


def last_step(run: Path) -> int:
    """The newest step in metrics.jsonl, whose last line may be torn."""
    lines = (run / "metrics.jsonl").read_bytes().splitlines() if (run / "metrics.jsonl").exists() else []
    whole = (line for line in reversed(lines) if line.endswith(b"}"))
    return next((json.loads(line)["step"] for line in whole), 0)


def moment(path: Path, running: "subprocess.Popen[str]", target: int, chance: random.Random) -> None:
    """Wait for the time to die: while the process starts, or a little after it has come to step `target`."""
    if chance.random() < 0.25:
        time.sleep(chance.uniform(0, START_S))
        return
    deadline = time.monotonic() + 240
    while running.poll() is None and last_step(path) < target and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.1))


def killed_over_and_over(path: Path, flags: Sequence[object], environments: Iterator[dict[str, str]], seed: int) -> tuple[Run, list[int]]:
    """The run, and how far it had come at each kill."""
    chance, died = random.Random(seed), []
    for n in range(KILLS):
        with start([*flags, "--output", path], **next(environments)) as running:
            moment(path, running, chance.randint(1, STEPS * (n + 1) // (KILLS + 1) + 1), chance)
            running.send_signal(signal.SIGKILL)
            running.communicate(timeout=60)
        died.append(last_step(path))
    with start([*flags, "--output", path], **next(environments)) as running:
        _, said = running.communicate(timeout=600)
    return Run(path, running.returncode, said), died


@pytest.fixture(scope="module")
def whole(process: Callable[..., Run], corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = process(tmp_path_factory.mktemp("soak") / "run", *FLAGS, "--data", corpus)
    assert run.code == 0, run.said
    return run


@pytest.mark.timeout(120 + 60 * KILLS)
def test_killed_at_random_moments(whole: Run, corpus: Path, tmp_path: Path) -> None:
    def same() -> Iterator[dict[str, str]]:
        while True:
            yield {}

    run, died = killed_over_and_over(tmp_path / "run", [*FLAGS, "--data", corpus], same(), seed=1)
    print("killed at steps", died)
    assert run.code == 0, run.said
    assert run.numbers == whole.numbers
    assert run.weights == whole.weights
    assert (run.path / "best" / "model.safetensors").read_bytes() == (whole.path / "best" / "model.safetensors").read_bytes()
    assert run.events.count("save") == whole.events.count("save")


@pytest.mark.timeout(120 + 60 * KILLS)
def test_killed_and_gone_on_with_other_devices(whole: Run, corpus: Path, tmp_path: Path) -> None:
    def other() -> Iterator[dict[str, str]]:
        chance = random.Random(2)
        while True:
            yield {"JAX_NUM_CPU_DEVICES": chance.choice("1248")}

    run, died = killed_over_and_over(tmp_path / "run", [*FLAGS, "--data", corpus], other(), seed=2)
    print("killed at steps", died)
    assert run.code == 0, run.said
    for name in ("train/loss", "eval/loss", "tokens"):
        found, expected = ({line["step"]: line[name] for line in r.numbers if name in line} for r in (run, whole))
        assert found.keys() == expected.keys()
        np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
