"""A trial from its claim to its outcome, also if a kill came at an awkward moment."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from consyn_jax.errors import Diverged, Interrupted
from consyn_jax.resolve import resolve
from consyn_jax.training.logging.metrics import MetricsLog
from consyn_jax.training.logging.tracking.callbacks import RunView
from consyn_jax.tuning.optuna_study import OptunaStudy
from consyn_jax.tuning.search_space import Dimension
from consyn_jax.tuning.study_identity import mark_trial
from consyn_jax.tuning.study_results import results_of
from consyn_jax.tuning.trial_run import TrialRun
from consyn_jax.tuning.tune_options import StudyOptions

if not os.environ.get("CI"):  # where the extra must be installed
    pytest.importorskip("optuna", reason="needs the extra tune")

SPACE = [Dimension("lr", 1e-4, 1e-2, True)]
EVERY, TOTAL = 5, 20  # steps between evaluations, and of a trial


class Trainer:
    """Writes the log of a run whose evaluations have these values."""

    total_steps, run = TOTAL, resolve({"eval_steps": EVERY})[0]

    def __init__(self, path: Path, values: list[float], end: str = "", first: int = 0) -> None:
        self.path, self.values, self.end, self.first = path, values, end, first

    def add_callback(self, callback: Any) -> None:
        self.observer = callback

    def train(self) -> None:
        """Write the log, as far as the observer lets it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with MetricsLog(self.path) as log:
            log.truncate_from(EVERY * self.first)
            step = 1
            for i, value in enumerate(self.values, self.first):
                step = EVERY * (i + 1)
                line = log.write(step, 1, {"eval/loss": value})
                view = RunView(self.path)
                self.observer.on_evaluate(view, line)
                if view.stop_request:
                    log.write(step, 1, view.stop_request, event="stop")
                    break
            if self.end == "stopped":
                log.write(step, 1, {"by": "StopBelow", "reason": "low enough"}, event="stop")
            if self.end == "diverged":
                raise Diverged("The loss is nan.")
            if self.end == "killed":
                raise Interrupted("SIGKILL")
            log.write(step, 1, event="finish")


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., OptunaStudy]:
    def study(**options: Any) -> OptunaStudy:
        given = StudyOptions(**{"pruner": "none", **options})
        return OptunaStudy(tmp_path, given, SPACE, {}, maximize=False, num_evaluations=4, seed=1)

    return study


def run(
    study: OptunaStudy, tmp_path: Path, values: list[float], end: str = "", first: int = 0
) -> str:
    """Work on the next trial; `values` are its trainer's evaluations from number `first` on."""
    claim = study.claim(99)
    assert claim is not None
    path = tmp_path / "trials" / str(claim.number)
    try:
        trainer: Any = Trainer(path, values, end, first)
        return TrialRun(study, claim, "eval/loss", False, path, trainer).run()
    finally:
        claim.release()


def result(study: OptunaStudy, number: int = 0) -> Any:
    return results_of(study.trials, SPACE, "eval/loss", False).trials[number]


def test_the_value_of_a_trial_is_its_best_evaluation(
    opened: Callable[..., OptunaStudy], tmp_path: Path
) -> None:
    study = opened()
    assert run(study, tmp_path, [4.0, 2.0, 3.0, 2.5]) == "done"
    found = result(study)
    assert (found.value, found.step, found.steps) == (2.0, 20, 20)
    assert found.curve == {0: 4.0, 1: 2.0, 2: 3.0, 3: 2.5}


