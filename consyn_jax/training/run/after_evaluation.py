"""Decisions after an evaluation: best model, early stopping, and plateau of the learning rate.

This module also records that a callback ends a run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from consyn_jax.config import EvaluationOptions
from consyn_jax.errors import UserError
from consyn_jax.training.checkpointing.run_state import Progress
from consyn_jax.training.run.recording import Recorder


def record_evaluation(
    values: dict[str, float],
    options: EvaluationOptions,
    recorder: Recorder,
    export_best: Callable[[], None],
) -> dict[str, Any]:
    """Record an evaluation, export the best model so far, and inform the plateau schedule.

    Returns:
        The line of the log; empty in processes that do not write.

    Raises:
        UserError: The metric that selects the best model is not among the evaluation's values.
    """
    metric, progress = options.metric_for_best_model, recorder.progress
    if metric not in values:
        raise UserError(
            f"--metric_for_best_model {metric} is not available, because the size in bytes of "
            "the evaluation text is unknown. Use --metric_for_best_model eval/loss."
        )
    value = values[metric]
    line = recorder.evaluation(values)
    best = progress.selection.update(metric, value, progress.step, options.early_stopping_min_delta)
    recorder.console.evaluation(values, best)
    if best:
        # Log the event before the export. If the run then resumes from an earlier step, it finds
        # the event, and deletes the model of the later step.
        recorder.event("best", {metric: value})
        export_best()
    if progress.plateau is None:
        return line
    before = progress.plateau.scale
    if progress.plateau.update(value) != before:
        recorder.console.note(
            f"Plateau at step {progress.step:,}: from now on, the learning rate is "
            f"{progress.plateau.scale:g} times the schedule's rate."
        )
    return line


def stops_early(progress: Progress, options: EvaluationOptions) -> bool:
    """Whether early stopping ends the run, given the evaluations so far."""
    return progress.selection.should_stop(
        options.early_stopping_patience, progress.step, options.early_stopping_min_steps
    )


def is_over(progress: Progress, total_steps: int, options: EvaluationOptions) -> bool:
    """Whether the budget, early stopping or a callback has ended the run.

    Args:
        total_steps: Total steps of the budget. A run that a callback ended continues if the budget
            has changed since.
    """
    is_used_up = progress.step >= total_steps or progress.stopped_of == total_steps
    return is_used_up or stops_early(progress, options)


def record_stop(recorder: Recorder, total_steps: int) -> None:
    """Record that a callback ends the run.

    Call this before saving, so that the checkpoint contains the record.
    """
    progress, request = recorder.progress, recorder.callbacks.run.stop_request
    progress.stopped_of = total_steps
    recorder.event("stop", dict(request))
    reason = f": {request['reason']}" if request.get("reason") else ""
    recorder.console.note(f"{request.get('by')} stops the run at step {progress.step:,}{reason}.")


def record_early_stop(recorder: Recorder) -> None:
    """Record that early stopping ends the run."""
    selection = recorder.progress.selection
    recorder.event("early_stop", {"best_step": selection.best_step, "stale": selection.stale})
    recorder.console.note(
        f"Early stop at step {recorder.progress.step:,}: {selection.stale} evaluations without "
        f"improvement since step {selection.best_step:,}."
    )
