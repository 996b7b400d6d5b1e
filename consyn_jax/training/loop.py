"""The training loop, from a new state or a checkpoint to the trained model and its report.

This module determines the order of all side effects of a run.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax

from consyn_jax.config import RunConfig
from consyn_jax.data.loader import prefetch
from consyn_jax.distributed.hardware import bf16_peak
from consyn_jax.distributed.mesh import local_rows, placer
from consyn_jax.distributed.process_group import gather
from consyn_jax.flags import flat
from consyn_jax.model.arithmetic import train_flops_per_token
from consyn_jax.model.parameters import Params
from consyn_jax.training.diagnostics import profile
from consyn_jax.training.diagnostics.divergence import report_divergence, report_skipped_step
from consyn_jax.training.evaluation import compile_evaluation
from consyn_jax.training.logging.stopwatch import Stopwatch
from consyn_jax.training.open_run import Outcome, RunInputs, open_records, open_run, write_beginning
from consyn_jax.training.optim.state import evaluation_params, with_rate_scale
from consyn_jax.training.preference import reference
from consyn_jax.training.program import TRAIN_AXES
from consyn_jax.training.run import after_evaluation, beginning, ending
from consyn_jax.training.run.directory import CHECKPOINTS
from consyn_jax.training.run.export import export_model
from consyn_jax.training.run.step_end import StepEnd, interval, plan_step_end
from consyn_jax.training.runtime.memory import compile_to_fit
from consyn_jax.training.runtime.quiet_gpu import tune_alone
from consyn_jax.training.runtime.watchdog import (
    COMPILING,
    EVALUATING,
    FINISHING,
    SAVING,
    STEPPING,
    WAITING,
)
from consyn_jax.training.step import Batch, Metrics, TrainState


class Training:
    """A training run: the work of one call of `ConsynTrainer.train`.

    Args:
        stack: Stack that closes the resources of the run, however the run ends.
    """

    def __init__(self, inputs: RunInputs, stack: ExitStack) -> None:
        run, self.opened = inputs.run, (opened := open_run(inputs, stack))
        self.inputs, self.program, self.stack = inputs, inputs.program, stack
        self.run_config, self.total_steps = run, inputs.lengths.total_steps
        self.writes = opened.writes
        self.directory, self.path = opened.directory, opened.directory.path
        self.watchdog, self.console = opened.watchdog, opened.console
        self.profile = opened.profile
        for source in (inputs.train_source, inputs.eval_source):
            if source is not None:
                source.warn = self.console.warn
        self.checkpoints, self.coordinator = opened.checkpoints, opened.coordinator
        self.progress = beginning.new_progress(run)
        shardings = self.program.layout.shardings(self.program.mesh)
        self.evaluation_params = jax.jit(evaluation_params, out_shardings=shardings)
        eval_steps = interval(run.evaluation.eval_steps, self.total_steps)
        self.eval_steps = None if inputs.eval_source is None else eval_steps
        self.save_steps = interval(run.saving.save_steps, self.total_steps)
        self.evaluation: Callable[[Params], dict[str, float]] | None = None
        self.state: TrainState | None = None  # the newest one

    def run(self) -> Outcome:
        """Train to the end of the budget, from the newest checkpoint if there is one.

        Raises:
            UserError: Data, devices or the disk do not allow the run.
            Diverged: Loss or gradients were non-finite in too many steps.
            Interrupted: A signal ended the run.
        """
        run = self.inputs.run
        self.resumed = beginning.resume_step(run.saving.resume, self.directory, self.checkpoints)
        is_complete = beginning.is_complete(
            *(self.path, self.resumed, self.total_steps, self.checkpoints),
            *(run.evaluation, self.inputs.train_source.content_is_known, self.console.warn),
        )
        self._print_header(is_complete)
        if is_complete:
            where = f"{self.resumed:,} steps. Its model is in {self.path / 'final'}."
            self.console.finish([f"This run is complete: {where}"])
            return Outcome(beginning.recorded_summary(self.path / "metrics.jsonl"), None, run)
        compiler = ThreadPoolExecutor(1, "compiler")
        self.stack.callback(compiler.shutdown)
        # Compile the train step while the state is created or restored.
        compiling = compiler.submit(compile_to_fit, run, self.inputs.compile_train_step)
        self.tuned_s = tune_alone(compiling, self.path, self.watchdog, self.console.warn)
        state = self._begin()
        # No step is left if an earlier start saved its last checkpoint but did not write the model.
        if not after_evaluation.is_over(self.progress, self.total_steps, run.evaluation):
            state = self._train(state, compiling)
        return self._finish(state)

    def newest_params(self) -> Params | None:
        """The parameters to evaluate after the newest step; None before the first step."""
        if self.state is None or any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state)):
            return None
        return self.evaluation_params(self.state.opt_state, self.state.params)

    # ------------------------------------------------------------------------------------ beginning

    def _print_header(self, is_complete: bool) -> None:
        rows = list(self.inputs.header)
        if self.resumed is not None and not is_complete:
            rows.append(("resumes", f"from step {self.resumed:,} of {self.total_steps:,}"))
        self.console.header(rows)
        for sentence in self.inputs.warnings:
            self.console.warn(sentence)

    def _begin(self) -> TrainState:
        """Create or restore the state, and rewind the run directory to the same step."""
        inputs, like, self.base = self.inputs, self.program.state_like, self.inputs.make_base()
        decay_from = inputs.run.optimizer.decay_from
        if self.resumed is not None:
            state, self.progress = beginning.restore(self.checkpoints, self.resumed, like)
        elif decay_from is not None:
            origin = Path(inputs.run.saving.output) / CHECKPOINTS
            state, self.progress = beginning.branch(origin, decay_from, like, self.progress)
        else:
            gather("begins")  # otherwise Gloo's comparison of a caller's model could time out
            state = self.program.initial_state(inputs.make_parameters(self.program.mesh))
        self.facts = write_beginning(inputs, self.opened, self.progress.step)
        self.progress.run = self.directory.record.run
        parts = self.opened, self.progress, self.resumed, self.facts, self.stack, self.tuned_s
        self.recorder, self.report, lost_lines = open_records(inputs, *parts)
        if self.resumed is not None:
            self.recorder.ended_passes(resumed=True)
        event = "start" if self.resumed is None else "resume"
        self.recorder.event(event, {"run": self.progress.run, **lost_lines})
        self.checkpoints.before_commit = partial(self.opened.before_commit, self.recorder)
        self.report.refresh()
        return state

    # ------------------------------------------------------------------------------------- the loop

    def _train(self, state: TrainState, compiling: Future[tuple[RunConfig, Any]]) -> TrainState:
        """Run the remaining steps."""
        source, mesh = self.inputs.train_source, self.program.mesh
        self.console.start(self.total_steps, self.progress.step)
        self.watchdog.at(COMPILING, self.progress.step)
        self.run_config, train_step = compiling.result()
        self.report.config = flat(self.run_config)
        beginning.report_smaller_batches(self.inputs.run, self.run_config, self.console)
        gather("compiled")  # otherwise collectives could time out while others compile
        gc.freeze()  # otherwise each collection visits a million objects of modules, in 0.2 s
        self.stack.callback(gc.unfreeze)
        params = state.params if self.resumed is None else None
        calls = self.directory.check, self._end_at_a_signal, self.console.note
        reference.make_ready(self.inputs, self.run_config, self.path, params, self.base, *calls)
        budget, length = self.run_config.budget, self.run_config.row_length
        accumulation, batch_size = budget.gradient_accumulation_steps, budget.batch_size
        rows = local_rows(mesh, batch_size)
        batches = source.training(self.progress.step, batch_size, accumulation, rows)
        tokens = self.inputs.lengths.sequences_per_step * length / jax.device_count()
        shape = self.program.config, self.run_config.length, self.run_config.lora
        flops = train_flops_per_token(*shape) * tokens
        kind = jax.local_devices()[0].device_kind
        self.profile.program = profile.CompiledStep(train_step.as_text, flops, kind)
        self.recorder.stopwatch = Stopwatch(flops, bf16_peak(kind))
        like = self.program.batch_like((accumulation, batch_size, length), TRAIN_AXES)
        with prefetch(
            batches,
            transform=placer(mesh, TRAIN_AXES),
            interrupted=self.coordinator.stops_waiting,
        ) as ready:
            try:
                return self._loop(state, train_step, ready, like)
            finally:
                source.close()  # otherwise `prefetch` would join a thread that may wait for data

    def _loop(
        self,
        state: TrainState,
        train_step: Callable[..., Any],
        ready: prefetch[Any],
        like: dict[str, Any],
    ) -> TrainState:
        """Run steps, and read each step's metrics while the device computes the next step."""
        step = self.progress.step
        pending: tuple[Metrics, Batch] | None = None
        self.coordinator.restart_save_clock()
        self.watchdog.at(WAITING, step + 1)
        for batch in profile.trace_waits(self.coordinator.batches(ready, like)):
            step += 1
            self.directory.raise_if_lost()
            self.watchdog.at(STEPPING, step)
            with self.profile.step(step, state):
                state, metrics = train_step(state, batch | self.coordinator.message() | self.base)
            self.state = state
            self.profile.ended(step, metrics)
            if pending is not None:
                self._record(pending, state, ready.wait_s)
            pending = metrics, batch
            due = plan_step_end(
                step, self.total_steps, self.eval_steps, self.save_steps, self.coordinator
            )
            if due.is_due:
                self._record(pending, state, ready.wait_s)
                pending = None
                if self.progress.step < step:  # the last step was idle, and does not count
                    step, due = self.progress.step, StepEnd(stop=True)
                state, is_over = self._end_step(state, due)
                if is_over:
                    return state
            self.watchdog.at(WAITING, step + 1)
        if pending is not None:
            self._record(pending, state, ready.wait_s)
        return self._end_of_data(state)

    def _record(self, pending: tuple[Metrics, Batch], state: TrainState, waited_s: float) -> None:
        """Wait for a step, read its metrics, and record them.

        Args:
            pending: Metrics and batch of the step.
            state: The newest state.
            waited_s: Seconds spent waiting for data so far.
        """
        metrics, batch = pending
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not self.coordinator.read(values):
            return
        self.recorder.count(values)
        limit = self.program.max_nonfinite_steps
        if values["nonfinite"] >= limit:
            self.watchdog.at(FINISHING, self.progress.step)
            told = batch | self.base, state, self.program
            raise report_divergence(self.recorder, values, *told, self.path)
        if values["nonfinite"]:
            report_skipped_step(self.recorder, values, limit)
        self.recorder.step(values, waited_s)
        self.report.tick()

    def _end_step(self, state: TrainState, due: StepEnd) -> tuple[TrainState, bool]:
        """Perform the actions that are due at the end of a step.

        Returns:
            The state, possibly with a lower learning rate, and whether the run is over.
        """
        began, is_early_stop = time.perf_counter(), False
        if due.evaluate:
            self.watchdog.at(EVALUATING, self.progress.step)
            with profile.activity(EVALUATING):
                state = self._evaluate(state)
            is_early_stop = not due.last and after_evaluation.stops_early(
                self.progress, self.inputs.run.evaluation
            )
        is_stopped = not due.last and self.coordinator.ends_now
        if is_stopped:
            after_evaluation.record_stop(self.recorder, self.total_steps)
        ends = is_early_stop or is_stopped
        # A signal may have arrived after `due` was planned.
        saves = due.save or ends or self.coordinator.stop_signal is not None
        if saves:
            with profile.activity(SAVING):
                self._save(state)
        self.report.refresh()
        self.recorder.stopwatch.pause(time.perf_counter() - began)
        if is_early_stop:
            after_evaluation.record_early_stop(self.recorder)
        if saves and not (due.last or ends):
            self._raise_if_stopped()
        return state, due.last or ends

    def _evaluate(self, state: TrainState) -> TrainState:
        """Evaluate, save the best model, and let `--scheduler plateau` lower the learning rate."""
        source = self.inputs.eval_source
        assert source is not None
        if source.sequences == 0:  # known only now if the corpus was still growing
            self.console.warn(
                "There is no evaluation: no document fell into the validation split. Give "
                "--validation or a larger --validation_fraction."
            )
            self.eval_steps = None
            return state
        if self.evaluation is None:  # compiled only now, so that training begins sooner
            budget, length = self.run_config.budget, self.run_config.row_length
            self.watchdog.at(COMPILING, self.progress.step)
            self.evaluation = compile_evaluation(
                self.program, source, budget.batch_size, length, self.watchdog.moved, self.base
            )
            gather("compiled")
            self.watchdog.at(EVALUATING, self.progress.step)
        params = self.evaluation_params(state.opt_state, state.params)
        line = after_evaluation.record_evaluation(
            self.evaluation(params),
            self.inputs.run.evaluation,
            self.recorder,
            partial(self._export, "best", params, self.progress.step),
        )
        self._sample_in_time(params)
        self.recorder.tell_evaluation(line, state)
        if self.progress.plateau is None:
            return state
        scale = self.progress.plateau.scale
        return state._replace(opt_state=with_rate_scale(state.opt_state, scale))

    def _save(self, state: TrainState) -> None:
        self.watchdog.at(SAVING, self.progress.step)
        self.coordinator.restart_save_clock()
        self.directory.check()
        if self.progress.step in self.checkpoints.steps():  # a signal arrived right after saving
            return
        self.checkpoints.save(self.progress.step, state, asdict(self.progress), self.recorder.save)

    def _end_of_data(self, state: TrainState) -> TrainState:
        if self.coordinator.stop_signal is not None:  # a signal ended the wait for a batch
            self.checkpoints.wait()
            self._save(state)
            self._raise_if_stopped()
        self.recorder.event("end_of_data")
        self.console.warn(f"The data ended after {self.progress.step} of {self.total_steps} steps.")
        return state

    def _raise_if_stopped(self) -> None:
        if (signal := self.coordinator.stop_signal) is not None:
            self._interrupt(signal)

    def _end_at_a_signal(self) -> None:
        """Stop if any process has received a signal before the first step."""
        self.watchdog.moved()
        received = next(filter(None, gather(self.coordinator.received or "")), None)
        if received is not None:
            self._interrupt(received)

    def _interrupt(self, signal: str) -> None:
        raise ending.interruption(signal, self.checkpoints, self.recorder, self.inputs.run)

    # --------------------------------------------------------------------------------------- ending

    def _finish(self, state: TrainState) -> Outcome:
        """Export the model and write the report."""
        inputs, recorder, progress = self.inputs, self.recorder, self.progress
        self.watchdog.at(FINISHING, progress.step)
        params, step = self._final_params(state)
        self._export("final", params, step)
        self.watchdog.at(FINISHING, progress.step)
        text = self._sample(params)
        self.checkpoints.wait()
        ending.record_end(self.path, self.report, recorder, draws=inputs.exports_model)
        if self.writes and inputs.exports_model:
            if text:
                self.console.sample(text)
            known = inputs.run, inputs.origins, recorder, inputs.tokenizer
            self.console.finish(ending.closing_lines(self.path, *known))
        return Outcome(recorder.summary(), params, self.run_config)

    def _sample(self, params: Params) -> str:
        """Generate and store a sample text; "" without a tokenizer or if no model is exported."""
        inputs, began = self.inputs, time.perf_counter()
        if inputs.tokenizer is None or not inputs.exports_model:
            return ""
        whole, seed = self.program.whole(params, **self.base), inputs.run.budget.seed
        text = ending.sample(self.program.config, whole, inputs.tokenizer, seed)
        self.report.add_sample(text, time.perf_counter() - began)
        return text

    def _sample_in_time(self, params: Params) -> None:
        """Generate a sample after an evaluation, unless samples take too much of the run's time."""
        if self.progress.step == self.total_steps or self.inputs.tokenizer is None:
            return  # `_finish` generates the last sample
        if beginning.from_first(self.report.time_for_sample):
            self.watchdog.at(EVALUATING, self.progress.step)
            self._sample(params)

    def _final_params(self, state: TrainState) -> tuple[Params, int]:
        """Return the parameters for final/ and their step: the newest, or the best if requested."""
        gather("written")  # process 0 must have written best/
        best = ending.best_model(self.path, self.inputs.run.evaluation, self.recorder)
        if best is not None:
            step = self.progress.selection.best_step or self.progress.step
            return self.inputs.files.load(best, self.program.config, self.program.mesh), step
        return self.evaluation_params(state.opt_state, state.params), self.progress.step

    def _export(self, name: str, params: Params, step: int) -> None:
        if not self.inputs.exports_model:
            return
        self.directory.check()
        self.watchdog.at(SAVING, step)
        config = self.program.config.saved_as(self.inputs.run.saving.save_dtype)
        facts = None if self.facts is None else partial(self.facts.of_model, step)
        parts = self.inputs.tokenizer, self.checkpoints.before_commit, facts, self.inputs.files.save
        export_model(self.path / name, config, params, *parts)
        self.recorder.callbacks.save(self.path / name)
