"""Repeat a logged step of a run from an earlier checkpoint; the run directory is only read."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from consyn_jax.config import RunConfig
from consyn_jax.distributed.mesh import local_rows, placer
from consyn_jax.errors import UserError
from consyn_jax.model.parameters import Params
from consyn_jax.training.checkpointing.manager import Checkpoints
from consyn_jax.training.checkpointing.ownership import RunRecord
from consyn_jax.training.checkpointing.run_state import Progress
from consyn_jax.training.inputs.batch_source import BatchSource
from consyn_jax.training.logging.metrics import FILE_NAME, read_metrics
from consyn_jax.training.optim.schedules import Plateau
from consyn_jax.training.optim.state import with_rate_scale
from consyn_jax.training.program import TRAIN_AXES, Program
from consyn_jax.training.run import beginning
from consyn_jax.training.run.directory import CHECKPOINTS
from consyn_jax.training.runtime.memory import compile_to_fit
from consyn_jax.training.step import TrainState

COMPARED = {"loss": "train/loss", "grad_norm": "train/grad_norm"}
LOGGED = "train/learning_rate"  # in the line of every logged step, even if the loss is not finite


@dataclass
class Comparison:
    """The logged and the repeated values of one step.

    Attributes:
        logged: Loss and gradient norm from metrics.jsonl. The log omits non-finite values; they are
            NaN here. None if the run did not log the step.
        repeated: Loss and gradient norm of the repeated step.
    """

    step: int
    logged: dict[str, float] | None
    repeated: dict[str, float]

    @property
    def difference(self) -> float:
        """Largest relative difference between repeated and logged values; 0 if none is logged."""
        logged = (self.logged or {}).items()
        return max((_apart(value, self.repeated[name]) for name, value in logged), default=0.0)

    @property
    def is_finite(self) -> bool:
        """Whether the loss and the gradient norm of the repeated step are finite."""
        return all(map(math.isfinite, self.repeated.values()))


def _apart(logged: float, repeated: float) -> float:
    """Relative difference of two values; infinite if only one of them is finite.

    Two non-finite values count as equal, because the log does not distinguish NaN from infinity.
    """
    finite = math.isfinite(logged), math.isfinite(repeated)
    if logged == repeated or not any(finite):
        return 0.0
    return abs(logged - repeated) / max(abs(logged), 1e-12) if all(finite) else math.inf


@dataclass
class RepeatedRun:
    """The result of repeating the steps of a run, from a checkpoint to the requested step.

    Attributes:
        start: Step of the checkpoint; 0 for the beginning of the run.
        steps: Comparisons of the steps that the run logged, and of the requested step.
        mesh: Mesh on which the steps were repeated.
        skipped: Messages about checkpoints that could not be used.
    """

    start: int
    steps: list[Comparison]
    mesh: dict[str, int]
    skipped: list[str] = field(default_factory=list)


def repeat_logged_step(
    path: Path,
    step: int,
    run: RunConfig,
    program: Program,
    source: BatchSource,
    make_parameters: Callable[[Any], Params],
    make_base: Callable[[], dict[str, Any]],
    compile_train_step: Callable[[RunConfig], Any],
) -> RepeatedRun:
    """Repeat the steps of the run in `path`, from the newest checkpoint before `step` up to `step`.

    Args:
        run: Configuration of the run.
        make_parameters: Function that makes the initial parameters of the run on a mesh.
        make_base: Function that returns the frozen weights of an adapter run, as further entries of
            every batch; an empty dict for other runs.

    Raises:
        UserError: The log, the state or the data cannot be read.
    """
    log = read_metrics(path / FILE_NAME)
    logged = {line["step"]: line for line in log if LOGGED in line}
    state, progress, skipped = _state_before(path, step, run, program, make_parameters)
    start = progress.step
    run, train_step = compile_to_fit(run, compile_train_step)
    budget, mesh = run.budget, program.mesh
    rows = local_rows(mesh, budget.batch_size)
    place, base = placer(mesh, TRAIN_AXES), make_base()
    batches = source.training(start, budget.batch_size, budget.gradient_accumulation_steps, rows)
    metric = run.evaluation.metric_for_best_model
    evaluations = {line["step"]: line[metric] for line in log if metric in line}
    found: list[Comparison] = []
    for number, batch in zip(range(start + 1, step + 1), batches, strict=False):
        state, metrics = train_step(state, place(batch) | base)
        if number in logged or number == step:
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            found.append(_compared(number, logged.get(number), values))
        if number in evaluations and progress.plateau is not None:
            state = _after_evaluation(state, progress.plateau, evaluations[number])
    if not found or found[-1].step != step:
        raise UserError(f"The data ends before step {step:,}. Give a step that the run has taken.")
    return RepeatedRun(start, found, dict(mesh.shape), skipped)


def _compared(step: int, line: dict[str, Any] | None, values: dict[str, float]) -> Comparison:
    repeated = {name: values[name] for name in COMPARED}
    if line is None:
        return Comparison(step, None, repeated)
    logged = {name: line.get(key, math.nan) for name, key in COMPARED.items()}
    return Comparison(step, logged, repeated)


def _after_evaluation(state: TrainState, plateau: Plateau, value: float) -> TrainState:
    """Apply the plateau rule to the metric of an evaluation; it may lower the learning rate."""
    return state._replace(opt_state=with_rate_scale(state.opt_state, plateau.update(value)))


def _state_before(
    path: Path,
    step: int,
    run: RunConfig,
    program: Program,
    make_parameters: Callable[[Any], Params],
) -> tuple[TrainState, Progress, list[str]]:
    """Return the newest state before a step, its progress, and notes on unusable checkpoints."""
    skipped: list[str] = []
    with closing(Checkpoints(path / CHECKPOINTS, owner=RunRecord.read(path))) as checkpoints:
        for saved in reversed([saved for saved in checkpoints.steps() if saved < step]):
            try:
                state, record = checkpoints.restore(saved, program.state_like)
                return state, Progress.from_json(record), skipped
            except UserError as error:
                skipped.append(str(error))
    branched, new = run.optimizer.decay_from, beginning.new_progress(run)
    if branched is None:
        return program.initial_state(make_parameters(program.mesh)), new, skipped
    if step <= branched:
        raise UserError(
            f"This run begins after step {branched:,} of another run (--decay_from). Give the "
            "directory of that run."
        )
    origin = Path(run.saving.output) / CHECKPOINTS
    return *beginning.branch(origin, branched, program.state_like, new), skipped
