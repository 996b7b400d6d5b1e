"""A trial as a run: what ends it, and what it leaves."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_trials import MODEL, ROWS

from consyn_jax.errors import Interrupted, UserError
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.training import ConsynTrainer
from consyn_jax.training.logging.tracking.callbacks import RunView
from consyn_jax.tuning.shared_programs import SharedPrograms
from consyn_jax.tuning.study_identity import mark_trial
from consyn_jax.tuning.trial_trainer import TrialTrainer


def trainer(path: Path, shared: SharedPrograms, **settings: Any) -> TrialTrainer:
    given = {"max_steps": 6, "batch_size": 8, "eval_steps": 2, "save_steps": 4, "quiet": True}
    return TrialTrainer(
        shared,
        [("trial", "0")],
        model=ConsynLMHeadModel.from_config(MODEL, seed=0),
        train_dataloader=ROWS,
        eval_dataloader=ROWS[:8],
        output_dir=path,
        **{
            **given,
            "logging_backend": "none",
            "logging_steps": 1,
            "learning_rate": 1e-2,
            **settings,
        },
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def shared() -> SharedPrograms:
    return SharedPrograms()


class Observer:
    """Acts at the evaluation of step 4."""

    def __init__(self, act: Callable[[RunView], None]) -> None:
        self.act, self.seen = act, list[tuple[int, float]]()

    def on_evaluate(self, run: RunView, values: dict[str, Any]) -> None:
        self.seen.append((values["step"], values["eval/loss"]))
        if values["step"] == 4:
            self.act(run)


def test_a_trial_is_stopped_after_an_evaluation_and_its_state_is_saved(
    tmp_path: Path, shared: SharedPrograms
) -> None:
    trial = trainer(tmp_path, shared, max_steps=12)
    observer = Observer(lambda run: run.stop("pruned"))
    trial.add_callback(observer)
    last = trial.train()["step"]
    assert 4 <= last < 8
    logged = lines(tmp_path)
    evaluations = [line for line in logged if "eval/loss" in line and "event" not in line]
    assert observer.seen == [(line["step"], line["eval/loss"]) for line in evaluations]
    events = [line["event"] for line in logged if "event" in line]
    assert [event for event in events if event in ("stop", "finish")] == ["stop", "finish"]
    assert str(last) in [path.name for path in (tmp_path / "checkpoints").iterdir()]


def test_only_its_own_trainer_writes_to_a_trial(tmp_path: Path, shared: SharedPrograms) -> None:
    mark_trial(tmp_path, "study", {})
    other = ConsynTrainer(
        ConsynLMHeadModel.from_config(MODEL, seed=0), ROWS, output_dir=tmp_path, max_steps=1
    )
    for call in (other.train, other.describe):
        with pytest.raises(UserError, match="has a trial of a study, which only consyn-tune"):
            call()
    assert trainer(tmp_path, shared).train()["step"] == 6


def test_a_trial_keeps_no_model_and_no_sample(tmp_path: Path, shared: SharedPrograms) -> None:
    trainer(tmp_path, shared).train()
    left = {path.name for path in tmp_path.iterdir()}
    assert left.isdisjoint({"best", "final", "samples.jsonl", "loss.png"})
    assert {"metrics.jsonl", "config.yaml", "report.html", "checkpoints"} <= left


def test_the_same_trial_goes_on_from_its_checkpoint(tmp_path: Path, shared: SharedPrograms) -> None:
    """And ends as if it had not been interrupted."""
    whole = trainer(tmp_path / "whole", shared).train()
    trial = trainer(tmp_path / "parts", shared)
    trial.add_callback(Observer(lambda _: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(Interrupted):
        trial.train()
    again = trainer(tmp_path / "parts", shared).train()
    assert again["step"] == 6
    assert again["eval/loss"] == whole["eval/loss"]
    assert "resume" in [line.get("event") for line in lines(tmp_path / "parts")]
