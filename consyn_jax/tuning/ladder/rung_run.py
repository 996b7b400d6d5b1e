"""Train the runs of one size of a ladder: ordinary runs, which resume after an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import optax

from consyn_jax.config import RunConfig
from consyn_jax.config_file import DERIVED
from consyn_jax.errors import UserError
from consyn_jax.files import remove, write_whole
from consyn_jax.flags import flat
from consyn_jax.training.checkpointing.checkpoint_files import saved_steps
from consyn_jax.training.checkpointing.manager import Checkpoints
from consyn_jax.training.diagnostics.gradient_noise import GradientNoise, measured_noise
from consyn_jax.training.logging.metrics import metrics_of
from consyn_jax.training.program import Built
from consyn_jax.training.run.directory import CHECKPOINTS, CONFIG, run_path
from consyn_jax.training.run.identity import SCHEDULE_FLAGS, differences, read_run_config
from consyn_jax.tuning.ladder.rungs import Rung
from consyn_jax.tuning.ladder.scaling_law import LossPoint
from consyn_jax.tuning.shared_programs import SharedPrograms, TrialProgram
from consyn_jax.tuning.trial_trainer import TrialTrainer
from consyn_jax.tuning.varied_run import Settings

NOISE = "gradient_noise.json"  # measurements by step, in the directory of the longest run
METRIC = "eval/loss"
BUDGETS = {"epochs", "max_steps", "total_tokens"}  # the number of steps is compared instead
SAVE_MINUTES = 5.0  # default of --save_minutes for the runs of a ladder
ORIGIN = "ladder"  # origin of the values that the ladder sets


class RungTrainer(TrialTrainer):
    """Train one run of a model size, with the compiled programs of the longest run of this size.

    Args:
        longest: number of steps of the longest run.
        inputs: keyword arguments of `TrialTrainer`.
    """

    def __init__(self, longest: int, *inputs: Any, **keywords: Any) -> None:
        super().__init__(*inputs, **keywords)
        self.longest = longest

    def _build(self, run: RunConfig, schedule: optax.Schedule | None) -> Built:
        built = super()._build(run, schedule)
        assert isinstance(built.program, TrialProgram)
        # Only the longest run compiles the initial state; all runs share the evaluation.
        return built._replace(program=replace(built.program, total_steps=self.longest))

    def compile_train_step(self, run: RunConfig, schedule: optax.Schedule | None = None) -> Any:
        """Compile the train step of `run`, or reuse the step of another run of this model size."""
        program = self._build(run, schedule).program
        return self.shared.bound_step(program, run, self.total_steps, self.longest)


class RungRun:
    """Train the unfinished runs of one model size of a ladder, and measure the gradient noise.

    Args:
        settings: function that takes flag values by name, and returns the settings of a run.
        path: directory of the longest run; the directories of the other runs are beside it.
    """

    def __init__(
        self,
        rung: Rung,
        path: Path,
        settings: Callable[[Mapping[str, Any]], Settings],
        trainer_inputs: Callable[[Settings], dict[str, Any]],
    ) -> None:
        self.rung, self.path = rung, path
        self.settings, self.trainer_inputs = settings, trainer_inputs
        self.shared = SharedPrograms()

    def run(self) -> None:
        """Do all training and measurements that are not done yet.

        Raises:
            Interrupted: a signal ended a run; the same command continues it.
            Diverged: the loss of a run was not finite.
            UserError: a run was started with other flags or data.
        """
        try:
            self._check_same()
            if not is_finished(self.path):
                self._whole.train()
            for start in self.rung.starts:
                self._measure_noise(start)
            for start, path in zip(self.rung.starts[:-1], self.paths[:-1], strict=True):
                if not is_finished(path):
                    self._trainer(start).train()
        except UserError as error:
            raise UserError(f"Size of {self.rung.parameters:,} parameters: {error}") from error
        for path in self.paths:  # no run continues from these checkpoints
            remove(path / CHECKPOINTS)

    def _check_same(self) -> None:
        """Check that the existing runs were started with the flags and data of this command.

        Raises:
            UserError: the flags or data differ, or there are shorter runs but no longest run.
        """
        if not (is_finished(self.path) or saved_steps(self.path / CHECKPOINTS)):
            if left := next(filter(is_finished, self.paths[:-1]), None):
                raise UserError(
                    f"{left} continued a run that is no longer in {self.path}. Give another "
                    "--output, or delete the ladder with --overwrite."
                )
            return
        old, run = read_run_config(self.path / CONFIG), self._whole.run
        derived = self._whole.derived()
        changes = differences(old, run, derived)
        new = {**flat(run), **derived}
        recorded = {**old, **old[DERIVED]}
        for name in sorted((SCHEDULE_FLAGS - BUDGETS) | {"total_steps"}):
            if recorded.get(name) != new[name]:
                changes.append(f"{name} was {recorded.get(name)} and is {new[name]}")
        if changes:
            raise UserError(
                f"{self.path} contains another run: {'; '.join(changes)}. Give another "
                "--output, use the old values, or delete the ladder with --overwrite."
            )

    @property
    def is_done(self) -> bool:
        """Whether all runs are finished and measured."""
        measured = len(self.noise()) == len(self.rung.starts)
        return measured and all(map(is_finished, self.paths))

    @property
    def paths(self) -> list[Path]:
        """The run directories, from the shortest run to the longest."""
        name = self.path.name
        beside = [self.path.with_name(f"{name}-decay-{start}") for start in self.rung.starts[:-1]]
        return [*beside, self.path]

    def points(self) -> list[LossPoint]:
        """The loss at the end of each run that is finished."""
        found = []
        for path, end, tokens in zip(self.paths, self.rung.ends, self.rung.tokens, strict=True):
            lines = metrics_of(path) if is_finished(path) else []
            losses = [line[METRIC] for line in lines if METRIC in line and line["step"] == end]
            found += [LossPoint(self.rung.parameters, tokens, loss) for loss in losses[-1:]]
        return found

    def noise(self) -> dict[int, GradientNoise]:
        """The gradient noise measured so far, by step."""
        try:
            text = (self.path / NOISE).read_text(encoding="utf-8")
            return {int(step): GradientNoise(**values) for step, values in json.loads(text).items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.path / NOISE} cannot be read ({type(error).__name__}). Delete this "
                "file; the noise is measured again if the run still has its checkpoints."
            ) from error

    def _measure_noise(self, step: int) -> None:
        """Measure the gradient noise after a step, and store it.

        Skip this if the step is already measured or has no checkpoint.
        """
        found = self.noise()
        if step in found or step not in saved_steps(self.path / CHECKPOINTS):
            return
        trainer, program = self._whole, self._whole_program
        checkpoints = Checkpoints(self.path / CHECKPOINTS)
        try:
            state, _ = checkpoints.restore(step, program.state_like)
        finally:
            checkpoints.close()
        source = trainer.train_source
        found[step] = measured_noise(program, state.params, source, trainer.run, step)
        text = json.dumps({step: asdict(noise) for step, noise in sorted(found.items())}, indent=1)
        write_whole(self.path / NOISE, text + "\n")

    @cached_property
    def _whole(self) -> RungTrainer:
        """The trainer of the longest run; the shorter runs use its data and programs."""
        return self._trainer(None)

    @cached_property
    def _whole_program(self) -> TrialProgram:
        program = self._whole.build().program
        assert isinstance(program, TrialProgram)
        return program

    def _trainer(self, decay_from: int | None) -> RungTrainer:
        run, origins = self.settings(self._values(decay_from))
        rung = self.rung
        what = f"{rung.parameters:,} parameters without embeddings, in {run_path(run)}"
        header = [("size", what)]
        inputs = self.trainer_inputs((run, origins))
        return RungTrainer(rung.steps, self.shared, header, **inputs)

    def _values(self, decay_from: int | None) -> dict[str, Any]:
        """Values of a run by flag name.

        Args:
            decay_from: step at which a shorter run branches off from the longest run; None for the
                longest run.
        """
        first = self.rung.starts[0]  # all starts are multiples of the first
        return {
            **self.rung.shape.flags,
            "scheduler": "wsd",
            "max_steps": self.rung.steps,
            "decay_from": decay_from,
            "output": str(self.path),
            "overwrite": False,
            "save_steps": first,
            "keep_every": first,
            "keep_last": 1,
        }


def is_finished(path: Path) -> bool:
    """Whether a run's log says that it has ended."""
    return any(line.get("event") == "finish" for line in metrics_of(path))


def with_intervals(run: RunConfig) -> RunConfig:
    """Make the run save every `SAVE_MINUTES`, and evaluate only at the end.

    `--save_minutes` and `--eval_steps` take precedence. The run exports its last model, not its
    best.
    """
    saving, evaluation = run.saving, replace(run.evaluation, load_best_model_at_end=False)
    if saving.save_minutes is None:
        saving = replace(saving, save_minutes=SAVE_MINUTES)
    if evaluation.eval_steps is None:
        evaluation = replace(evaluation, eval_steps=run.budget.max_steps)
    return replace(run, evaluation=evaluation, saving=saving)
