"""The beginning of a run: the step from which it resumes, its state, and its files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from consyn_jax.config import EvaluationOptions, LoggingOptions, RunConfig
from consyn_jax.distributed.process_group import gather, is_first
from consyn_jax.errors import UserError
from consyn_jax.evaluation_metrics import is_greater_better
from consyn_jax.files import remove
from consyn_jax.integers import natural
from consyn_jax.training.checkpointing.manager import Checkpoints
from consyn_jax.training.checkpointing.ownership import check_log
from consyn_jax.training.checkpointing.run_state import Progress
from consyn_jax.training.logging.console import Console
from consyn_jax.training.logging.metrics import FILE_NAME, MetricsLog, read_metrics
from consyn_jax.training.logging.tracking.callbacks import Callbacks, Maker, RunView
from consyn_jax.training.logging.tracking.trackers import tracker_makers
from consyn_jax.training.optim.schedules import build_plateau
from consyn_jax.training.run.after_evaluation import is_over
from consyn_jax.training.run.directory import RunDirectory
from consyn_jax.training.run.model_files import holds_model
from consyn_jax.training.run.model_manifest import disagreement
from consyn_jax.training.step import TrainState


def resume_step(resume: str, directory: RunDirectory, checkpoints: Checkpoints) -> int | None:
    """The step of the checkpoint to resume from; None if there is none, so the run is new.

    Args:
        resume: Value of `--resume`: a step, or any other text for the newest intact checkpoint.
    """
    step = natural(resume)
    if step is not None:
        return step
    return checkpoints.newest() if directory.holds_run else None


def from_first(look: Callable[[], str]) -> str:
    """Send a value from process 0 to all processes of the run; all of them must call this.

    Args:
        look: Function that returns the value; only process 0 calls it.
    """
    return gather(look() if is_first() else "")[0]


def is_complete(
    path: Path,
    resumed: int | None,
    total_steps: int,
    checkpoints: Checkpoints,
    options: EvaluationOptions,
    data_is_known: bool,
    warn: Callable[[str], None],
) -> bool:
    """Whether the run is complete: its last step is saved, and the event `finish` is in its log.

    Args:
        path: The run directory.
        resumed: Step from which the run would resume.
        data_is_known: Whether the training data was compared with the data of the run in `path`.
        warn: Function for a warning if the work after the last step must be repeated.

    Raises:
        UserError: The run is complete, but the data was not compared.
    """
    if resumed is None:
        return False
    progress = Progress.from_json(checkpoints.record(resumed))  # refuses the log of another run
    if not is_over(progress, total_steps, options):
        return False
    if reason := from_first(lambda: unfinished(path)):
        warn(
            f"The run in {path} has taken its last step, but {reason}. The work after the last "
            "step is repeated."
        )
        return False
    if not data_is_known:
        raise UserError(
            f"The run in {path} is complete, and an iterator or random data cannot be compared "
            "with the data of that run. Pass another output_dir, or overwrite=True."
        )
    return True


def unfinished(path: Path) -> str:
    """Describe which part of the work after the last step is missing; "" if none is.

    The result is a clause, such as "final has no model".

    Raises:
        UserError: The log is damaged.
    """
    final, log = path / "final", path / FILE_NAME
    if not holds_model(final):
        return f"{final} has no model"
    if reason := disagreement(final):
        return f"{final / reason}"
    lines = read_metrics(log) if log.exists() else []
    if not any(line.get("event") == "finish" for line in lines):
        return f"{log} has no finish event"
    return ""


def restore(checkpoints: Checkpoints, step: int, like: TrainState) -> tuple[TrainState, Progress]:
    """Restore the state and the progress of this run at `step`, and remove later checkpoints."""
    state, record = checkpoints.restore(step, like)
    progress = Progress.from_json(record)
    checkpoints.delete_after(step)
    return state, progress


def new_progress(run: RunConfig) -> Progress:
    """The progress of a run that starts at step 0."""
    greater_is_better = bool(is_greater_better(run.evaluation.metric_for_best_model))
    return Progress(plateau=build_plateau(run.optimizer, greater_is_better))


def branch(
    directory: Path, step: int, like: TrainState, new: Progress
) -> tuple[TrainState, Progress]:
    """Restore the state of another run at `step`, for a new run that continues from there.

    The other run may still be training, so its checkpoints are only read. The other run's best
    evaluation does not count for the new run.

    Args:
        directory: Directory of the other run's checkpoints.
        new: Progress of a run at step 0.

    Returns:
        The state, and the progress of the new run at `step`.
    """
    with closing(Checkpoints(directory)) as others:
        state, record = others.restore(step, like)
    there = Progress.from_json(record)
    return state, replace(new, step=step, tokens=there.tokens, left_out=there.left_out)


def report_smaller_batches(asked: RunConfig, found: RunConfig, console: Console) -> None:
    """Print a note if micro-batches were made smaller to fit the devices."""
    budget = found.budget
    if budget.batch_size != asked.budget.batch_size:
        console.note(
            f"Micro-batches of {asked.budget.batch_size} do not fit the devices, so each step "
            f"takes {budget.gradient_accumulation_steps} micro-batches of {budget.batch_size} "
            "sequences; the result is the same."
        )


def rewind(
    log: MetricsLog, directory: RunDirectory, step: int, warn: Callable[[str], None]
) -> dict[str, int]:
    """Remove what the run logged after `step`, and a best model from a later step.

    Args:
        step: Step from which the run resumes; -1 for a new run.

    Returns:
        Details for the event `resume`: the last step in the log, if the log ends before `step`.

    Raises:
        UserError: The log belongs to another run.
    """
    lines = read_metrics(log.path)
    if step >= 0:
        check_log(log.path, lines, directory.record)
    if any(line.get("event") == "best" and line["step"] > step for line in lines):
        remove(directory.path / "best")
    log.truncate_from(step)
    ended = max((line["step"] for line in lines), default=0)
    if ended >= step:
        return {}
    warn(
        f"{log.path} ends at step {ended:,}, but the checkpoint is of step {step:,}: the log lines "
        "between these steps are lost."
    )
    return {"log_ended_at": ended}


def forget_missing_best(progress: Progress, directory: Path) -> None:
    """Forget the best evaluation if its model is missing, so that the next evaluation is the best.

    Every process of a run must call this function; process 0 checks for the model.
    """
    if from_first(lambda: str(holds_model(directory / "best"))) != "True":
        progress.selection = replace(progress.selection, best_value=None, best_step=None)


def open_callbacks(
    options: LoggingOptions,
    run: RunView,
    own: Iterable[Maker],
    progress: Progress,
    warn: Callable[[str], None],
    checkpoints: Checkpoints,
) -> Callbacks:
    """Start or continue the trackers, and start the user's callbacks.

    Args:
        run: View of the run, which the callbacks receive.
        own: Functions that make the user's callbacks.
        progress: Progress of the run; it has the identity of a tracker to continue.
    """
    resumed = run.resumed_from
    if resumed is None and (run.directory / "logs").exists():
        resumed = -1  # start new curves after a run that stopped before its first checkpoint

    def keep_id(run_id: str) -> None:
        progress.tracker_id = run_id

    trackers = tracker_makers(
        options.logging_backend,
        directory=run.directory,
        project=options.wandb_project,
        run_name=options.wandb_run_name,
        config=run.config,
        resume_step=resumed,
        run_id=progress.tracker_id,
        keep_id=keep_id,
        warn=warn,
    )
    known = set(checkpoints.steps())

    def saved() -> list[Path]:
        new = [step for step in checkpoints.steps() if step not in known]
        known.update(new)
        return [checkpoints.directory / str(step) for step in new]

    return Callbacks([*trackers, *own], run, warn, saved)


def recorded_summary(path: Path) -> dict[str, float | int]:
    """The newest value of every metric in a `metrics.jsonl`, and its last `step` and `tokens`."""
    last = read_metrics(path)[-1]
    return {**last_values(path), "step": last["step"], "tokens": last["tokens"]}


def last_values(path: Path) -> dict[str, float]:
    """The newest value of every metric in a `metrics.jsonl`."""
    return newest_values(read_metrics(path))


def newest_values(lines: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The newest value of every metric in lines of a `metrics.jsonl`."""
    last: dict[str, float] = {}
    for line in lines:
        if "event" not in line:
            last |= {name: value for name, value in line.items() if "/" in name}
    return last
