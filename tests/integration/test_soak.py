"""A run that is killed again and again ends as the run that nobody touched: bit for bit on the same
devices; on any others, and in two
processes instead of one, from the same samples and with the same losses.

Short here. The whole of it, with a record of what was found:

    CONSYN_SOAK_KILLS=50 CONSYN_SOAK_RECORD=soak.json pytest -m slow tests/integration/test_soak.py
"""

import datetime
import itertools
import json
import os
import platform
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import pytest

from consyn_jax.distributed.process_group import LOST

from .conftest import MODEL, Run
from .nursery import DEVICES, Child, Nursery, held

KILLS = int(os.environ.get("CONSYN_SOAK_KILLS", "3"))
RECORD = os.environ.get("CONSYN_SOAK_RECORD")
STEPS, BATCH = max(40, 8 * KILLS), 8
START_S, LATE_S = 3.0, 0.05  # about what a process takes to its first step, and a few steps
FLAGS = [
    *MODEL,
    "--max_steps",
    STEPS,
    "--max_tokens",
    "32",
    "--batch_size",
    BATCH,
    "--validation_fraction",
    "0.2",
    "--dropout",
    "0.1",
]
FLAGS += [
    "--logging_steps",
    "3",
    "--eval_steps",
    "7",
    "--save_steps",
    "5",
    "--logging_backend",
    "none",
    "--quiet",
]
TWO = "two processes"

pytestmark = pytest.mark.timeout(900 + 120 * KILLS)

# Which sample stands at which position, by number and by content, as each process reads it.
NOTING = """
import json, os, zlib
from consyn_jax.data import loader
inner, file = loader.Shuffled.at, os.open({file!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def at(self, positions):
    rows = inner(self, positions)
    ids = loader.ids_at(self.seed, positions, len(self.dataset), self.shuffle).tolist()
    texts = [zlib.crc32(row.tobytes()) for row in rows["input_ids"]]
    os.write(file, json.dumps(list(zip(positions.tolist(), ids, texts))).encode() + b"\\n")
    return rows
loader.Shuffled.at = at
"""


@dataclass(frozen=True)
class Survivor:
    """A run, the samples that were read for it by position, and what became of it."""

    run: Run
    samples: dict[int, tuple[int, int]]
    facts: dict[str, Any]


def launched(
    nursery: Nursery, corpus: Path, path: Path, kind: str, *, ends: bool = True
) -> list[Child]:
    """The run in `path` goes on: on so many devices, or in two processes.

    Args:
        ends: otherwise it gets no data for its last steps, and waits to be killed.
    """
    flags, before = (
        [*FLAGS, "--data", corpus, "--output", path],
        NOTING.format(file=str(path) + ".samples"),
    )
    if not ends:
        before += held(STEPS - 4, path.with_name("never"))
    return (
        nursery.together(*flags, before=before)
        if kind == TWO
        else [nursery.start(*flags, devices=int(kind), before=before)]
    )


def last_step(metrics: Path) -> int:
    """The newest step in metrics.jsonl, whose last line may be torn."""
    lines = metrics.read_bytes().splitlines() if metrics.exists() else []
    whole = (line for line in reversed(lines) if line.endswith(b"}"))
    return next((json.loads(line)["step"] for line in whole), 0)


def changed(metrics: Path) -> int:
    return metrics.stat().st_mtime_ns if metrics.exists() else 0


def await_moment(
    metrics: Path, before: int, children: list[Child], target: int, chance: random.Random
) -> None:
    """The time to die: while the process starts, or a little after it has itself come to step
    `target`.

    Args:
        before: when `metrics` had last been changed as the process was started.
    """
    if chance.random() < 0.25:
        time.sleep(chance.uniform(0, START_S))
        return
    deadline = time.monotonic() + 240
    while changed(metrics) == before or last_step(metrics) < target:
        assert all(child.alive for child in children), [child.said for child in children]
        assert time.monotonic() < deadline, [child.said for child in children]
        time.sleep(0.002)
    time.sleep(chance.uniform(0, LATE_S))


