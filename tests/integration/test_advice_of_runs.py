"""Each piece of advice from a small run that calls for it, and none from one near it.

Only the least time to judge is shortened, or made endless for runs whose time is not judged. What
only a GPU can report is faked where it is read: the memory of a device, its peak rate, and NVML.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Run
from .nursery import MAIN_WAITS, MODEL, Nursery, of_process

pytestmark = pytest.mark.slow

FLAGS = [*MODEL, "--max_tokens", "32", "--batch_size", "8", "--logging_backend", "none"]
FLAGS += ["--logging_steps", "1", "--lr", "0.003", "--warmup_steps", "10"]
# Flags that follow override these.
RARELY = ["--eval_steps", "1000000", "--save_steps", "1000000"]

Advised = Callable[..., list[str]]


def words(count: int, seed: int) -> str:
    """Text that a model can learn but not know by heart."""
    draw = random.Random(seed)
    names = ["the cat", "a dog", "my aunt", "no one", "the old man", "a tall tree"]
    verbs = ["sees", "hears", "likes", "follows", "forgets"]
    return " ".join(
        f"{draw.choice(names)} {draw.choice(verbs)} {draw.choice(names)}." for _ in range(count)
    )


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough text for every run here to see no sentence often."""
    path = tmp_path_factory.mktemp("stories") / "stories.jsonl"
    return write(path, [words(40, seed) for seed in range(400)])


@pytest.fixture
def advised(nursery: Nursery, stories: Path, tmp_path: Path) -> Advised:
    """The names of the advice that a run gives; `before` is Python that it runs first."""

    def train(
        steps: int, *flags: object, data: Path = stories, before: str | None = None
    ) -> list[str]:
        path = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        all_flags = [*FLAGS, *RARELY, "--data", data, "--max_steps", steps, *flags]
        child = nursery.start(*all_flags, "--output", path, devices=1, before=before or NEVER)
        assert child.wait() == 0, child.said
        found = [line for line in Run(path, 0, "").lines if line.get("event") == "advice"]
        said = " ".join(child.said.split())
        assert all(line["sentence"] in said for line in found)
        return [line["about"] for line in found]

    return train


# Python for a run whose shares of the time are not judged, however long it takes beside other load.
NEVER = """
from consyn_jax.training.logging import advice
advice.LEAST_SECONDS = float("inf")
"""
# Python for a run whose shares of the time are judged: it is short, and parts of it are slow, so
# slow that the rest takes a small share on a busy machine, too.
SOON = """
from consyn_jax.training.logging import advice
advice.LEAST_SECONDS = 1.0
"""


def slow_data(seconds: float, wait: str = "time.sleep") -> str:
    return (
        SOON
        + f"""
import time
from consyn_jax.data import loader
read = loader.BatchLoader.batch
def batch(self, step):
    {wait}({seconds})
    return read(self, step)
loader.BatchLoader.batch = batch
"""
    )


def late_data(seconds: float) -> str:
    """Every batch comes so long after the run has begun to wait for it, however slow its steps are."""
    return slow_data(seconds, "main_waits") + MAIN_WAITS


def slow_steps(seconds: float) -> str:
    return (
        SOON
        + f"""
import time
from consyn_jax.training.run import recording
count = recording.Recorder.count
def slowly(self, values):
    time.sleep({seconds})
    count(self, values)
recording.Recorder.count = slowly
"""
    )


def test_waiting_for_data(advised: Advised) -> None:
    assert advised(20, before=late_data(0.5)) == ["waiting for data"]
    # The next batch is ready when the step is over.
    assert advised(40, before=slow_data(0.1) + slow_steps(0.3)) == []


def device(used: float, peak: float | None = None) -> str:
    """A device that reports its memory, and perhaps its peak rate; long enough to be judged."""
    stats = {"bytes_limit": 10**9, "peak_bytes_in_use": int(used * 10**9)}
    return (
        slow_steps(0.05)
        + f"""
from consyn_jax.training import loop
recording.memory_stats = lambda: {stats}
loop.bf16_peak = lambda kind: {peak}
"""
    )


def test_memory_nearly_full(advised: Advised) -> None:
    assert advised(40, before=device(0.96)) == ["memory nearly full"]
    assert advised(40, before=device(0.94)) == []


def test_memory_to_spare(advised: Advised) -> None:
    halves = ["--batch_size", 4, "--gradient_accumulation_steps", 2]
    assert advised(40, *halves, before=device(0.4)) == ["memory to spare"]
    assert advised(40, *halves, before=device(0.5)) == []
    assert advised(40, before=device(0.4)) == []  # nothing to join


def test_recomputation_without_need(advised: Advised) -> None:
    assert advised(40, "--gradient_checkpointing", before=device(0.4)) == [
        "recomputation without need"
    ]
    assert advised(40, "--gradient_checkpointing", before=device(0.5)) == []


def test_small_batch(advised: Advised) -> None:
    assert advised(40, before=device(0.1, peak=989e12)) == ["small batch"]
    assert advised(40, before=device(0.1, peak=1e6)) == []  # which these steps use well
    assert advised(40, before=device(0.5, peak=989e12)) == []


