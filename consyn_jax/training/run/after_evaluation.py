"""Decisions after an evaluation: best model, early stopping, plateau of the learning rate."""

from __future__ import annotations

from collections.abc import Callable

from consyn_jax.config import EvaluationOptions
from consyn_jax.errors import UserError
from consyn_jax.training.checkpointing.run_state import Progress
from consyn_jax.training.run.recording import Recorder


def record_evaluation(
    values: dict[str, float],
    options: EvaluationOptions,
    recorder: Recorder,
    export_best: Callable[[], None],
) -> None:
    """Record an evaluation, export the model if it is the best, and update the plateau.

    Raises:
        UserError: the metric that selects the best model is not among the values.
    """
    metric, progress = options.metric_for_best_model, recorder.progress
    if metric not in values:
        raise UserError(
            f"--metric_for_best_model {metric} is not available, because the size in bytes of "
            "the evaluation text is unknown. Use eval/loss."
        )
    value = values[metric]
    recorder.evaluation(values)
    best = progress.selection.update(metric, value, progress.step, options.early_stopping_min_delta)
    recorder.console.evaluation(values, best)
    if best:
        # Log the event first, so that a run that resumes from an earlier step deletes the model.
        recorder.event("best", {metric: value})
        export_best()
    if progress.plateau is None:
        return
    before = progress.plateau.scale
    if progress.plateau.update(value) != before:
        recorder.console.note(
            f"Plateau at step {progress.step:,}: from here the learning rate is "
            f"{progress.plateau.scale:g} of the schedule's."
        )


def stops_early(progress: Progress, options: EvaluationOptions) -> bool:
    """Whether early stopping ends the run after the evaluations so far."""
    return progress.selection.should_stop(
        options.early_stopping_patience, progress.step, options.early_stopping_min_steps
    )


def record_early_stop(recorder: Recorder, *, by_rule: bool = True) -> None:
    """Record that the run ends early.

    Args:
        by_rule: for want of improvement; otherwise `RunInputs.stops_after` ends it.
    """
    selection = recorder.progress.selection
    if not by_rule:
        recorder.event("stopped", {"best_step": selection.best_step})
        recorder.console.note(f"Stopped after the evaluation at step {recorder.progress.step:,}.")
        return
    recorder.event("early_stop", {"best_step": selection.best_step, "stale": selection.stale})
    recorder.console.note(
        f"Early stop at step {recorder.progress.step:,}: {selection.stale} evaluations without "
        f"improvement since step {selection.best_step:,}."
    )
