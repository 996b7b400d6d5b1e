"""Run a ladder: plan it, train its sizes one after the other in this process, and predict."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from consyn_jax.config import RunConfig
from consyn_jax.errors import UserError, leave_out_overwrite
from consyn_jax.files import make_directory, remove, write_whole
from consyn_jax.model.arithmetic import train_flops_per_token
from consyn_jax.prepare_config import HOLD_OUT
from consyn_jax.training.logging.console import Console, show
from consyn_jax.training.logging.formats import compact, decimals
from consyn_jax.training.optim.schedules import count_steps
from consyn_jax.training.run.directory import LADDER_RECORD, RUNGS
from consyn_jax.training.run.lock import check_free
from consyn_jax.training.trainer import ConsynTrainer
from consyn_jax.tuning.ladder.critical_batch import BatchPoint
from consyn_jax.tuning.ladder.ladder_options import parse_budgets, parse_sizes
from consyn_jax.tuning.ladder.ladder_page import ladder_page
from consyn_jax.tuning.ladder.ladder_results import (
    NEXT,
    LadderResults,
    as_json,
    command,
    notes,
    table,
)
from consyn_jax.tuning.ladder.model_family import ladder_shapes, model_of
from consyn_jax.tuning.ladder.predictions import Forecast
from consyn_jax.tuning.ladder.rung_run import ORIGIN, RungRun, with_intervals
from consyn_jax.tuning.ladder.rungs import Rung, plan_rung
from consyn_jax.tuning.ladder.scaling_law import DRAWS, FEW_STEPS, can_fit, long_enough
from consyn_jax.tuning.tune_options import TuneConfig, scaled_run
from consyn_jax.tuning.varied_run import Settings, VariedRun

PAGE, SIZES, JSON = "ladder.html", RUNGS, LADDER_RECORD
UNLIKE = 1.6  # a note is printed if the proportions of two sizes differ by more than this factor
PASSES = 4  # repeated data is nearly as good as new up to here (Muennighoff et al., 2023)


class Ladder:
    """One invocation of `consyn-tune --ladder`.

    Args:
        varied: the user's flags, from which the run of each size is resolved.
        base: settings of the run of the largest size; the data is already prepared.
        trainer_inputs: function that returns the keyword arguments of a trainer, for a run.

    Raises:
        UserError: the budget is too small, there is no evaluation data, or the ladder to delete is
            in use by another process.
    """

    def __init__(
        self,
        config: TuneConfig,
        varied: VariedRun,
        base: Settings,
        trainer_inputs: Callable[[Settings], dict[str, Any]],
    ) -> None:
        self.options, self.varied, self.trainer_inputs = config.ladder, varied, trainer_inputs
        self.output, self.quiet = Path(config.saving.output), config.logging.quiet
        trainer = ConsynTrainer(**trainer_inputs(base))
        if trainer.eval_source is None:
            raise UserError(
                "A ladder compares evaluations, but there is no evaluation data: the "
                f"validation split has no document. {HOLD_OUT}"
            )
        self.vocab_size = trainer.model.config.vocab_size
        self.run_config, origins = scaled_run(varied)
        given = origins["epochs"] != "default"
        epochs = self.run_config.budget.epochs if given else None
        sequences = trainer.train_source.sequences
        self.most_steps = _most_steps(self.run_config, epochs, sequences)
        assert self.options.ladder is not None
        self.rungs = [
            plan_rung(self.run_config, shape, self.options.tokens_per_parameter, self.most_steps)
            for shape in ladder_shapes(self.run_config.model, parse_sizes(self.options.ladder))
        ]
        self.passes = math.nan
        if sequences:
            in_epoch = sequences * self.run_config.row_length
            self.passes = self.rungs[-1].tokens[-1] / in_epoch
        self.runs = [self._rung_run(rung) for rung in self.rungs]
        if config.saving.overwrite:
            delete_ladder(self.output)

    def run(self) -> LadderResults:
        """Train the runs that are not finished, fit the curve, and write the results.

        Raises:
            Interrupted: a signal ended a run; the same command continues it.
            Diverged: the loss of a run was not finite.
        """
        self._print_header()
        for rung in self.runs:
            rung.run()
            self._note(rung)
        results = self.results()
        self._write(results)
        self._print_end(results)
        return results

    def results(self) -> LadderResults:
        """Fit the curve to all finished runs, and predict.

        Raises:
            UserError: too few runs have a loss.
        """
        measured = [point for rung in self.runs for point in rung.points()]
        if not can_fit(measured):
            raise UserError(
                f"Only {len(measured)} of {sum(len(rung.paths) for rung in self.runs)} runs "
                "have a loss at their last step, too few to fit a curve. If a callback ended "
                "the other runs early, leave the callback out, and start again with "
                "--overwrite."
            )
        tokens = self.rungs[0].tokens_per_step
        points = long_enough(measured, tokens)
        left_out = [point for point in measured if point not in points]
        length = self.run_config.length
        forecast = Forecast(points, self._batches(), self.vocab_size, length, DRAWS)
        budgets = parse_budgets(self.options.predict)
        ratio = self.options.tokens_per_parameter
        predicted = [p for budget in budgets or (None,) for p in forecast.targets(budget, ratio)]
        flops = [budget.amount for budget in budgets if budget.kind == "flops"]
        if not budgets:
            flops = [found.flops for found in predicted]
        best = [forecast.best(each) for each in flops]
        return LadderResults(forecast, self._flops(), tokens, predicted, best, left_out)

    def _batches(self) -> list[BatchPoint]:
        """The noise scales of all sizes, where they could be measured."""
        found = []
        for run in self.runs:
            rung, measured = run.rung, run.noise()
            for start, whole in zip(rung.starts, rung.tokens, strict=True):
                if start in measured and (scale := measured[start].scale) is not None:
                    tokens = start * rung.tokens_per_step
                    found.append(BatchPoint(rung.parameters, tokens, scale, whole))
        return found

    def _flops(self) -> dict[float, float]:
        """Training FLOPs per token of each size, by number of parameters."""
        models = [model_of(self.run_config.model, r.shape, self.vocab_size) for r in self.rungs]
        length = self.run_config.length
        return {
            rung.parameters: train_flops_per_token(model, length)
            for rung, model in zip(self.rungs, models, strict=True)
        }

    def _rung_run(self, rung: Rung) -> RungRun:
        path = self.output / SIZES / str(rung.parameters)

        def settings(values: Mapping[str, Any]) -> Settings:
            run, origins = self.varied.with_values(values)
            run = with_intervals(run)
            quiet = run.logging.quiet or not sys.stderr.isatty()
            run = replace(run, logging=replace(run.logging, quiet=quiet))
            return run, origins | dict.fromkeys(values, ORIGIN)

        return RungRun(rung, path, settings, self.trainer_inputs)

    # -------------------------------------------------------------------------------------- results

    def _write(self, results: LadderResults) -> None:
        title = f"Ladder {self.output.resolve().name}"
        page = ladder_page(results, title, self._doubts(results))
        try:
            make_directory(self.output)
            write_whole(self.output / JSON, json.dumps(as_json(results), indent=1) + "\n")
            write_whole(self.output / PAGE, page.encode("utf-8", "replace"))
        except OSError as error:
            raise UserError(
                f"--output {self.output} cannot be written: {error.strerror}. Free some space; "
                "the same command continues the ladder."
            ) from error

    def _doubts(self, results: LadderResults) -> list[str]:
        return [*self._notes(), *notes(results)]

    def _notes(self) -> list[str]:
        """Sentences about the plan, known before the first run."""
        said = list[str]()
        largest, ratio = self.rungs[-1], self.options.tokens_per_parameter
        if ratio * largest.parameters > self.most_steps * largest.tokens_per_step:
            said.append(
                f"--tokens_per_parameter is {ratio:g}, but the largest size gets only "
                f"{largest.tokens[-1] / largest.parameters:.3g}, because --max_steps, "
                "--total_tokens or --epochs ends its runs. To train longer, remove these from "
                "the command and from --config."
            )
        if self.passes > 1:
            worth = (
                f"up to about {PASSES} passes, repeated data is nearly as good as new data."
                if self.passes <= PASSES
                else f"after about {PASSES} passes, repeated data is clearly worse than new "
                "data, so predictions hold only for the same number of passes."
            )
            said.append(
                f"The largest size reads the training data {self.passes:.1f} times; {worth}"
            )
        if (fewest := self.rungs[0].ends[0]) < FEW_STEPS:
            said.append(
                f"The shortest run has {fewest} steps. Runs of fewer than {FEW_STEPS} are left "
                "out of the fit if there are enough longer runs; lower --batch_size to use "
                "them."
            )
        proportions = [rung.shape.hidden_dim / rung.shape.num_layers for rung in self.rungs]
        if max(proportions) > UNLIKE * min(proportions):
            said.append(
                f"The sizes have {min(proportions):.3g} to {max(proportions):.3g} times as much "
                "width as layers. Losses of such different shapes do not lie on one curve; a "
                "smaller --head_dim allows sizes that are more alike."
            )
        if self.run_config.optimizer.parametrization == "standard":
            said.append(
                "All sizes have the same learning rate, but in the standard parametrization "
                "the best rate falls with width. With --parametrization mup, one rate suits "
                "all sizes."
            )
        return said

    def _print_header(self) -> None:
        steps = sum(rung.all_steps * rung.tokens_per_step for rung in self.rungs)
        done = sum(run.is_done for run in self.runs)
        rows = [
            ("sizes", ", ".join(f"{rung.parameters:,}" for rung in self.rungs)),
            ("tokens", f"{compact(steps)} in all, {done} of {len(self.rungs)} sizes done"),
            (
                "schedule",
                "wsd; shorter runs start from checkpoints of the longest run, and each run "
                "ends with a decay",
            ),
        ]
        with Console(quiet=self.quiet) as console:
            console.header(rows, "consyn-tune")
            for sentence in self._notes():
                console.note(sentence)

    def _note(self, run: RungRun) -> None:
        losses = ", ".join(decimals(point.loss) for point in run.points())
        with Console(quiet=self.quiet) as console:
            console.note(f"{run.rung.parameters:,} parameters: eval/loss {losses}")

    def _print_end(self, results: LadderResults) -> None:
        for line in table(results):
            show(line)
        with Console(quiet=self.quiet) as console:
            for sentence in notes(results):
                console.note(sentence)
            lines = [NEXT, f"  {command(results.best[0])}"] if results.best else []
            where = f"Everything is in {self.output}: {PAGE}, {JSON}, {SIZES}/."
            console.finish([*lines, where])


def _most_steps(run: RunConfig, epochs: float | None, sequences: int | None) -> float:
    """Maximum number of steps of a run, from the user's budgets."""
    budget = replace(run.budget, epochs=epochs)
    if (budget.epochs, budget.max_steps, budget.total_tokens) == (None, None, None):
        return math.inf
    return count_steps(budget, run.optimizer, run.row_length, sequences)


def delete_ladder(output: Path) -> None:
    """Delete the files of a ladder from a directory, and keep all other files.

    Raises:
        UserError: another process trains one of the sizes.
    """
    for path in filter(Path.is_dir, sorted((output / SIZES).glob("*"))):
        check_free(path)
    for name in (PAGE, JSON, SIZES):
        remove(output / name)
    leave_out_overwrite()
