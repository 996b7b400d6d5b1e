"""Power cuts: what is on the disk at a random moment is all that the next start has.

The run writes to an ext4 file system in a file. At random moments all of its processes are stopped,
and the file is copied: what the kernel had not written by then is lost, as in a power cut. Each copy
is mounted, which replays the journal, and the command is run again on it.

Ten moments here; a hundred, with a record of what was found:

    CONSYN_POWER_CUTS=100 CONSYN_POWER_RECORD=power.json pytest -m slow tests/integration/test_power_cuts.py
"""

import datetime
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from consyn_jax.training.run.model_manifest import disagreement

from .conftest import Run, cannot_run
from .nursery import FLAGS, Nursery

CUTS = int(os.environ.get("CONSYN_POWER_CUTS", "10"))
RECORD = os.environ.get("CONSYN_POWER_RECORD")
IMAGE_MB, AFTER_END = 96, 2  # cuts right after the process has ended
RUN = [*FLAGS, "--save_steps", "2", "--eval_steps", "3", "--load_best_model_at_end"]
STEPS = range(1, 17)
UNHURRIED = """
import time
from consyn_jax.data import loader
inner = loader.BatchLoader.batch
def batch(self, step):
    time.sleep(0.05)
    return inner(self, step)
loader.BatchLoader.batch = batch
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900 + 120 * CUTS)]


def refusal() -> str | None:
    """The reason why no file system can be mounted here; None if one can."""
    if os.geteuid():
        return "mounting a file system needs root"
    missing = [tool for tool in ("mkfs.ext4", "mount", "umount") if shutil.which(tool) is None]
    if missing or not Path("/dev/loop-control").exists():
        return f"{missing[0] if missing else '/dev/loop-control'} is missing"
    return None


@contextmanager
def mounted(image: Path, place: Path) -> Iterator[Path]:
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True)
    try:
        yield place
    finally:
        unmount(place)


def unmount(place: Path) -> None:
    for _ in range(50):
        if subprocess.run(["umount", str(place)], check=False, capture_output=True).returncode == 0:
            return
        time.sleep(0.1)
    subprocess.run(["umount", "-l", str(place)], check=True)


def copied(image: Path, to: Path) -> Path:
    subprocess.run(["cp", "--sparse=always", str(image), str(to)], check=True)
    return to


@pytest.fixture(scope="module")
def whole(nursery: Nursery, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that nobody disturbs, and how long it takes."""
    path = tmp_path_factory.mktemp("power") / "run"
    child = nursery.start(*RUN, "--data", corpus, "--output", path, before=UNHURRIED)
    assert child.wait(300) == 0, child.said
    return Run(path, 0, child.said)


def cut(nursery: Nursery, corpus: Path, tmp_path: Path, seconds: float) -> list[Path]:
    """The disk at random moments of one run, and right after its end."""
    chance, images = random.Random(CUTS), list[Path]()
    image = tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(IMAGE_MB << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    moments = sorted(chance.uniform(0, 1) for _ in range(CUTS - AFTER_END))
    with mounted(image, tmp_path / "mounted") as place:
        child = nursery.start(*RUN, "--data", corpus, "--output", place / "run", before=UNHURRIED)
        began = time.monotonic()
        while not (place / "run" / "metrics.jsonl").exists() and child.alive:
            time.sleep(0.005)
        for moment in moments:
            time.sleep(max(0.0, began + moment * seconds - time.monotonic()))
            if not child.alive:
                break
            child.stop()
            images.append(copied(image, tmp_path / f"cut-{len(images)}"))
            child.signal(signal.SIGCONT)
        assert child.wait(300) == 0, child.said
        while len(images) < CUTS:
            images.append(copied(image, tmp_path / f"cut-{len(images)}"))
            time.sleep(0.2)
    return images


def holes(run: Run) -> list[int]:
    """Steps that the log neither has nor says to have lost."""
    there = {line["step"] for line in run.lines if "train/loss" in line}
    lost = {
        step
        for line in run.lines
        if "log_ended_at" in line
        for step in range(line["log_ended_at"] + 1, line["step"] + 1)
    }
    return [step for step in STEPS if step not in there | lost]


@pytest.mark.long
def test_power_cuts_at_random_moments(
    whole: Run, nursery: Nursery, corpus: Path, tmp_path: Path
) -> None:
    if reason := refusal():
        cannot_run(reason, is_asked_for="CONSYN_POWER_CUTS" in os.environ)
    times = [line["time_s"] for line in whole.lines]
    images = cut(nursery, corpus, tmp_path, seconds=max(times) + 4)
    found: list[dict[str, Any]] = []
    for number, image in enumerate(images):
        with mounted(image, tmp_path / "again") as place:
            path = place / "run"
            models = [name for name in ("best", "final") if (path / name).exists()]
            wrong = {name: disagreement(path / name) for name in models}
            assert not any(wrong.values()), (number, wrong)
            steps = sorted(
                int(each.name) for each in path.glob("checkpoints/*") if each.name.isdecimal()
            )
            child = nursery.start(*RUN, "--data", corpus, "--output", path)
            assert child.wait() == 0, (number, child.said)
            assert "Traceback" not in child.said
            run = Run(path, 0, child.said)
            assert run.weights == whole.weights, number
            assert holes(run) == [], (number, run.lines)
            assert disagreement(path / "final") is None
            assert run.events[-1] == "finish"
            found.append({"checkpoints": steps, "models": models})
        image.unlink()
    assert len(found) == CUTS
    print(found)
    if RECORD:
        about = {
            "cuts": CUTS,
            "file_system": "ext4 on a loop device",
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "kernel": platform.release(),
            "date": str(datetime.datetime.now(datetime.UTC).date()),
        }
        Path(RECORD).write_text(json.dumps(about | {"found": found}, indent=1) + "\n")
