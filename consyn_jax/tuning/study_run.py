"""Run a study in this process: train trials, and write the results.

Trials are trained one after the other, or side by side in threads, which are called lanes.
"""

from __future__ import annotations

import gc
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from consyn_jax.config import RunConfig
from consyn_jax.errors import UserError
from consyn_jax.evaluation_metrics import is_greater_better
from consyn_jax.files import write_whole
from consyn_jax.flags import flags, flat
from consyn_jax.training.logging.console import Console, show
from consyn_jax.training.logging.formats import decimals
from consyn_jax.training.optim.schedules import build_schedule
from consyn_jax.training.runtime.memory import OutOfMemory, StepTooLarge
from consyn_jax.training.trainer import ConsynTrainer
from consyn_jax.tuning.lanes.lane import Lane, run_lanes
from consyn_jax.tuning.lanes.lane_programs import LanePrograms, pays, step_seconds
from consyn_jax.tuning.optuna_study import Claim, OptunaStudy
from consyn_jax.tuning.search_space import as_text, parse_search
from consyn_jax.tuning.shared_programs import SharedPrograms, compiled_values
from consyn_jax.tuning.space.space_checks import check_space
from consyn_jax.tuning.space.trial_lengths import BATCH_FLAGS, num_evaluations, tokens_grow_with
from consyn_jax.tuning.space.untried_points import num_points
from consyn_jax.tuning.study_directory import (
    PAGE,
    RECIPE,
    TRIALS_DIRECTORY,
    best_directory,
    delete_study,
)
from consyn_jax.tuning.study_page import study_page
from consyn_jax.tuning.study_results import (
    DONE,
    FAILED,
    FAILURE,
    OUTCOME,
    StudyResults,
    check_results,
    recipe,
    results_of,
    table,
)
from consyn_jax.tuning.trial_run import TrialRun, end_trial, has_begun
from consyn_jax.tuning.trial_trainer import (
    TrialTrainer,
    ValuesRefused,
    refusing_values,
    trainer_of_study,
)
from consyn_jax.tuning.tune_options import TRIALS, StudyOptions, TuneConfig, parse_lanes, seconds
from consyn_jax.tuning.varied_run import Settings, VariedRun

MOST_FAILURES = 5  # failed trials in a row after which a command ends
SAVE_MINUTES = 5.0  # between checkpoints of a trial, unless a flag says otherwise


