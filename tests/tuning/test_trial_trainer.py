"""A trial as a run: what ends it, and what it leaves."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_trials import MODEL, ROWS

from consyn_jax.errors import Interrupted, UserError
from consyn_jax.flags import flat
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.training import ConsynTrainer
from consyn_jax.training.logging.tracking.callbacks import RunView
from consyn_jax.tuning.search_space import Dimension
from consyn_jax.tuning.shared_programs import SharedPrograms
from consyn_jax.tuning.study_identity import mark_trial
from consyn_jax.tuning.trial_trainer import MOST_BUILDS, TrialTrainer, trainer_of_study
from consyn_jax.tuning.varied_run import Settings, VariedRun


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


class Machine:
    """Makes trainers of runs with other numbers of layers, some of which it cannot build."""

    def __init__(self, *, makes: Callable[[int], bool], builds: Callable[[int], bool]) -> None:
        self.makes, self.builds, self.tried = makes, builds, list[int]()

    def make(self, settings: Settings) -> Any:
        layers = flat(settings[0])["num_layers"]
        self.tried.append(layers)
        self._check(self.makes, layers)
        return SimpleNamespace(layers=layers, build=lambda: self._check(self.builds, layers))

    def _check(self, works: Callable[[int], bool], layers: int) -> None:
        if not works(layers):
            raise UserError(f"No {layers} layers.")

    def trainer(self, *space: Dimension) -> Any:
        return trainer_of_study(space, VariedRun({"model": "haiku"}, {}), self.make)


@pytest.mark.parametrize("fitting", [3, 4])
def test_the_facts_of_a_study_do_not_depend_on_what_the_machine_can_build(fitting: int) -> None:
    layers, rate = Dimension("num_layers", choices=(1, 2, 3, 4)), Dimension("lr", 0.1, 0.2)
    machine = Machine(makes=lambda n: n > 1, builds=lambda n: n == fitting)
    assert machine.trainer(rate, layers).layers == 2
    assert machine.tried == list(range(1, fitting + 1))


def test_a_study_of_which_nothing_can_be_built_is_refused_with_its_first_values() -> None:
    machine = Machine(makes=lambda n: True, builds=lambda n: False)
    with pytest.raises(UserError, match=r"^A trial of .* --num_layers 1 is refused: No 1 layers"):
        machine.trainer(Dimension("num_layers", 1, 300))
    assert machine.tried[0] == 1
    assert len(set(machine.tried)) == len(machine.tried) == MOST_BUILDS


def test_a_missing_package_is_no_fault_of_the_first_values() -> None:
    def make(settings: Settings) -> Any:
        raise UserError("A package is missing.") from ImportError()

    space = [Dimension("num_layers", 1, 3)]
    with pytest.raises(UserError, match=r"^A package is missing\.$"):
        trainer_of_study(space, VariedRun({"model": "haiku"}, {}), make)