def killed_over_and_over(
    nursery: Nursery,
    corpus: Path,
    path: Path,
    kinds: Iterator[str],
    seed: int,
) -> Survivor:
    """A run that is killed `KILLS` times, and goes on each time as the next of `kinds`. Of two
    processes, one is killed."""
    chance, died, lived, began = random.Random(seed), [], [], time.monotonic()
    metrics = path / "metrics.jsonl"
    for n in range(KILLS):
        lived.append(next(kinds))
        before = changed(metrics)
        children = launched(nursery, corpus, path, lived[-1], ends=False)
        await_moment(
            metrics,
            before,
            children,
            chance.randint(STEPS * n // (KILLS + 2) + 1, STEPS * (n + 1) // (KILLS + 2)),
            chance,
        )
        victim = chance.choice(children)
        assert all(child.alive for child in children), [child.said for child in children]
        victim.signal(signal.SIGKILL)
        for child in children:
            assert child.wait() in (
                (-signal.SIGKILL,) if child is victim else (LOST, -signal.SIGABRT)
            ), child.said
        died.append(last_step(metrics))
    lived.append(next(kinds))
    children = launched(nursery, corpus, path, lived[-1])
    assert [child.wait(300) for child in children] == [0] * len(children), [
        child.said for child in children
    ]
    seconds = round(time.monotonic() - began, 1)
    facts = {
        "kills": len(died),
        "restarts": len(lived) - 1,
        "steps": STEPS,
        "killed_at_steps": died,
        "devices": lived,
        "seconds": seconds,
    }
    return Survivor(Run(path, 0, children[0].said), samples(path), facts)


def samples(path: Path) -> dict[int, tuple[int, int]]:
    """(number, content) of the sample at each position that the run came to. However often one was
    read, it was the same."""
    found: dict[int, tuple[int, int]] = {}
    for line in Path(f"{path}.samples").read_text().splitlines():
        for position, *sample in json.loads(line):
            assert found.setdefault(position, tuple(sample)) == tuple(sample), position
    return {position: sample for position, sample in found.items() if position < STEPS * BATCH}


def largest_difference(run: Run, whole: Run) -> float:
    """Of the losses of training and evaluation, relative."""
    largest = 0.0
    for name in ("train/loss", "eval/loss"):
        ours, theirs = (
            {line["step"]: line[name] for line in each.numbers if name in line}
            for each in (run, whole)
        )
        assert ours.keys() == theirs.keys()
        largest = max(largest, *(abs(ours[step] / theirs[step] - 1) for step in theirs))
    return largest


def note(name: str, survivor: Survivor, whole: Survivor) -> dict[str, Any]:
    """What was found, and into the record."""
    run = survivor.run
    found = survivor.facts | {
        "samples_identical": survivor.samples == whole.samples,
        "largest_loss_difference": largest_difference(run, whole.run),
        "bit_identical": (run.numbers, run.weights) == (whole.run.numbers, whole.run.weights),
    }
    print(name, found)
    if RECORD:
        file = Path(RECORD)
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parent,
        ).stdout.strip()
        machine = {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "jax": jax.__version__,
            "commit": commit,
        }
        machine["date"] = str(datetime.datetime.now(datetime.UTC).date())
        file.write_text(
            json.dumps(
                (json.loads(file.read_text()) if file.exists() else {}) | machine | {name: found},
                indent=1,
            )
            + "\n"
        )
    return found


@pytest.fixture(scope="module")
def whole(nursery: Nursery, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Survivor:
    """The run that nobody touched."""
    path = tmp_path_factory.mktemp("soak") / "run"
    (child,) = launched(nursery, corpus, path, str(DEVICES))
    assert child.wait(300) == 0, child.said
    assert len(samples(path)) == STEPS * BATCH
    return Survivor(Run(path, 0, child.said), samples(path), {})


@pytest.mark.slow
def test_killed_at_random_moments(
    whole: Survivor,
    nursery: Nursery,
    corpus: Path,
    tmp_path: Path,
) -> None:
    survivor = killed_over_and_over(
        nursery, corpus, tmp_path / "run", itertools.repeat(str(DEVICES)), seed=1
    )
    found = note("same devices", survivor, whole)
    assert found["bit_identical"]
    assert found["samples_identical"]
    best = Path("best") / "model.safetensors"
    assert (survivor.run.path / best).read_bytes() == (whole.run.path / best).read_bytes()
    assert survivor.run.events.count("save") == whole.run.events.count("save")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_killed_and_gone_on_with_other_devices(
    whole: Survivor,
    nursery: Nursery,
    corpus: Path,
    tmp_path: Path,
) -> None:
    def others() -> Iterator[str]:
        chance, kinds = random.Random(0), [TWO, "1", "8", "2", "4"]
        while True:
            yield from kinds
            chance.shuffle(kinds)

    found = note(
        "other devices",
        killed_over_and_over(nursery, corpus, tmp_path / "run", others(), seed=2),
        whole,
    )
    assert found["samples_identical"]
    assert found["largest_loss_difference"] < 1e-5