class Tuning:
    """One invocation of `consyn-tune` that works on a search.

    Args:
        varied: the user's flags, from which the run of each trial is resolved.
        base: settings of a run with the first value of each searched flag; the data is already
            prepared.
        trainer_inputs: function that returns the keyword arguments of a trainer, for a run.

    Raises:
        UserError: the search space, the metric, the pruner or the directory cannot be used.
    """

    def __init__(
        self,
        config: TuneConfig,
        varied: VariedRun,
        base: Settings,
        trainer_inputs: Callable[[Settings], dict[str, Any]],
    ) -> None:
        began = time.monotonic()
        self.options, self.shared = config.study, SharedPrograms()
        self.varied, self.base, self.trainer_inputs = varied, base, trainer_inputs
        assert config.study.metric is not None
        self.metric, self.output = config.study.metric, Path(config.saving.output)
        self.maximize = bool(is_greater_better(self.metric))
        self.space = parse_search(config.study.search)
        trainer = trainer_of_study(
            self.space, varied, lambda settings: ConsynTrainer(**trainer_inputs(settings))
        )
        steps = trainer.total_steps
        check_space(self.space, lambda v: build_schedule(varied.with_values(v)[0].optimizer, steps))
        evaluations = num_evaluations(trainer, self.metric, self.options.pruner)
        if config.saving.overwrite:
            delete_study(self.output)
        self.study = OptunaStudy(
            self.output,
            self.options,
            self.space,
            self._definition(trainer),
            maximize=self.maximize,
            num_evaluations=evaluations,
            seed=config.budget.seed,
            overwrite=config.saving.overwrite,
        )
        self.compiled = compiled_values(self.space, varied)
        self.tokens_grow_with = tokens_grow_with(trainer, self.space)
        self.points = num_points(self.space) or math.inf
        self.limit = min(_limit(self.options), self.points)
        budget = self.options.time_budget
        self.deadline = math.inf if budget is None else began + seconds(budget)
        self.quiet, self.failures = config.logging.quiet, 0  # failures in a row

    def run(self) -> StudyResults:
        """Run trials until the limit of trials or of time is reached, and write the results.

        Raises:
            Interrupted: a signal ended the current trials; the same command continues them.
            Diverged: no trial has a result, as in `check_results`.
            UserError: no trial has a result, as in `check_results`. Or a trial failed for a reason
                other than its values; the same command continues that trial. Or `MOST_FAILURES`
                trials failed in a row before the study was finished.
        """
        self._print_header()
        if self.options.vectorize is None:
            self._work()
        else:
            lanes = self._num_lanes(self.options.vectorize)
            run_lanes(lanes, partial(self._work, lanes))
        results = self.write_results()
        self._print_end(results)
        self._check_failures(results)
        check_results(results, self.output)
        return results

    def _check_failures(self, results: StudyResults) -> None:
        """Raise an error if all trials failed, or if failures ended the command early."""
        failed = results.count(FAILED)
        reasons = [t.user_attrs[FAILURE] for t in self.study.trials if FAILURE in t.user_attrs]
        if reasons and failed == len(results.trials):
            raise UserError(
                f"All {failed} trials failed, the last one because: {reasons[-1]} Then start again "
                "with --overwrite."
            )
        is_cut_short = len(results.trials) < self.limit
        if reasons and is_cut_short and self.failures >= MOST_FAILURES:
            raise UserError(
                f"{self.failures} trials in a row failed, the last one because: {reasons[-1]} Then "
                "the same command goes on with the study."
            )

    def _num_lanes(self, asked: str) -> int:
        """Number of trials to train at the same time, from `--vectorize` or by measurement."""
        ended = sum(trial.state.is_finished() for trial in self.study.trials)
        most = max(1, self.limit - ended)
        if (number := parse_lanes(asked)) is not None:
            return int(min(number, most))
        if most == 1:  # there is nothing to compare
            return 1
        trainer = TrialTrainer(self.shared, [], **self.trainer_inputs(self.base))
        seconds = step_seconds(trainer, most)
        found = max((n for n in seconds if pays(seconds, n)), default=1)
        told = ", ".join(f"{duration:.3g} s with {n}" for n, duration in seconds.items())
        with Console(quiet=self.quiet) as console:
            console.note(f"Trials side by side: {found}. Measured time of a step: {told}.")
        return found

    def _work(self, lanes: int = 1, lane: Lane | None = None) -> None:
        """Train one trial after another.

        Args:
            lanes: number of lanes, which are threads that train trials side by side.
            lane: the lane that calls this method; None without lanes.
        """
        while time.monotonic() < self.deadline and not (lane and lane.signals.received):
            if self.failures >= MOST_FAILURES:
                break
            claim = self.study.claim(self.limit)
            if claim is None:
                break
            try:
                outcome = self._train(claim, lanes, lane)
            finally:
                claim.release()
            gc.collect()  # reference cycles keep the trial's state on the device
            self.failures = self.failures + 1 if outcome == FAILED else 0
            results = self.write_results()
            self._note(claim, outcome, results)

    def results(self) -> StudyResults:
        """The results of the trials so far."""
        return results_of(self.study.trials, self.space, self.metric, self.maximize)

    def _train(self, claim: Claim, lanes: int, lane: Lane | None) -> str:
        path = self.output / TRIALS_DIRECTORY / f"{claim.number:04}"
        header = [
            ("trial", f"{claim.number}, in {path}"),
            *((name, as_text(value)) for name, value in claim.values.items()),
        ]
        shared, signals = self.shared, None
        if lane is not None:
            shared, signals = LanePrograms(shared, lanes, lane), lane.signals
        begun = has_begun(path)  # by an earlier process, perhaps on another machine
        try:
            with refusing_values():
                settings = self._trial_settings(claim.values, path, is_alone=lane is None)
                trainer = TrialTrainer(shared, header, signals, **self.trainer_inputs(settings))
                trainer.build()
            return TrialRun(self.study, claim, self.metric, self.maximize, path, trainer).run()
        except UserError as error:
            is_refused = isinstance(error, ValuesRefused) or (
                # Without compiled values, all trials have the same program and fail alike.
                isinstance(error, StepTooLarge | OutOfMemory) and any(self.compiled)
            )
            if not is_refused or begun:
                raise UserError(f"Trial {claim.number}: {error}") from error
            # Leave out the advice of `OutOfMemory`, which is for runs that can continue.
            fact = f"{error.fact}." if isinstance(error, OutOfMemory) else str(error)
            facts = {OUTCOME: FAILED, FAILURE: fact}
            end_trial(self.study, claim, path, None, facts)
            return FAILED

    def _trial_settings(self, values: Mapping[str, Any], path: Path, is_alone: bool) -> Settings:
        """Settings of a trial's run, which exports no model and saves checkpoints by time."""
        run, origins = self.varied.with_values(values)
        saving = replace(run.saving, output=str(path), overwrite=False, keep_last=1)
        if saving.save_steps is None and saving.save_minutes is None:
            steps = 2**31 - 1  # save only at the end, at a signal, and by time
            saving = replace(saving, save_steps=steps, save_minutes=SAVE_MINUTES)
        evaluation = replace(run.evaluation, load_best_model_at_end=False)
        # Without a terminal, or in a lane, a trial prints only the line of `_note`.
        quiet = run.logging.quiet or not sys.stderr.isatty() or not is_alone
        logging = replace(run.logging, quiet=quiet)
        return replace(run, saving=saving, evaluation=evaluation, logging=logging), origins

    def _definition(self, trainer: ConsynTrainer) -> dict[str, Any]:
        """Values that must be equal at every start of the study, by their names in messages."""
        varied = {dimension.name for dimension in self.space}
        run, known = flat(trainer.run), flags(RunConfig)
        own = {
            f"--{name}": list(value) if isinstance(value, tuple) else value
            for name, value in run.items()
            if known[name].math and name not in varied
        }
        for name in (*BATCH_FLAGS, "eval_steps"):
            if name not in varied:
                own[f"--{name}"] = run[name]
        return {
            "--search": " ".join(sorted(dimension.text() for dimension in self.space)),
            "--metric": self.metric,
            **own,
            "the training data": trainer.derived()["data"],
        }

    # -------------------------------------------------------------------------------------- results

    def write_results(self) -> StudyResults:
        """Write the page and the recipe of the best trial.

        Raises:
            UserError: the files cannot be written.
        """
        results = self.results()
        title, importance = f"Study {self.output.resolve().name}", self.study.importance()
        page = study_page(results, title, importance, self.command)
        try:
            write_whole(self.output / PAGE, page.encode("utf-8", "replace"))
            if (best := results.best) is not None:
                run, origins = self.varied.with_values(best.values)
                path = best_directory(self.output, best.number, run)
                saving = replace(run.saving, output=str(path), overwrite=False)
                text = recipe(results, best, replace(run, saving=saving), origins)
                write_whole(self.output / RECIPE, text)
        except OSError as error:
            raise UserError(
                f"--output {self.output} cannot be written: {error.strerror}. Free some space; "
                "the same command continues the study."
            ) from error
        return results

    @property
    def command(self) -> str:
        """The command that trains with the best values."""
        return f"consyn-train --config {shlex.quote(str(self.output / RECIPE))}"

    def _print_header(self) -> None:
        so_far = self.results()
        limit = "no limit" if math.isinf(self.limit) else f"{self.limit:,.0f}"
        if self.limit == self.points < math.inf:
            limit += ", one for each point of the search space"
        rows = [
            ("search", " ".join(dimension.text() for dimension in self.space)),
            ("metric", f"{self.metric}, {'highest' if self.maximize else 'lowest'}"),
            ("method", f"{self.options.sampler} sampler, {self.options.pruner} pruner"),
            ("trials", f"{limit}; {len(so_far.trials)} so far"),
            *self._notes(),
            ("study", f"optuna-dashboard {shlex.quote(self.study.address)}"),
        ]
        with Console(quiet=self.quiet) as console:
            console.header(rows, "consyn-tune")

    def _notes(self) -> list[tuple[str, str]]:
        """Header rows about the flags that need further compilations or that --search replaces."""
        rows, replaced = [], [d.name for d in self.space if ", instead" in self.base[1][d.name]]
        each, others = self.compiled
        compiled = [f"again for each value of {', '.join(each)}"] if each else []
        compiled += [f"once more for {', '.join(others)}"] if others else []
        if compiled:
            rows.append(("compiled", "; ".join(compiled)))
        if replaced:
            rows.append(("replaced", f"by --search in --config: {', '.join(replaced)}"))
        if names := " or ".join(self.tokens_grow_with):
            more = f"more in trials with a larger {names}, since --max_steps counts steps"
            rows.append(("tokens", f"{more}; --total_tokens gives all trials the same number"))
        return rows

    def _note(self, claim: Claim, outcome: str, results: StudyResults) -> None:
        trial = results.trials[claim.number]
        values = ", ".join(f"{name} {as_text(value)}" for name, value in claim.values.items())
        value = "no value" if trial.value is None else f"{self.metric} {decimals(trial.value)}"
        end = "" if outcome == DONE else f", {outcome} at step {trial.step:,} of {trial.steps:,}"
        if outcome == FAILED:
            end = f", failed: {self.study.trials[claim.number].user_attrs[FAILURE]}"
        mark = " (best)" if results.best is trial else ""
        with Console(quiet=self.quiet) as console:
            console.note(f"Trial {claim.number}: {values}: {value}{end}{mark}")

    def _print_end(self, results: StudyResults) -> None:
        for line in table(results):
            show(line)
        running = [trial for trial in results.trials if trial.outcome == "running"]
        lines = []
        if len(results.trials) >= (points := num_points(results.space) or math.inf):
            lines.append(
                f"The search space has {points:,.0f} points, and all have been tried. Widen "
                "--search in another --output to try more."
            )
        if running:
            lines.append(f"Trials running in other processes: {len(running)}.")
        if (best := results.best) is not None and best.value is not None:
            lines += [
                f"Best: trial {best.number}, {self.metric} {decimals(best.value)}. Steps saved by "
                f"ending trials early: {results.saved:.0%}.",
                "Next:",
                f"  {self.command}",
            ]
        names = [PAGE, *([RECIPE] if best is not None else [])]
        names += [f"{TRIALS_DIRECTORY}/"] if (self.output / TRIALS_DIRECTORY).is_dir() else []
        where = f"Everything is in {self.output}: {', '.join(names)}."
        with Console(quiet=self.quiet) as console:
            console.finish([*lines, where])


def _limit(options: StudyOptions) -> float:
    """Maximum number of trials; infinite if the study may try the whole search space."""
    if options.trials is not None:
        return options.trials
    is_limited = options.sampler != "grid" and options.time_budget is None
    return TRIALS if is_limited else math.inf
