"""Table, page and recipe of a study."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from consyn_jax.cli.train import read_arguments
from consyn_jax.config import PRESETS
from consyn_jax.errors import Diverged, UserError
from consyn_jax.resolve import resolve
from consyn_jax.tuning.search_space import Dimension
from consyn_jax.tuning.study_page import study_page
from consyn_jax.tuning.study_results import (
    StudyResults,
    TrialResult,
    check_results,
    recipe,
    table,
)
from consyn_jax.tuning.study_run import Tuning

SPACE = [Dimension("lr", 1e-4, 1e-2, True), Dimension("optimizer", choices=("adamw", "muon"))]
TRIALS = [
    TrialResult(0, "done", 2.0, {"lr": 1e-3, "optimizer": "adamw"}, {0: 3.0, 1: 2.0}, 20, 20),
    TrialResult(1, "pruned", 9.0, {"lr": 1e-4, "optimizer": "adamw"}, {0: 9.0}, 10, 20),
    TrialResult(2, "done", 1.5, {"lr": 2e-3, "optimizer": "muon"}, {0: 2.0, 1: 1.5}, 20, 20),
    TrialResult(3, "running", None, {"lr": 5e-3}, {}, 0, 0),
    TrialResult(4, "diverged", None, {"lr": 1e-2, "optimizer": "muon"}, {}, 5, 20),
]
FAILED = TrialResult(5, "failed", None, {"lr": 2e-2, "optimizer": "muon"}, {})


def results(maximize: bool = False) -> StudyResults:
    return StudyResults(TRIALS, SPACE, "eval/loss", maximize)


def test_the_best_trials_come_first_and_pruned_ones_are_not_among_them() -> None:
    assert [trial.number for trial in results().done] == [2, 0]
    assert [trial.number for trial in results(maximize=True).done] == [0, 2]
    assert results().saved == pytest.approx(25 / 80)
    assert table(results())[:3] == [
        "trial  eval/loss  lr      optimizer  steps  outcome",
        "2      1.5000     0.002   muon       20     done",
        "0      2.0000     0.001   adamw      20     done",
    ]
    assert table(results(), most=2)[-1] == "and 3 more trials"


def test_the_page_shows_every_trial_and_the_best_one_once() -> None:
    page = study_page(results(), "Study x", {"lr": 0.75, "optimizer": 0.25}, "consyn-train <x>")
    # Three trials have values: in the history, and for each of two flags.
    assert len(re.findall("<circle", page)) == 9
    assert len(re.findall('class="best"', page)) == 3
    assert "consyn-train &lt;x&gt;" in page
    assert "<td>75%</td>" in page
    assert "31%" in page
    assert "2 done, 1 pruned, 1 diverged, 1 running" in page
    page = study_page(StudyResults([*TRIALS, FAILED], SPACE, "eval/loss", False), "x", {}, "x")
    assert "2 done, 1 pruned, 1 diverged, 1 failed, 1 running" in page


def test_a_page_without_results_is_a_page() -> None:
    nothing = StudyResults([], SPACE, "eval/loss", False)
    assert "no trial is done" in study_page(nothing, "Study", {}, "")
    one = StudyResults(TRIALS[:1], SPACE, "eval/loss", False)
    assert "<circle" in study_page(one, "Study", {}, "")


def test_a_study_without_a_finished_trial_says_why_and_what_to_do() -> None:
    def check(*trials: TrialResult) -> None:
        check_results(StudyResults(list(trials), SPACE, "eval/loss", False), Path("out"))

    done, pruned, _, running, diverged = TRIALS
    check(done, diverged)
    check(running, diverged)  # another process may finish it
    with pytest.raises(
        Diverged, match=r"in out is done: 1 pruned and 2 diverged\. Lower the ranges"
    ):
        check(pruned, diverged, diverged)
    with pytest.raises(UserError, match=r"in out is done: 1 pruned\. Use --pruner none"):
        check(pruned)
    with pytest.raises(UserError, match="--time_budget ended before the first trial"):
        check()


def test_the_end_names_only_what_exists(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    study: Any = SimpleNamespace(output=tmp_path, quiet=False, metric="eval/loss", command="x")
    Tuning._print_end(study, StudyResults(TRIALS[4:], SPACE, "eval/loss", False))
    assert capfd.readouterr().err == f"Everything is in {tmp_path}: study.html.\n"
    (tmp_path / "trials").mkdir()
    Tuning._print_end(study, results())
    said = capfd.readouterr().err
    assert said.endswith(f"Everything is in {tmp_path}: study.html, recipe.yaml, trials/.\n")


def test_consyn_train_takes_the_recipe(tmp_path: Path) -> None:
    run, origins = resolve(
        {"model": "haiku", "lr": 2e-3, "optimizer": "muon", "output": "out/best"}
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe(results(), TRIALS[2], run, origins))
    assert read_arguments(["--config", str(file)])[0] == run
    text = file.read_text()
    assert text.startswith("# Trial 2, the best of 5: eval/loss 1.5000.\n")
    assert re.search(r"^lr: 0\.002 +# trial 2$", text, re.MULTILINE)
    assert re.search(r"^# head_dim: 32 +# preset haiku$", text, re.MULTILINE)


def test_another_model_takes_from_a_recipe_what_was_tuned_and_given_and_nothing_else(
    tmp_path: Path,
) -> None:
    """A tuned value stays, also one that the trials' model had anyway."""
    tuned = {"lr": 3e-3, "optimizer": "adamw"}
    run, origins = resolve({"model": "haiku", "hidden_dim": 480, "max_steps": 50, **tuned})
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe(results(), TRIALS[2], run, origins))
    for model in PRESETS:
        chosen, _ = resolve({"model": model, "hidden_dim": 480, "max_steps": 50, **tuned})
        assert read_arguments(["--config", str(file), "--model", model])[0] == chosen
