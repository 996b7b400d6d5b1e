"""A run that is stopped and started again is the run that was never stopped, bit for bit."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from consyn_jax.training.loop import Training

from .conftest import MODEL, Run, start

# An epoch is 8 to 9 steps, and evaluation and checkpoints do not fall together.
FLAGS = [
    *MODEL,
    "--max_steps",
    "20",
    "--max_tokens",
    "32",
    "--batch_size",
    "8",
    "--validation_fraction",
    "0.2",
]
FLAGS += [
    "--logging_steps",
    "1",
    "--eval_steps",
    "6",
    "--save_steps",
    "5",
]
TRACKED, FLAGS = FLAGS, [*FLAGS, "--logging_backend", "none"]  # a second one would add to the first

MORE = [pytest.mark.slow, pytest.mark.exhaustive]


@pytest.fixture(scope="module")
def whole(
    process: Callable[..., Run], corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """The run that nobody stopped."""
    run = process(tmp_path_factory.mktemp("whole") / "run", *FLAGS, "--data", corpus)
    assert run.code == 0, run.said
    assert 2 < run.numbers[-1].get("train/epoch", 2.3) < 3 or run.numbers[-2]["train/epoch"] > 2
    return run


@pytest.fixture
def copied(whole: Run, tmp_path: Path) -> Run:
    """The same in a directory of the test's own."""
    return Run(shutil.copytree(whole.path, tmp_path / "run"), whole.code, whole.said)


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, signal.Signals], None]:
    """Send this process a signal while a step's metrics are read."""
    record = Training._record

    def arm(step: int, number: signal.Signals) -> None:
        def and_signal(self: Training, *args: object) -> None:
            record(self, *args)  # type: ignore[arg-type]
            if self.progress.step == step:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(Training, "_record", and_signal)

    return arm


