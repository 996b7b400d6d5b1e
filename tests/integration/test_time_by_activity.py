"""The time by activity adds up to the time from a command's start to its last page, whatever the run
does; little comes after that page."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consyn_jax.cli.train import main
from consyn_jax.data.loader import BatchLoader
from consyn_jax.training.run import live_report
from consyn_jax.training.run.recording import Recorder

from .conftest import MODEL
from .nursery import MAIN_WAITS

pytestmark = pytest.mark.slow

FLAGS: list[object] = [*MODEL, "--max_tokens", 32, "--batch_size", 8, "--logging_steps", 1]
FLAGS += ["--logging_backend", "none", "--validation_fraction", 0.2, "--quiet"]
SLEEP_S = 1.0  # from the time when a step waits for its batch until it comes


def train(path: Path, *flags: object) -> np.ndarray:
    """Run the command, and return the seconds until it began to write its last page, until it had
    written it, which takes a while on a busy machine, and until its last event."""
    at = {}

    def noting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **more: Any) -> Any:
            at[name] = time.time()
            return call(*args, **more)

        return noted

    began = time.time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live_report, "write_report", noting("page", live_report.write_report))
        patch.setattr(Recorder, "event", noting("event", Recorder.event))
        code = main([*map(str, FLAGS), "--output", str(path), *map(str, flags)])
    assert code in (0, 75)
    written = (path / "report.html").stat().st_mtime
    assert time.time() - written < 60
    return np.array([at["page"], written, at["event"]]) - began


def page_s(path: Path) -> dict[str, float]:
    """Seconds of each activity on the page of a run."""
    text = (path / "report.html").read_text().partition('id="points">')[2].partition("</script>")[0]
    (chart,) = (chart for chart in json.loads(text)["charts"] if chart["kind"] == "stack")
    return {line["name"]: line["y"][-1] for line in chart["lines"]}


def check(path: Path, wall_s: np.ndarray) -> dict[str, float]:
    """Check the sum on the page and at each line of the log, and return the page's seconds."""
    spent = page_s(path)
    assert 0.98 * wall_s[0] < sum(spent.values()) < 1.02 * wall_s[1]
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if seconds := [value for name, value in line.items() if name.startswith("time/")]:
            assert sum(seconds) == pytest.approx(line["time_s"], rel=0.02)
    assert lines[-1]["time_s"] == pytest.approx(wall_s[2], rel=0.02)
    return spent


@pytest.fixture
def slow_data(monkeypatch: pytest.MonkeyPatch) -> None:
    inner, waits = BatchLoader.batch, dict[str, Any]()
    exec(MAIN_WAITS, waits)

    def batch(self: BatchLoader, *args: Any) -> Any:
        waits["main_waits"](SLEEP_S)
        return inner(self, *args)

    monkeypatch.setattr(BatchLoader, "batch", batch)


def test_evaluations_saves_and_a_resume(corpus: Path, tmp_path: Path) -> None:
    flags = ["--data", corpus, "--eval_steps", 100, "--save_steps", 100]
    flags += ["--scheduler", "constant"]
    first = train(tmp_path, *flags, "--max_steps", 400)
    spent = check(tmp_path, first)
    assert min(spent[name] for name in ("compute", "evaluation", "saving", "compiling")) > 0
    second = train(tmp_path, *flags, "--max_steps", 600, "--overwrite_schedule")
    check(tmp_path, first[2] + second)


def test_accumulation_from_a_slow_loader(corpus: Path, tmp_path: Path, slow_data: None) -> None:
    flags = ["--data", corpus, "--gradient_accumulation_steps", 4, "--max_steps", 12]
    spent = check(tmp_path, train(tmp_path, *flags))
    assert spent["data"] > 0.9 * 12 * SLEEP_S


def test_ctrl_c(corpus: Path, tmp_path: Path) -> None:
    def press() -> None:
        log = tmp_path / "metrics.jsonl"
        while not log.exists() or log.read_text().count("\n") < 300:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    check(tmp_path, train(tmp_path, "--data", corpus, "--max_steps", 10_000))
