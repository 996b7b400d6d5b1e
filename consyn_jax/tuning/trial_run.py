"""Run one trial of a study, or finish a trial that an earlier process has begun."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consyn_jax.errors import Diverged
from consyn_jax.files import remove
from consyn_jax.training.logging.metrics import metrics_of
from consyn_jax.training.logging.tracking.callbacks import RunView
from consyn_jax.training.run.directory import CHECKPOINTS
from consyn_jax.training.run.step_end import interval
from consyn_jax.tuning.optuna_study import Claim, OptunaStudy
from consyn_jax.tuning.study_identity import mark_trial
from consyn_jax.tuning.study_results import DIVERGED, DONE, OUTCOME, PRUNED, STEP, STEPS
from consyn_jax.tuning.trial_trainer import TrialTrainer


@dataclass
class TrialRun:
    """The run of a trial.

    Args:
        metric: the name of the metric that the study optimises.
        maximize: whether a larger value is better.
        path: the run directory.
        trainer: trainer of the trial. It is not used if an earlier process has done all steps.
    """

    study: OptunaStudy
    claim: Claim
    metric: str
    maximize: bool
    path: Path
    trainer: TrialTrainer

    def __post_init__(self) -> None:
        self.total_steps = self.trainer.total_steps
        asked = self.trainer.run.evaluation.eval_steps
        self.eval_steps = interval(asked, self.total_steps)
        self.trainer.add_callback(self)

    def run(self) -> str:
        """Train the remaining steps of the trial, and report its end to the study.

        Returns:
            The outcome, as reported to the study.

        Raises:
            Interrupted: a signal ended the trial; another start continues it.
            UserError: the run directory belongs to another study or trial.
        """
        mark_trial(self.path, self.study.identity, self.claim.values)
        lines = self._reported_log()
        # An earlier process may have ended the run, or decided to end it, and been killed before it
        # reported this to the study.
        outcome = _recorded_outcome(lines)
        if outcome is None:
            try:
                self.trainer.train()
                outcome = _recorded_outcome(self._reported_log()) or DONE
            except Diverged:
                outcome = DIVERGED
        return self._tell(outcome)

    def _reported_log(self) -> Sequence[Mapping[str, Any]]:
        """Report all evaluations in the log to the study, and return the log."""
        lines = metrics_of(self.path)
        for line in lines:
            if self.metric in line and "event" not in line:
                self._report(line["step"], line[self.metric])
        return lines

    def on_evaluate(self, run: RunView, values: Mapping[str, Any]) -> None:
        """Report an evaluation to the study, and end the run if the pruner decides so."""
        self._report(values["step"], values[self.metric])
        number, last = self._number(values["step"]), self._number(self.total_steps)
        # If an earlier process has evaluated further, it has decided here to go on.
        is_newest = number >= max(self.claim.reported, default=0)
        if is_newest and number < last and self.claim.trial.should_prune():
            run.stop(PRUNED)

    def _number(self, step: int) -> int:
        """The number of the evaluation at a step, counted from 0."""
        return math.ceil(step / self.eval_steps) - 1

    def _report(self, step: int, value: float) -> None:
        """Report the metric of an evaluation to Optuna, with the number of the evaluation.

        Pruners compare the metrics of different trials at the same number.
        """
        number = self._number(step)
        if number not in self.claim.reported and not math.isnan(value):
            self.claim.trial.report(value, number)
            self.claim.reported[number] = value

    def _tell(self, outcome: str) -> str:
        """Report to the study how the trial ended, and return the outcome."""
        finite = [value for value in self.claim.reported.values() if math.isfinite(value)]
        reached = max((line["step"] for line in metrics_of(self.path)), default=0)
        if outcome == DONE and not finite:  # the metric overflowed, or a callback ended the run
            outcome = DIVERGED if reached == self.total_steps else PRUNED
        best = max if self.maximize else min
        value = best(finite) if outcome == DONE else None
        facts = {STEP: reached, STEPS: self.total_steps, OUTCOME: outcome}
        end_trial(self.study, self.claim, self.path, value, facts)
        return outcome


def end_trial(
    study: OptunaStudy, claim: Claim, path: Path, value: float | None, facts: Mapping[str, Any]
) -> None:
    """Report the end of a trial to the study, and delete what only a running trial needs.

    Args:
        path: the run directory.
        value: the result; None if there is no result.
        facts: user attributes of the trial.
    """
    for name, fact in facts.items():
        claim.trial.set_user_attr(name, fact)
    study.tell(claim, value)
    for name in (CHECKPOINTS, "nonfinite"):
        remove(path / name)


def has_begun(path: Path) -> bool:
    """Whether the trial in a directory has taken a step."""
    return any(line["step"] > 0 for line in metrics_of(path))


def _recorded_outcome(lines: Sequence[Mapping[str, Any]]) -> str | None:
    """The outcome of a trial according to its log; None if its run must go on.

    If a user's callback ends a trial, the trial counts as done, as with early stopping.
    """
    reasons = {line["event"]: line.get("reason") for line in lines if "event" in line}
    if reasons.get("stop") == PRUNED:
        return PRUNED
    return DONE if "finish" in reasons else None
