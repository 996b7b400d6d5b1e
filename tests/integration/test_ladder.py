"""`consyn-tune --ladder` as people run it: kills, more sizes, and mistakes that the data shows."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from consyn_jax.cli import train, tune
from consyn_jax.training.run.lock import RunLock
from consyn_jax.tuning.ladder import ladder_run
from consyn_jax.tuning.ladder.rung_run import RungRun
from consyn_jax.tuning.ladder.scaling_law import LossPoint

from .nursery import SLOW, Nursery

MODEL = [
    *("--model", "haiku", "--hidden_dim", "64", "--num_heads", "4", "--num_kv_heads", "4"),
    *("--mlp_dim", "192"),
    *("--parametrization", "mup", "--tokenizer", "bytes", "--logging_backend", "none"),
    *("--lr", "3e-4"),  # mup multiplies it for these narrow models
    *("--max_tokens", "32", "--batch_size", "8", "--logging_steps", "1"),
]
SIZES = "3.4e3,6.8e3,13e3"
STARTS, ENDS = (4, 8, 16, 32), (5, 10, 20, 40)


def flags(corpus: Path, output: Path, *more: object) -> list[str]:
    given = [*MODEL, "--validation_fraction", "0.2", "--data", corpus, "--output", output]
    return [str(word) for word in [*given, "--max_steps", 40, "--ladder", SIZES, *more]]


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.long
def test_a_ladder_goes_on_after_a_kill_and_its_runs_are_those_of_consyn_train(
    corpus: Path,
    tmp_path: Path,
    nursery: Nursery,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Intervals, of which nothing is asked here, took half of the time.
    monkeypatch.setattr(ladder_run, "DRAWS", 20)
    output = tmp_path / "ladder"
    sizes = output / "sizes"
    process = nursery.start(*flags(corpus, output), command="tune", devices=8)
    log = sizes / "3392-decay-8" / "metrics.jsonl"
    while not log.exists():
        assert process.alive, process.said
        time.sleep(0.01)
    process.signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = (sizes / "3392" / "metrics.jsonl").read_bytes()

    assert tune.main(flags(corpus, output)) == 0
    said = capfd.readouterr()
    assert (sizes / "3392" / "metrics.jsonl").read_bytes() == before
    assert "reads the training data" in said.err
    assert "--tokens_per_parameter is 20, but the largest size gets only 0.764," in said.err
    assert "The shortest run has 5 steps" in said.err
    assert said.out.splitlines()[0].split()[:2] == ["parameters", "tokens"]
    found = json.loads((output / "ladder.json").read_text())
    assert [point["parameters"] for point in found["points"]] == [
        size for size in (3392, 6784, 13408) for _ in ENDS
    ]
    assert [point["tokens"] for point in found["points"][:4]] == [end * 8 * 32 for end in ENDS]
    assert {path.name for path in sizes.iterdir()} == {
        f"{size}{end}"
        for size in (3392, 6784, 13408)
        for end in ("", *(f"-decay-{start}" for start in STARTS[:-1]))
    }
    for path in sizes.iterdir():
        assert not (path / "checkpoints").exists()
    assert set(json.loads((sizes / "6784" / "gradient_noise.json").read_text())) == {
        str(start) for start in STARTS
    }
    assert "<circle" in (output / "ladder.html").read_text()

    config = sizes / "6784" / "config.yaml"
    alone = tmp_path / "alone"
    given = ["--config", str(config), "--output", str(alone), "--quiet"]
    assert train.main(given) == 0
    assert train.main([*given, "--decay_from", "16"]) == 0
    for name in ("", "-decay-16"):
        ours, theirs = lines(sizes / f"6784{name}"), lines(tmp_path / f"alone{name}")
        for key in ("train/loss", "train/learning_rate", "eval/loss"):
            mine = [line[key] for line in ours if key in line]
            assert mine == pytest.approx([line[key] for line in theirs if key in line], rel=1e-5)
            assert mine

    # The same command has nothing to train; another size is added to those that are there.
    capfd.readouterr()
    times = {path: (path / "metrics.jsonl").stat().st_mtime_ns for path in sizes.iterdir()}
    assert tune.main(flags(corpus, output, "--ladder", f"{SIZES},27e3")) == 0
    assert len(json.loads((output / "ladder.json").read_text())["points"]) == 16
    assert all((path / "metrics.jsonl").stat().st_mtime_ns == at for path, at in times.items())

    # A kill may come before the last states are removed, and the noise is no part of a run.
    (sizes / "6784" / "gradient_noise.json").unlink()
    (sizes / "3392-decay-8" / "checkpoints" / "10").mkdir(parents=True)
    assert tune.main(flags(corpus, output)) == 0
    assert not (sizes / "3392-decay-8" / "checkpoints").exists()
    assert len(json.loads((output / "ladder.json").read_text())["points"]) == 12

    for more, change in (
        (["--weight_decay", "0.3"], "--weight_decay was 0.1 and is 0.3"),
        (["--lr", "0.1"], "lr was 0.0003 and is 0.1"),
        (["--max_steps", "80"], "total_steps was 40 and is 80"),
    ):
        assert tune.main(flags(corpus, output, *more)) == 2
        assert f"contains another run: {change}" in capfd.readouterr().err


@pytest.mark.slow
def test_a_size_that_was_cut_short_goes_on_with_its_own_flags_only(
    corpus: Path, tmp_path: Path, nursery: Nursery, capfd: pytest.CaptureFixture[str]
) -> None:
    """The advice does not name --overwrite_schedule, which consyn-tune refuses."""
    output = tmp_path / "ladder"
    process = nursery.start(*flags(corpus, output), command="tune", devices=8, before=SLOW)
    size = output / "sizes" / "3392"
    while not (size / "checkpoints" / "4").exists():
        assert process.alive, process.said
        time.sleep(0.01)
    process.signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert tune.main(flags(corpus, output, "--max_steps", "80")) == 2
    said = capfd.readouterr().err
    assert f"{size} contains another run: total_steps was 40 and is 80. Give another" in said


def test_a_ladder_that_another_process_trains_is_not_deleted(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    size = tmp_path / "ladder" / "sizes" / "3392"
    size.mkdir(parents=True)
    (size.parent / "notes.txt").write_text("a file of somebody")
    lock = RunLock(size)
    try:
        assert tune.main(flags(corpus, tmp_path / "ladder", "--overwrite")) == 2
    finally:
        lock.release()
    assert f"--output {size} is in use by another process" in capfd.readouterr().err
    assert size.exists()


def test_too_few_losses_are_an_error_and_no_endless_fit(
    corpus: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As of runs that a callback has ended."""
    monkeypatch.setattr(RungRun, "run", lambda _: None)
    for count in (0, 1):
        points = [LossPoint(1e5, 1e6, 2.0)] * count
        monkeypatch.setattr(RungRun, "points", lambda _, points=points: points)
        assert tune.main(flags(corpus, tmp_path / "ladder")) == 2
        assert f"Only {3 * count} of 12 runs have a loss" in capfd.readouterr().err


def test_a_mistake_that_only_the_plan_shows_comes_before_the_first_size(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "ladder"
    for more, sentence in (
        (["--max_steps", 39], "is 39 steps of 256 tokens, but the 4 runs of this size need 40."),
        (["--epochs", 1], "tokens, but the 4 runs of this size need 40."),
        (["--warmup_steps", 5], "Warm-up of 5 steps is too long for the shortest run"),
        (["--ladder", "3.3e3,3.4e3,1e5"], "same shape for two sizes near 3,400 parameters"),
    ):
        assert tune.main(flags(corpus, output, *more)) == 2
        assert sentence in capfd.readouterr().err
        assert not (output / "sizes").exists()
