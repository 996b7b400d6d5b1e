"""The watchdog alone. Whole runs that get stuck are in tests/integration/test_processes.py."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from consyn_jax.distributed.process_group import CONTINUE_ADVICE, LOST
from consyn_jax.training.runtime import watchdog as module
from consyn_jax.training.runtime.watchdog import (
    COMPILING,
    EVALUATING,
    SAVING,
    STEPPING,
    WAITING,
    Watchdog,
    stragglers,
)


class Clock:
    """Time that a test sets; `time.monotonic` of the module."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_the_limit_follows_step_times_and_phases(clock: Clock, tmp_path: Path) -> None:
    with Watchdog(tmp_path, minutes=1.0) as watchdog:
        assert watchdog.limit_s == 6 * 60  # before any step time is known
        watchdog.at(COMPILING, 0)
        assert watchdog.limit_s == 6 * 60
        for step in range(1, 6):
            clock.now += 1 if step != 4 else 1000  # an evaluation between
            watchdog.at(STEPPING, step)
        assert watchdog.limit_s == 60
        watchdog.at(WAITING, 6)
        assert watchdog.limit_s == 60
        watchdog.at(SAVING, 6)
        assert watchdog.limit_s == 6 * 60
        for step in range(6, 20):
            clock.now += 30
            watchdog.at(STEPPING, step)
        assert watchdog.limit_s == 20 * 30


def test_stragglers() -> None:
    def progress(*each: tuple[int, str]) -> list[dict[str, object]]:
        return [{"step": step, "phase": phase} for step, phase in each]

    assert stragglers(progress((8, STEPPING), (7, STEPPING), (8, STEPPING))) == [1]
    assert stragglers(progress((7, STEPPING), (7, WAITING), (7, STEPPING))) == [1]
    assert stragglers(progress((7, STEPPING), (6, STEPPING), (6, EVALUATING))) == [2]
    assert stragglers(progress((7, STEPPING), (7, STEPPING))) == [0, 1]
    assert stragglers([{"step": 0, "phase": STEPPING}, {}]) == [1]  # it has not begun


PROCESS = """
import sys, threading, time
from pathlib import Path
import consyn_jax.training.runtime.watchdog as module
from consyn_jax.errors import leave_out_overwrite
from consyn_jax.training.runtime.watchdog import STEPPING, WAITING, Watchdog
module.POLL_S = 0.2
leave_out_overwrite()
beats = []
with Watchdog(Path(sys.argv[1]), float(sys.argv[2]), beat=lambda: beats.append(1)) as watchdog:
    for step in range(1, 40):
        watchdog.at(STEPPING, step)
        time.sleep(0.02)
    watchdog.at(WAITING, 40)
    def stand_still():
        time.sleep(float(sys.argv[3]))
    stand_still()
print("beats" if beats else "no beat")
"""


def start(path: Path, minutes: float, still_s: float) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(path), str(minutes), str(still_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_without_progress_ends_with_its_stacks(tmp_path: Path) -> None:
    with start(tmp_path, 0.02, 60) as process:
        _, output = process.communicate(timeout=240)
    assert process.returncode == LOST
    assert output.startswith("\nconsyn-train: No progress for ")
    assert output.endswith(
        f": the run is waiting for data at step 40. The stack traces are in {tmp_path / 'stacks'}."
        f" {CONTINUE_ADVICE.replace('command', 'command without --overwrite')}\n"
    )
    stacks = (tmp_path / "stacks" / "rank-0.txt").read_text()
    assert "in stand_still" in stacks
    assert "in _watch" in stacks
    about = json.loads((tmp_path / "stacks" / "rank-0.json").read_text())
    assert (about["process"], about["phase"], about["step"], about["pid"]) == (
        0,
        "waiting for data",
        40,
        process.pid,
    )
    assert about["still_s"] >= 1.2
    assert 0.02 <= about["median_step_s"] < 1


def test_with_0_minutes_it_only_beats(tmp_path: Path) -> None:
    with start(tmp_path, 0, 1) as process:
        output, errors = process.communicate(timeout=240)
    assert (process.returncode, output, errors) == (0, "beats\n", "")
    assert not (tmp_path / "stacks").exists()


def test_time_while_the_process_was_stopped_does_not_count(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ended: list[float] = []
    monkeypatch.setattr(Watchdog, "_end", lambda self: ended.append(self._still_s))
    with Watchdog(tmp_path, minutes=0.01) as watchdog:
        for step in range(1, 4):
            clock.now += 0.001
            watchdog.at(STEPPING, step)
        time.sleep(0.2)
        assert watchdog.limit_s == pytest.approx(0.6)
        clock.now += 3600  # the lid was closed
        time.sleep(0.3)
        assert not ended
        deadline = time.monotonic() + 120
        while not ended:
            assert time.monotonic() < deadline
            clock.now += 0.1
            time.sleep(0.1)