@pytest.mark.parametrize(
    ("step", "number"),
    [
        pytest.param(3, signal.SIGINT, marks=MORE),
        (9, signal.SIGTERM),
        pytest.param(15, signal.SIGTERM, marks=MORE),
    ],
)
def test_stopped_and_resumed(
    step: int,
    number: signal.Signals,
    whole: Run,
    here: Callable[..., Run],
    stop_at: Callable[[int, signal.Signals], None],
    monkeypatch: pytest.MonkeyPatch,
    corpus: Path,
    tmp_path: Path,
) -> None:
    with monkeypatch.context():
        stop_at(step, number)
        stopped = here(tmp_path / "run", *FLAGS, "--data", corpus)
    monkeypatch.undo()
    assert stopped.code == 75
    end = stopped.lines[-1]
    assert (end["event"], end["signal"]) == ("signal", number.name)
    assert step <= end["step"] <= step + 1
    assert (
        f"{number.name} at step {end['step']}: the state is saved in {stopped.path}. Run the same command again to continue."
        in stopped.said
    )
    assert (
        "A second signal at least 2 seconds later stops it at once, without saving." in stopped.said
    )

    resumed = here(
        tmp_path / "run",
        *TRACKED,
        "--data",
        corpus,
        "--quiet",
        "--logging_backend",
        "tensorboard",
        "--keep_last",
        "5",
    )
    assert resumed.code == 0, resumed.said
    assert resumed.numbers == whole.numbers
    assert resumed.weights == whole.weights
    assert resumed.events.count("resume") == 1
    assert (resumed.path / "best" / "model.safetensors").read_bytes() == (
        whole.path / "best" / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_process_that_is_terminated(
    whole: Run, process: Callable[..., Run], corpus: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    with start([*FLAGS, "--data", corpus, "--output", path]) as running:
        metrics, deadline = path / "metrics.jsonl", time.monotonic() + 240
        while (
            running.poll() is None
            and time.monotonic() < deadline
            and not (metrics.exists() and '"train/loss"' in metrics.read_text())
        ):
            time.sleep(0.005)
        running.send_signal(signal.SIGTERM)
        _, said = running.communicate(timeout=240)
    assert running.returncode == 75, said
    assert "Traceback" not in said
    assert Run(path, 75, said).lines[-1]["step"] < 20
    resumed = process(path, *FLAGS, "--data", corpus)
    assert (resumed.code, resumed.numbers, resumed.weights) == (0, whole.numbers, whole.weights)
    assert "goes on" in resumed.said


@pytest.mark.slow
def test_a_process_that_is_killed_goes_on_from_its_last_checkpoint(
    whole: Run, copied: Run, here: Callable[..., Run], corpus: Path, tmp_path: Path
) -> None:
    """SIGKILL between the checkpoint of step 10 and that of step 15, as left on disk: no final/,
    metrics behind the checkpoint."""
    for left in ("15", "20"):
        (copied.path / "checkpoints" / left).rename(tmp_path / left)
    (copied.path / "final").rename(tmp_path / "final")
    lines = [line for line in copied.lines if line["step"] <= 12 and line.get("event") != "finish"]
    (copied.path / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 13, "tok'
    )
    resumed = here(copied.path, *FLAGS, "--data", corpus)
    assert (resumed.code, resumed.numbers, resumed.weights) == (0, whole.numbers, whole.weights)
    assert resumed.events.count("resume") == 1


@pytest.mark.slow
@pytest.mark.exhaustive
def test_an_end_between_the_last_checkpoint_and_the_model(
    whole: Run, copied: Run, here: Callable[..., Run], corpus: Path
) -> None:
    for entry in ("model.safetensors", "config.json"):
        (copied.path / "final" / entry).unlink()
    resumed = here(copied.path, *FLAGS, "--data", corpus)
    assert (resumed.code, resumed.numbers, resumed.weights) == (0, whole.numbers, whole.weights)
    assert f"20 steps, {whole.lines[-1]['tokens']:,} target tokens" in resumed.said
    assert f"train loss {whole.numbers[-2]['train/loss']:.4f} in step 20 alone" in resumed.said


@pytest.mark.slow
@pytest.mark.exhaustive
def test_going_back_to_an_earlier_checkpoint(
    whole: Run, copied: Run, here: Callable[..., Run], corpus: Path
) -> None:
    resumed = here(copied.path, *FLAGS, "--data", corpus, "--resume", "10")
    assert (resumed.code, resumed.numbers, resumed.weights) == (0, whole.numbers, whole.weights)
    assert "from step 10 of 20" in resumed.said


@pytest.mark.slow
def test_damaged_checkpoints_are_named_and_passed_over(
    whole: Run, copied: Run, here: Callable[..., Run], corpus: Path
) -> None:
    there, arrays = copied.path / "checkpoints", {}
    for step in ("10", "15", "20"):
        arrays[step] = max(
            (there / step / "state").rglob("*"), key=lambda path: path.stat().st_size
        )
        arrays[step].write_bytes(
            bytes([arrays[step].read_bytes()[0] ^ 1]) + arrays[step].read_bytes()[1:]
        )
    before = {path: path.stat().st_mtime_ns for path in copied.path.rglob("*")}
    refused = here(copied.path, *FLAGS, "--data", corpus)
    assert refused.code == 2
    assert f"consyn-train: {there} has no intact checkpoint (10: state/" in refused.said
    assert {path: path.stat().st_mtime_ns for path in copied.path.rglob("*")} == before

    arrays["10"].write_bytes(
        bytes([arrays["10"].read_bytes()[0] ^ 1]) + arrays["10"].read_bytes()[1:]
    )
    resumed = here(copied.path, *FLAGS, "--data", corpus)
    assert (resumed.code, resumed.numbers, resumed.weights) == (0, whole.numbers, whole.weights)
    for step in ("15", "20"):
        said = f"warning: {there / step} is damaged and is skipped: {arrays[step].relative_to(there / step)} is not what was written.\n"
        assert resumed.said.count(said) == 1
    assert sorted(path.name for path in there.iterdir()) == [
        "10",
        "15",
        "15.damaged-1",
        "20",
        "20.damaged-1",
    ]
    assert "from step 10 of 20" in resumed.said


@pytest.mark.slow
def test_a_signal_while_data_is_prepared_leaves_nothing_half_made(
    home: Path, tmp_path: Path
) -> None:
    rows = [json.dumps({"text": f"word {i} and {i * 7919 % 10007} " * 40}) for i in range(1000)]
    (tmp_path / "large.jsonl").write_text("\n".join(rows * 60))
    env = {"CONSYN_CACHE": str(tmp_path / "cache")}
    flags = [
        "--model",
        "haiku",
        "--data",
        tmp_path / "large.jsonl",
        "--tokenizer",
        "bytes",
        "--output",
        tmp_path / "run",
        "--max_tokens",
        "32",
    ]
    with start(flags, **env) as running:
        deadline = time.monotonic() + 240
        while (
            running.poll() is None
            and time.monotonic() < deadline
            and not list(tmp_path.glob("cache/stores/*/*.tokens"))
        ):
            time.sleep(0.005)
        running.send_signal(signal.SIGTERM)
        _, said = running.communicate(timeout=240)
    assert (running.returncode, said) == (
        143,
        "consyn-train: SIGTERM came before there was anything to save.\n",
    )
    assert list(tmp_path.glob("cache/stores/.*")) == []
    assert not (tmp_path / "run").exists()
