"""Decisions about the best model and early stopping, against a plain reading of the whole
history."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consyn_jax.errors import UserError
from consyn_jax.evaluation_metrics import EVALUATION_METRICS
from consyn_jax.resolve import resolve
from consyn_jax.training.checkpointing.best_evaluation import Selection

values = st.lists(st.one_of(st.floats(-5, 5), st.just(math.nan)), max_size=30)


@given(history=values, metric=st.sampled_from(sorted(EVALUATION_METRICS)))
def test_the_best_is_the_first_of_the_best(history: list[float], metric: str) -> None:
    selection = Selection()
    said = [step for step, value in enumerate(history) if selection.update(metric, value, step)]
    sign = 1 if EVALUATION_METRICS[metric] else -1
    numbers = [(sign * value, -step) for step, value in enumerate(history) if not math.isnan(value)]
    assert selection.best_step == (-max(numbers)[1] if numbers else None)
    assert (said[-1] if said else None) == selection.best_step


@given(
    history=values,
    patience=st.integers(1, 4),
    min_delta=st.sampled_from([0.0, 0.5]),
    min_steps=st.integers(0, 10),
    cut=st.integers(0, 30),
)
def test_an_interruption_changes_no_decision(
    history: list[float], patience: int, min_delta: float, min_steps: int, cut: int
) -> None:
    def decisions(selection: Selection, start: int, stop: int) -> list[tuple[bool, bool]]:
        found = []
        for step in range(start, min(stop, len(history))):
            best = selection.update("eval/loss", history[step], step, min_delta)
            found.append((best, selection.should_stop(patience, step, min_steps)))
        return found

    whole = decisions(Selection(), 0, len(history))
    first = Selection()
    before = decisions(first, 0, cut)
    assert before + decisions(Selection(**dataclasses.asdict(first)), cut, len(history)) == whole


def test_patience_counts_evaluations_that_improve_too_little() -> None:
    selection = Selection()
    for step, value in enumerate([1.0, 0.95, 0.91]):
        assert selection.update("eval/loss", value, step, min_delta=0.1)
    assert selection.stale == 2
    assert selection.should_stop(2, 2)
    assert not selection.should_stop(2, 2, min_steps=3)
    assert not selection.should_stop(None, 2)
    selection.update("eval/loss", 0.85, 3, min_delta=0.1)
    assert selection.stale == 0


@pytest.mark.parametrize(("metric", "sign"), [("eval/loss", -1.0), ("eval/accuracy", 1.0)])
def test_an_improvement_is_more_than_min_delta(metric: str, sign: float) -> None:
    """Neither an equal value nor one that is better by exactly that much."""
    selection, stale = Selection(), []
    for value in (math.nan, 1.0, 1.5, 1.625):
        selection.update(metric, sign * value, 7, min_delta=0.5)
        stale.append(selection.stale)
    assert stale == [1, 0, 1, 0]
    selection.update(metric, sign * 1.625, 8)
    assert selection.should_stop(1, 8, min_steps=8)
    selection.update(metric, sign * 1.75, 9)
    assert not selection.should_stop(1, 9)


def test_a_metric_that_is_never_logged() -> None:
    resolve({"metric_for_best_model": "eval/accuracy"})
    with pytest.raises(
        UserError,
        match=r"eval/los is not an evaluation metric of --objective next_token; "
        r"did you mean eval/loss\? Known: eval/loss, eval/perplexity",
    ):
        resolve({"metric_for_best_model": "eval/los"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"early_stopping_patience": 0}, "--early_stopping_patience must be at least 1, not 0"),
        ({"early_stopping_min_delta": -1}, "--early_stopping_min_delta must not be negative"),
        (
            {"early_stopping_patience": 2, "validation_fraction": 0},
            "--early_stopping_patience needs evaluations",
        ),
        (
            {"load_best_model_at_end": True, "validation_fraction": 0},
            "--load_best_model_at_end needs evaluations",
        ),
    ],
)
def test_what_cannot_be_selected_by(given: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(given)


@pytest.mark.parametrize(
    "flag",
    [{"early_stopping_patience": 2}, {"load_best_model_at_end": True}, {"scheduler": "plateau"}],
)
def test_a_fraction_of_0_turns_evaluations_off_with_a_token_store_too(
    flag: dict[str, object],
) -> None:
    store = {"data": "tokens", "dataset_type": "sharded"}
    resolve({**store, **flag})
    with pytest.raises(UserError, match="needs evaluations, and --validation_fraction 0 leaves"):
        resolve({**store, "validation_fraction": 0, **flag})
