"""The results of a study: its trials in order, a table, and the best trial as a recipe."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consyn_jax.config import RunConfig
from consyn_jax.config_file import describe
from consyn_jax.errors import Diverged, UserError
from consyn_jax.resolve import FOLLOWERS
from consyn_jax.training.logging.formats import decimals
from consyn_jax.tuning.search_space import Dimension, as_text

# User attributes of a trial; `FAILURE` is the sentence with which its run was refused.
STEP, STEPS, OUTCOME, FAILURE = "step", "steps", "outcome", "failure"
DONE, PRUNED, DIVERGED, RUNNING, FAILED = "done", "pruned", "diverged", "running", "failed"
OUTCOMES = (DONE, PRUNED, DIVERGED, FAILED)  # outcomes of trials that have ended
MOST_ROWS = 20  # rows of the table in the terminal


@dataclass(frozen=True)
class TrialResult:
    """The result of a trial.

    Attributes:
        outcome: how the trial ended, or `RUNNING`.
        value: the best evaluation of a complete trial, or the latest evaluation of another trial;
            None before the first evaluation.
        curve: value of each evaluation, by the number of the evaluation, counted from 0.
        step: number of steps taken.
        steps: number of steps of a complete trial.
    """

    number: int
    outcome: str
    value: float | None
    values: Mapping[str, Any]
    curve: Mapping[int, float]
    step: int = 0
    steps: int = 0


@dataclass(frozen=True)
class StudyResults:
    """All trials of a study; the best has the lowest metric (with `maximize`, the highest)."""

    trials: list[TrialResult]
    space: Sequence[Dimension]
    metric: str
    maximize: bool

    @property
    def done(self) -> list[TrialResult]:
        """Trials that ran to their end, the best first."""
        sign = -1 if self.maximize else 1
        found = [trial for trial in self.trials if trial.outcome == DONE]
        return sorted(found, key=lambda trial: (sign * (trial.value or 0.0), trial.number))

    @property
    def best(self) -> TrialResult | None:
        """The best trial; None before the first is done."""
        return next(iter(self.done), None)

    @property
    def saved(self) -> float:
        """Fraction of planned steps that early stopping saved, over all trials that have ended."""
        ended = [trial for trial in self.trials if trial.steps]
        all_steps = sum(trial.steps for trial in ended)
        return 1 - sum(trial.step for trial in ended) / all_steps if all_steps else 0.0

    def count(self, outcome: str) -> int:
        """The number of trials with this outcome."""
        return sum(trial.outcome == outcome for trial in self.trials)


def results_of(
    trials: Sequence[Any], space: Sequence[Dimension], metric: str, maximize: bool
) -> StudyResults:
    """Convert Optuna's trials to results."""
    found = []
    for trial in trials:
        ended = trial.state.is_finished()
        outcome = trial.user_attrs.get(OUTCOME, FAILED) if ended else RUNNING
        curve = dict(sorted(trial.intermediate_values.items()))
        last = next(reversed(curve.values()), None)
        value = trial.value if ended and trial.value is not None else last
        found.append(
            TrialResult(
                trial.number,
                outcome,
                value if value is not None and math.isfinite(value) else None,
                dict(trial.params),
                curve,
                trial.user_attrs.get(STEP, 0),
                trial.user_attrs.get(STEPS, 0),
            )
        )
    return StudyResults(found, space, metric, maximize)


def check_results(results: StudyResults, output: Path) -> None:
    """Check that at least one trial is done, or that another process still runs one.

    Raises:
        Diverged: all trials have ended, and none is done, because some or all diverged.
        UserError: no trial has begun, or all were ended early.
    """
    if not results.trials:
        raise UserError(
            f"--time_budget ended before the first trial of the study in {output} began. Raise "
            "--time_budget."
        )
    if results.best is None and not results.count(RUNNING):
        ends = " and ".join(f"{n} {name}" for name in OUTCOMES if (n := results.count(name)))
        start = f"No trial of the study in {output} is done: {ends}."
        if not results.count(DIVERGED):
            raise UserError(f"{start} Use --pruner none, or leave out the callback that ends them.")
        ranges = " ".join(dimension.text() for dimension in results.space)
        raise Diverged(
            f"{start} Lower the ranges ({ranges}), especially the range of lr, and give another "
            "--output, or --overwrite."
        )


def table(results: StudyResults, most: int = MOST_ROWS) -> list[str]:
    """The trials as lines of text, the best first."""
    done = results.done
    others = [trial for trial in results.trials if trial.outcome != DONE]
    rows = [["trial", results.metric, *(d.name for d in results.space), "steps", "outcome"]]
    rows += [row(trial, results.space) for trial in [*done, *others][:most]]
    left = len(results.trials) - most
    return [*aligned(rows), *([f"and {left:,} more trials"] if left > 0 else [])]


def row(trial: TrialResult, space: Sequence[Dimension]) -> list[str]:
    """A trial as the cells of a table row."""
    values = [as_text(trial.values[d.name]) if d.name in trial.values else "" for d in space]
    shown = "" if trial.value is None else decimals(trial.value)
    return [str(trial.number), shown, *values, f"{trial.step:,}", trial.outcome]


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Format rows of cells as aligned lines of text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        yield "  ".join(
            f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)
        ).rstrip()


def recipe(
    results: StudyResults, best: TrialResult, run: RunConfig, origins: dict[str, str]
) -> str:
    """A recipe for `consyn-train --config` with the values of the best trial.

    Defaults that depend on other flags are commented out, so that a user who adds another `--model`
    gets the defaults of that model.

    Args:
        run: the configuration with the values of the best trial.
        origins: the origin of each value.
    """
    assert best.value is not None
    tuned = {dimension.name: f"trial {best.number}" for dimension in results.space}
    head = (
        f"# Trial {best.number}, the best of {len(results.trials)}: {results.metric} "
        f"{decimals(best.value)}.\n\n"
    )
    given = ("flag", "file ", "trial ")
    origins = origins | tuned
    followers = {name for name in FOLLOWERS if not origins[name].startswith(given)}
    lines = describe(run, origins).splitlines(keepends=True)
    return head + "".join(
        f"# {line}" if line.partition(":")[0] in followers else line for line in lines
    )
