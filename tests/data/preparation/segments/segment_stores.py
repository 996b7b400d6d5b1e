"""Stores of one writer and of many, to compare, and tasks that stop."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from consyn_jax.data.preparation.cached_store import prepare
from consyn_jax.data.preparation.segments import engines
from consyn_jax.data.preparation.segments.job import Job
from consyn_jax.data.preparation.segments.tasks import TasksHere
from consyn_jax.prepare_config import CorpusOptions, EngineOptions

SHARD_TOKENS = 40_000
SEGMENT_BYTES = 20_000
RULES: dict[str, Any] = {
    "tokenizer": "bytes",
    "near_duplicates": 0.8,
    "validation_fraction": 0.1,
    "on_bad_rows": "skip",
    "invalid_utf8": "replace",
    "num_workers": 0,
}


def texts(count: int, words: int, seed: int = 1) -> list[str]:
    rng = random.Random(seed)
    known = ["tokens", "lie", "in", "shards", "é", "e\u0301", "日本", "and", "\x07", "documents"]
    return [
        " ".join(rng.choice(known) + str(rng.randrange(90)) for _ in range(rng.randrange(words)))
        for _ in range(count)
    ]


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def by_many(data: Path, output: Path, **more: Any) -> dict[str, bytes]:
    engine = EngineOptions(shared_directory=str(output.parent / "shared"))
    rules = CorpusOptions(data=(str(data),), **{**RULES, **more})
    prepare(rules, output=output, test_fraction=0.05, engine=engine)
    assert list((output.parent / "shared").iterdir()) == []
    return files(output)


def by_one(data: Path, output: Path, **more: Any) -> dict[str, bytes]:
    rules = CorpusOptions(data=(str(data),), **{**RULES, **more})
    prepare(rules, output=output, test_fraction=0.05)
    return files(output)


def assert_same(data: Path, place: Path, **more: Any) -> dict[str, Any]:
    """Compare both stores; return the report."""
    expected = by_one(data, place / "one", **more)
    found = by_many(data, place / "many", **more)
    assert sorted(found) == sorted(expected)
    assert [name for name in found if found[name] != expected[name]] == []
    report: dict[str, Any] = json.loads(expected["report.json"])
    return report


class Stops(TasksHere):
    """Stops as a killed command does, and notes the tasks that ran, by phase.

    Args:
        after: number of tasks after which it stops.
        phase: the phase in which they are counted; "" for all.
    """

    def __init__(self, after: int, phase: str = "") -> None:
        self.left, self._phase, self.ran = after, phase, dict[str, list[int]]()
        self.job: Job | None = None

    def run(
        self, job: Job, phase: str, numbers: Sequence[int], done: Callable[[int], None]
    ) -> None:
        self.job = job
        for number in numbers:
            if phase == self._phase or not self._phase:
                if not self.left:
                    place = job.place(phase, 9)
                    place.with_name(".0000009.0123456789abcdef.new").mkdir(parents=True)
                    raise KeyboardInterrupt
                self.left -= 1
            super().run(job, phase, [number], lambda _: None)
            self.ran.setdefault(phase, []).append(number)


def watched(monkeypatch: pytest.MonkeyPatch) -> Stops:
    """Tasks that never stop, for the next commands; they note which ones ran."""
    tasks = Stops(10_000)
    monkeypatch.setattr(engines, "TasksHere", lambda: tasks)
    return tasks


def stopped(
    monkeypatch: pytest.MonkeyPatch, data: Path, output: Path, after: int, phase: str, **more: Any
) -> Job:
    """Stop many writers after so many tasks of a phase; return their job."""
    tasks = Stops(after, phase)
    with monkeypatch.context() as patch:
        patch.setattr(engines, "TasksHere", lambda: tasks)
        with pytest.raises(KeyboardInterrupt):
            by_many(data, output, **more)
    assert tasks.job is not None
    return tasks.job