def test_a_trial_goes_on_after_a_kill_and_keeps_its_evaluations(
    opened: Callable[..., OptunaStudy], tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        run(opened(), tmp_path, [4.0, 3.0], end="killed")
    assert result(opened()).outcome == "running"
    # The rest is trained from a checkpoint; what was reported is not reported again.
    assert run(opened(), tmp_path, [4.0, 3.0, 2.0, 1.0]) == "done"
    assert len(opened().trials) == 1
    assert result(opened()).curve == {0: 4.0, 1: 3.0, 2: 2.0, 3: 1.0}


def test_a_kill_between_the_last_step_and_the_study_trains_nothing(
    opened: Callable[..., OptunaStudy], tmp_path: Path
) -> None:
    study = opened()
    claim = study.claim(99)
    assert claim is not None
    path = tmp_path / "trials" / "0"
    mark_trial(path, study.identity, claim.values)
    earlier = Trainer(path, [4.0, 3.0, 2.0, 1.0])
    earlier.add_callback(Mock())
    earlier.train()
    claim.release()
    assert run(opened(), tmp_path, []) == "done"
    assert result(opened()).value == 1.0


def test_a_bad_trial_is_pruned_and_saves_its_steps(
    opened: Callable[..., OptunaStudy], tmp_path: Path
) -> None:
    study = opened(pruner="median")
    for _ in range(6):
        assert run(study, tmp_path, [2.0, 1.5, 1.2, 1.0]) == "done"
    assert run(study, tmp_path, [9.0, 9.0, 9.0, 9.0]) == "pruned"
    found = result(study, 6)
    assert found.step < TOTAL
    assert found.outcome == "pruned"
    results = results_of(study.trials, SPACE, "eval/loss", False)
    assert results.saved == pytest.approx((TOTAL - found.step) / (7 * TOTAL))


def test_a_kill_after_the_decision_to_prune_trains_nothing(
    opened: Callable[..., OptunaStudy], tmp_path: Path
) -> None:
    study = opened(pruner="median")
    for _ in range(6):
        run(study, tmp_path, [2.0, 1.5, 1.2, 1.0])
    with pytest.raises(Interrupted):
        run(study, tmp_path, [9.0, 9.0, 9.0, 9.0], end="killed")
    assert run(opened(pruner="median"), tmp_path, []) == "pruned"
    assert len(study.trials) == 7


@pytest.mark.parametrize("first", [2, 1, 0])
def test_a_trial_that_goes_on_is_pruned_only_at_its_next_evaluation(
    opened: Callable[..., OptunaStudy], tmp_path: Path, first: int
) -> None:
    """Other trials have become better meanwhile; the checkpoint is after evaluation `first` - 1."""
    study = opened(pruner="median")
    with pytest.raises(Interrupted):
        run(study, tmp_path, [9.0, 9.0], end="killed")
    claim = study.claim(99)
    assert claim is not None
    for _ in range(6):
        run(study, tmp_path, [2.0, 1.5, 1.2, 1.0])
    claim.release()
    assert run(study, tmp_path, [9.0] * (4 - first), first=first) == "pruned"
    # The process may have been killed before it decided at its last evaluation, with number 1.
    assert result(study).step == EVERY * (max(first, 1) + 1)


def test_the_last_evaluation_is_never_pruned(
    opened: Callable[..., OptunaStudy], tmp_path: Path
) -> None:
    study = opened(pruner="median")
    for _ in range(6):
        run(study, tmp_path, [2.0, 1.5, 1.2, 1.0])
    assert run(study, tmp_path, [1.9, 1.4, 1.1, 9.0]) == "done"


def test_a_trial_that_diverges_is_told_as_a_bad_one(
    opened: Callable[..., OptunaStudy], tmp_path: Path
) -> None:
    study = opened()
    assert run(study, tmp_path, [4.0, math.nan], end="diverged") == "diverged"
    assert result(study).outcome == "diverged"
    assert study.trials[0].state.name == "PRUNED"


@pytest.mark.parametrize("pruner", ["none", "median"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_trial_without_a_finite_evaluation_is_a_bad_one(
    pruner: str, value: float, opened: Callable[..., OptunaStudy], tmp_path: Path
) -> None:
    """As with a perplexity that overflows."""
    study = opened(pruner=pruner)
    assert run(study, tmp_path, [value] * 4) == "diverged"
    results = results_of(study.trials, SPACE, "eval/loss", False)
    assert results.best is None
    assert run(study, tmp_path, [2.0] * 4) == "done"


def test_a_trial_that_a_callback_of_the_user_ends_is_done(
    opened: Callable[..., OptunaStudy], tmp_path: Path
) -> None:
    study = opened()
    assert run(study, tmp_path, [1.0, 2.0], end="stopped") == "done"
    found = result(study)
    assert (found.value, found.step) == (1.0, 2 * EVERY)
    assert study.trials[0].state.name == "COMPLETE"


def test_a_trial_that_ends_before_its_first_evaluation_has_no_value(
    opened: Callable[..., OptunaStudy], tmp_path: Path
) -> None:
    study = opened()
    assert run(study, tmp_path, [], end="stopped") == "pruned"
    assert result(study).value is None


def test_a_trial_leaves_no_checkpoints(opened: Callable[..., OptunaStudy], tmp_path: Path) -> None:
    path = tmp_path / "trials" / "0"
    with pytest.raises(Interrupted):
        run(opened(), tmp_path, [4.0, 3.0], end="killed")
    (path / "checkpoints" / "10").mkdir(parents=True)
    run(opened(), tmp_path, [4.0, 3.0, 2.0, 1.0])
    assert sorted(entry.name for entry in path.iterdir()) == ["metrics.jsonl", "trial.json"]
