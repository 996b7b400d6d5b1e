"""Points of a finite space: none is drawn twice while another is left."""

import os
from pathlib import Path
from typing import Any

import pytest

from consyn_jax.tuning.optuna_study import OptunaStudy
from consyn_jax.tuning.search_space import Dimension
from consyn_jax.tuning.space.untried_points import UntriedPoints, num_points
from consyn_jax.tuning.tune_options import StudyOptions

if not os.environ.get("CI"):  # where the extra must be installed
    pytest.importorskip("optuna", reason="needs the extra tune")

SPACE = [Dimension("optimizer", choices=("adamw", "lion")), Dimension("num_layers", 1, 3)]


ALL = {(name, layers) for name in ("adamw", "lion") for layers in (1, 2, 3)}


def opened(output: Path, **options: Any) -> OptunaStudy:
    more: dict[str, Any] = {"maximize": False, "num_evaluations": 27, "seed": 1}
    return OptunaStudy(output, StudyOptions(**options), SPACE, {}, **more)


def train(study: OptunaStudy, number: int) -> None:
    """Work on the next trial of `number`."""
    claim = study.claim(number)
    assert claim is not None
    value = float(claim.values["num_layers"] + claim.number)
    claim.trial.report(value, 0)
    claim.trial.should_prune()  # Hyperband has no brackets before its first decision
    study.tell(claim, value)
    claim.release()


def points(study: OptunaStudy) -> list[tuple[Any, ...]]:
    return [(t.params["optimizer"], t.params["num_layers"]) for t in study.trials]


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
def test_every_point_is_tried_once(tmp_path: Path, sampler: str, pruner: str) -> None:
    study = opened(tmp_path, sampler=sampler, pruner=pruner)
    for _ in ALL:
        train(study, len(ALL))
    assert set(points(study)) == ALL


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
def test_every_point_is_tried_once_by_several_processes(tmp_path: Path, sampler: str) -> None:
    for _ in ALL:
        train(opened(tmp_path, sampler=sampler), len(ALL))
    assert set(points(opened(tmp_path))) == ALL


def test_when_all_points_are_tried_some_are_repeated(tmp_path: Path) -> None:
    """As in a study of an earlier version, whose limit is a number of trials."""
    study = opened(tmp_path)
    for _ in range(8):
        train(study, 8)
    assert set(points(study)) == ALL


def test_a_sampler_that_repeats_itself_is_not_asked_forever() -> None:
    class Stuck:
        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return {}

        def sample_relative(self, study: Any, trial: Any, space: Any) -> dict[str, Any]:
            return {"optimizer": "lion", "num_layers": 2}

    class Trial:
        def __init__(self, number: int, *values: Any) -> None:
            self.number, self.params = number, dict(zip(names, values, strict=False))

    names = [dimension.name for dimension in SPACE]
    trials, seen = [Trial(0, "lion", 2)], {("lion", 2)}
    for number in range(1, 6):
        sampler = UntriedPoints(Stuck(), SPACE, dict.fromkeys(names), lambda: trials, seed=number)
        drawn = sampler.sample_relative(None, Trial(number), {})
        trials.append(Trial(number, *drawn.values()))
        seen.add(tuple(drawn.values()))
    assert len(seen) == 6


def test_a_range_of_numbers_has_no_number_of_points() -> None:
    assert num_points(SPACE) == 6
    assert num_points([*SPACE, Dimension("lr", 0.1, 0.2)]) is None
    assert num_points([Dimension("seed", 0, 10**9)]) == 10**9 + 1
