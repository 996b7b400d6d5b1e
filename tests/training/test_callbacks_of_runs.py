"""Callbacks of whole runs: what they get, `history`, and a run that a callback ends."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard_files import read_back
from test_trainer import STEPS, trainer

from consyn_jax.errors import UserError
from consyn_jax.training import ConsynTrainer
from consyn_jax.training.logging.metrics import read_metrics
from consyn_jax.training.logging.tracking.callbacks import RunView


class Seen:
    """Keeps what it is told, and may ask for the end."""

    def __init__(self, stop_at: int | None = None, stop_in: str = "step") -> None:
        self.lines: list[dict[str, Any]] = []
        self.saved: list[tuple[str, int, bool]] = []
        self.samples: list[int] = []
        self.endings: list[tuple[str, int, bool]] = []
        self.run: RunView | None = None
        self.stop_at = (stop_in, stop_at)

    def on_step(self, run: RunView, values: dict[str, Any]) -> None:
        self.run = run
        assert run.history[-1] == values
        assert run.step == values["step"]
        assert run.tokens == values["tokens"]
        self.lines.append(values)
        if self.stop_at == ("step", values["step"]):
            run.stop("it is low enough")

    def on_evaluate(self, run: RunView, values: dict[str, Any]) -> None:
        self.lines.append(values)
        self.samples.append(len(run.samples))
        if self.stop_at == ("evaluate", values["step"]):
            run.stop()

    def on_save(self, run: RunView, path: Path) -> None:
        whole = (path / "config.json").is_file() or (path / "state").is_dir()
        self.saved.append((str(path.relative_to(run.directory)), run.step, whole))

    def on_end(self, run: RunView, ending: str) -> None:
        is_last = "<b>Complete</b>" in (run.directory / "report.html").read_text()
        self.endings.append((ending, run.step, is_last))


class Raises:
    def on_step(self, run: RunView, values: dict[str, Any]) -> None:
        raise ValueError("no such host")


def logged(path: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(path / "metrics.jsonl") if "event" not in line]


def scalars(path: Path) -> dict[str, dict[int, float]]:
    """Every number of the log by name and step, as TensorBoard keeps it."""
    found: dict[str, dict[int, float]] = {}
    for line in logged(path):
        for name, value in line.items():
            if name != "step" and ("/" in name or "train/loss" in line):
                found.setdefault(name, {})[line["step"]] = float(np.float32(value))
    return found


def test_callbacks_get_the_lines_of_the_log_and_an_error_ends_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen = Seen()
    run = trainer(tmp_path / "run", callbacks=[Raises(), seen])
    assert run.history == []
    run.train()
    assert seen.lines == logged(tmp_path / "run")
    assert len(seen.lines) == STEPS + 3
    assert run.history == read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert seen.endings == [("complete", STEPS, True)]
    assert all(whole for _, _, whole in seen.saved)
    names = [name for name, _, _ in seen.saved]
    checkpoints = [name for name in names if name.startswith("checkpoints")]
    assert checkpoints == [f"checkpoints/{step}" for step in (3, 6, 9, 12)]
    assert "final" in names
    assert "best" in names
    assert seen.samples[0] == 1, "the first evaluation has its sample"
    assert seen.run is not None
    assert seen.run.config["lr"] == 3e-3
    assert (seen.run.total_steps, seen.run.resumed_from) == (STEPS, None)
    identity = json.loads((tmp_path / "run" / "run.json").read_text())["run"]
    assert seen.run.run_id == identity
    said = capfd.readouterr().err
    assert said.count("no such host") == 1
    assert "warning: Raises.on_step raised ValueError: no such host (" in said
    assert f"{Path(__file__).name}:" in said


@pytest.mark.parametrize(
    ("where", "step", "ends_at"), [("step", 5, 6), ("evaluate", 4, 4), ("step", STEPS, STEPS)]
)
def test_a_callback_ends_a_run_which_is_then_complete(
    where: str, step: int, ends_at: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    seen = Seen(step, where)
    run = trainer(path, callbacks=[seen], quiet=False)
    result = run.train()
    assert result["step"] == ends_at
    assert seen.endings == [("complete", ends_at, True)]
    events = {line["event"]: line for line in run.history if "event" in line}
    assert events["finish"]["step"] == ends_at
    assert (path / "final" / "model.safetensors").is_file()
    assert (path / "checkpoints" / str(ends_at)).is_dir()
    said = capfd.readouterr().err
    if ends_at == STEPS:
        assert "stop" not in events
        return
    reason = "it is low enough" if where == "step" else ""
    assert (events["stop"]["by"], events["stop"]["reason"]) == ("Seen", reason)
    assert f"Seen stops the run at step {ends_at}{': ' * bool(reason)}{reason}." in said
    before = (path / "metrics.jsonl").read_bytes()
    again = trainer(path, callbacks=[other := Seen()], quiet=False)
    assert again.train()["step"] == ends_at
    assert f"This run is complete: {ends_at} steps." in capfd.readouterr().err
    assert (path / "metrics.jsonl").read_bytes() == before
    assert (other.lines, other.endings) == ([], [])


@pytest.mark.slow
def test_a_run_that_was_ended_goes_on_with_a_larger_budget_as_one_run(tmp_path: Path) -> None:
    path = tmp_path / "run"
    settings = {"scheduler": "constant"}
    trainer(path, callbacks=[Seen(5)], logging_backend="tensorboard", **settings).train()
    longer = {"max_steps": STEPS + 2, "overwrite_schedule": True, **settings}
    longer["logging_backend"] = "tensorboard"
    resumed = trainer(path, callbacks=[seen := Seen()], **longer)
    resumed.train()
    steps = [line["step"] for line in resumed.history if "train/loss" in line]
    assert steps == list(range(1, STEPS + 3))
    assert [line["step"] for line in seen.lines if "train/loss" in line] == steps[6:]
    assert seen.run is not None
    assert seen.run.resumed_from == 6
    assert resumed.history == read_metrics(path / "metrics.jsonl")
    assert read_back(path / "logs") == scalars(path)
    whole = trainer(tmp_path / "whole", max_steps=STEPS + 2, **settings)
    whole.train()
    ours, theirs = (
        [line["train/loss"] for line in each.history if "train/loss" in line]
        for each in (resumed, whole)
    )
    np.testing.assert_array_equal(ours, theirs)


def test_wrong_callbacks_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"callbacks\[0\] is the class Seen"):
        trainer(tmp_path / "run", callbacks=[Seen])
    wrong: ConsynTrainer = trainer(tmp_path / "run", logging_backend="no_such_module_at_all:Class")
    with pytest.raises(UserError, match="there is no module no_such_module_at_all"):
        wrong.train()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"eval_steps": None, "callbacks": [Seen()]}, ["Seen.on_evaluate has no effect without"]),
        ({"eval_steps": 4, "callbacks": [Raises()]}, ["eval_steps=4 has no effect without"]),
        (
            {"eval_steps": 4, "callbacks": [Seen()]},
            ["eval_steps=4 and Seen.on_evaluate have no effect without"],
        ),
    ],
)
def test_evaluations_that_never_come_are_announced_before_the_run(
    given: dict[str, Any], named: list[str], tmp_path: Path
) -> None:
    without = trainer(tmp_path, eval_dataloader=None, **given).run_inputs().warnings
    assert [text.partition(" evaluation data. Pass it as eval_")[0] for text in without] == named
    assert trainer(tmp_path, **given).run_inputs().warnings == []


def test_a_run_that_is_not_meant_to_be_evaluated_is_not_warned(tmp_path: Path) -> None:
    given = {"eval_dataloader": None, "eval_steps": None, "callbacks": [Raises()]}
    assert trainer(tmp_path, **given).run_inputs().warnings == []