def gpus(*reasons: int) -> str:
    """GPUs whose driver gives these reasons for their clocks."""
    return (
        slow_steps(0.02)
        + f"""
import sys, types
module = types.ModuleType("pynvml")
module.NVMLError, module.NVML_CLOCK_SM = RuntimeError, 1
module.nvmlInit = module.nvmlShutdown = lambda: None
module.nvmlDeviceGetHandleByUUID = lambda uuid: int(uuid[-1])
module.nvmlDeviceGetClockInfo = lambda handle, kind: 345
module.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: {reasons}[handle]
sys.modules["pynvml"] = module
from consyn_jax.training import open_run
from consyn_jax.training.logging import clock_watch
open_run.gpus_in_use = lambda: ["GPU-0", "GPU-1"]
clock_watch.EVERY_S = 0.01
"""
    )


def test_a_gpu_that_throttles(advised: Advised) -> None:
    assert advised(30, before=gpus(0x4, 0x40)) == ["a GPU throttles"]  # too hot
    assert advised(30, before=gpus(0x4, 0x4)) == []  # the power limit, as on every busy GPU


def test_spikes(advised: Advised) -> None:
    flags = ["--max_grad_norm", 0, "--scheduler", "constant", "--optimizer", "adamw"]
    assert advised(150, *flags, "--lr", 0.1, "--beta2", 0.5) == ["rate too high"]
    assert advised(150, *flags, "--lr", 0.003) == []


def test_most_steps_clipped(advised: Advised) -> None:
    assert advised(230, "--max_grad_norm", 0.01) == ["most steps clipped"]
    assert advised(230, "--max_grad_norm", 0.7) == []  # many are


def test_rate_too_low(advised: Advised) -> None:
    assert advised(230, "--lr", 1e-9) == ["rate too low"]
    assert advised(230, "--lr", 1e-4, "--max_grad_norm", 0) == []


def test_overfitting(advised: Advised, tmp_path: Path, stories: Path) -> None:
    few = write(tmp_path / "few.jsonl", [words(8, 1)])
    other = write(tmp_path / "other.jsonl", [words(30, 2)])
    flags = ["--eval_steps", 60, "--lr", 0.01, "--validation", other]
    assert advised(600, *flags, data=few) == ["overfitting"]
    assert advised(600, *flags, data=stories) == []


def test_plateau(advised: Advised, tmp_path: Path) -> None:
    """A rate that lets nothing happen any more; too few steps to say that it never did."""
    held_out = write(tmp_path / "held-out.jsonl", [words(40, -1)])
    flags = ["--eval_steps", 15, "--validation", held_out, "--lr"]
    assert advised(150, *flags, 1e-9) == ["plateau"]
    assert advised(150, *flags, 0.01) == []


def test_evaluations_too_frequent(advised: Advised, tmp_path: Path) -> None:
    many = write(tmp_path / "many.jsonl", [words(600, -1)])
    few = write(tmp_path / "few.jsonl", [words(100, -1)])
    flags = ["--eval_steps", 2, "--validation", many]
    assert advised(40, *flags, before=slow_steps(0.01)) == ["evaluations too frequent"]
    flags = ["--eval_steps", 60, "--validation", few]
    assert advised(80, *flags, before=slow_steps(0.3)) == []


def test_saves_too_frequent(advised: Advised) -> None:
    assert advised(60, "--save_steps", 1, before=slow_steps(0.03)) == ["saves too frequent"]
    assert advised(60, "--save_steps", 30, before=slow_steps(0.3)) == []


def slow_disk(seconds: float, step_s: float) -> str:
    """A disk whose flushes take long; the run itself does not wait for them."""
    return (
        slow_steps(step_s)
        + f"""
import os
from consyn_jax.training.checkpointing import commit
advice.LONG_WRITE_S = 2.0
flush = os.fsync
def fsync(descriptor):
    if "ocdbt.process_0/d/" in os.readlink("/proc/self/fd/" + str(descriptor)):
        time.sleep({seconds})
    flush(descriptor)
commit.os.fsync = fsync
"""
    )


def test_slow_storage(advised: Advised) -> None:
    assert "slow storage" in advised(40, "--save_steps", 13, before=slow_disk(2.2, 0.25))
    assert advised(40, "--save_steps", 13, before=slow_disk(0.0, 0.6)) == []


@pytest.mark.parametrize(
    ("late", "expected"),
    [("one", ["imbalance between processes"]), ("all", ["waiting for data"])],
)
def test_imbalance_between_processes(
    late: str, expected: list[str], nursery: Nursery, stories: Path, tmp_path: Path
) -> None:
    slow = late_data(0.8)
    before = SOON + (slow if late == "all" else of_process(1, slow))
    flags = [*FLAGS, *RARELY, "--max_steps", 25, "--data", stories, "--output", tmp_path / "run"]
    children = nursery.together(*flags, before=before)
    assert [child.wait() for child in children] == [0, 0], [child.said for child in children]
    lines = Run(tmp_path / "run", 0, "").lines
    assert [line["about"] for line in lines if line.get("event") == "advice"] == expected
