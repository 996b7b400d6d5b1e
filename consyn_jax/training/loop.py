"""The one loop with side effects: from the beginning, or a checkpoint, to the model and its report."""

from __future__ import annotations

import json
import math
import resource
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from consyn_jax.config import EVALUATION_METRICS, Diverged, Interrupted, RunConfig, UserError, flat
from consyn_jax.data.loader import prefetch
from consyn_jax.data.mixture import Mixture
from consyn_jax.distributed.hardware import bf16_peak
from consyn_jax.distributed.launch import refuse_differences
from consyn_jax.distributed.mesh import local_rows, placer
from consyn_jax.distributed.peers import current_peers
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model.arithmetic import train_flops_per_token
from consyn_jax.model.parameters import Params
from consyn_jax.model.pretrained import load_parameters
from consyn_jax.training import profile
from consyn_jax.training.checkpoint import Checkpoints
from consyn_jax.training.console import Console
from consyn_jax.training.export import export_model
from consyn_jax.training.header import header, warnings
from consyn_jax.training.memory import fitting
from consyn_jax.training.metrics import MetricsLog, read_metrics
from consyn_jax.training.optimizer import evaluation_params, with_rate_scale
from consyn_jax.training.program import TRAIN_AXES
from consyn_jax.training.progress import Progress, Stopwatch
from consyn_jax.training.replay import BUNDLES, Incident, leave_bundle, sample_names
from consyn_jax.training.report import write_loss_plot, write_report
from consyn_jax.training.run_directory import CHECKPOINTS, CONFIG, RunDirectory, in_words, open_run_directory
from consyn_jax.training.scheduler import configured_plateau
from consyn_jax.training.signals import Agreement, Signals
from consyn_jax.training.step import Batch, Metrics, TrainState
from consyn_jax.training.trackers import Trackers, build_trackers
from consyn_jax.training.watchdog import COMPILING, EVALUATING, FINISHING, SAVING, STEPPING, WAITING, Watchdog
from consyn_jax.validation import natural, parse_profile_steps

if TYPE_CHECKING:
    from consyn_jax.training.trainer import ConsynTrainer

SAMPLE_TOKENS = 200


class Training:
    """One call of `train`: what is open while it runs."""

    def __init__(self, trainer: ConsynTrainer, stack: ExitStack) -> None:
        self.trainer = trainer
        self.built, self.schedule = trainer.build(), jax.jit(trainer.schedule)
        self.program = self.built.program
        self.writes = jax.process_index() == 0
        saving, logging = trainer.run.saving, trainer.run.logging
        self.peers = current_peers()
        if self.peers is not None:  # this waits for the slowest to prepare its data
            refuse_differences([json.loads(text) for text in self.peers.gather(json.dumps(in_words(trainer.derived())))])
        self.directory: RunDirectory = open_run_directory(trainer.run, trainer.derived(), write=self.writes)
        stack.callback(self.directory.close)
        minutes = trainer.run.hardware.watchdog_minutes
        self.watchdog = stack.enter_context(Watchdog(self.directory.path, minutes, self.peers, self.directory.beat))
        self.console = stack.enter_context(Console(quiet=logging.quiet or not self.writes, logging_steps=logging.logging_steps))
        steps = parse_profile_steps(logging.profile_steps) if self.writes else None
        self.profile = profile.Profile(steps, self.directory.path / "profile", self.console.note, self.console.warn)
        stack.callback(self.profile.close)
        self.checkpoints = Checkpoints(self.directory.checkpoints, saving.keep_last, saving.keep_every, self.console.warn)
        stack.callback(self.checkpoints.close)
        self.progress = Progress(plateau=configured_plateau(trainer.run.optimizer, EVALUATION_METRICS[trainer.run.evaluation.metric_for_best_model]))
        self.evaluated = jax.jit(evaluation_params, out_shardings=self.program.layout.shardings(self.program.mesh))
        self.evaluates = trainer.eval_source is not None
        self.evaluation: Callable[[Params], dict[str, float]] | None = None
        self.watch = Stopwatch()
        self.agreement = Agreement(stack.enter_context(Signals()), self.program.mesh, saving.save_minutes)
        self.stack = stack
        self.last: dict[str, float] = {}
        self.warned_of_nothing = False

    def run(self) -> dict[str, float]:
        t = self.trainer
        self._header()
        if self._is_complete():
            return self._already_complete()
        compiler = ThreadPoolExecutor(1, "compiler")
        self.stack.callback(compiler.shutdown)
        compiling = compiler.submit(fitting, t.run, t.compile_train_step)  # while the state is made or read
        state = self._begin()
        if self.progress.step < t.total_steps and not self._stops_early(self.progress):  # else it was ended between its last checkpoint and its model
            state = self._train(state, compiling)
        return self._finish(state)

    def _train(self, state: TrainState, compiling: Future[tuple[RunConfig, Any]]) -> TrainState:
        t, length = self.trainer, self.trainer.run.length
        self.console.start(t.total_steps, self.progress.step)
        self.watchdog.at(COMPILING, self.progress.step)
        asked = t.run.budget.batch_size
        t.run, train_step = compiling.result()
        if t.run.budget.batch_size != asked:
            parts = f"{t.run.budget.gradient_accumulation_steps} micro-batches of {t.run.budget.batch_size}"
            self.console.note(f"Micro-batches of {asked} do not fit the devices, so each step takes {parts} sequences; the result is the same.")
        self._meet()
        rows = local_rows(self.program.mesh, t.run.budget.batch_size)
        batches = t.train_source.training(self.progress.step, t.run.budget.batch_size, t.run.budget.gradient_accumulation_steps, rows)
        flops = train_flops_per_token(t.model.config, length) * t.sequences_per_step * length / jax.device_count()
        self.profile.program = profile.Program(train_step.as_text, flops, bf16_peak(jax.local_devices()[0].device_kind))
        like = self.program.batch_like((t.run.budget.gradient_accumulation_steps, t.run.budget.batch_size, length), TRAIN_AXES)
        with prefetch(batches, transform=placer(self.program.mesh, TRAIN_AXES), interrupted=self.agreement.waits_in_vain) as ready:
            try:
                return self._loop(state, train_step, ready, like)
            finally:  # before the thread is waited for, which may itself be waiting for data
                t.train_source.close()

    def _loop(self, state: TrainState, train_step: Callable[..., Any], ready: prefetch[Any], like: dict[str, Any]) -> TrainState:
        t, done = self.trainer, self.progress.step
        eval_every, save_every = t.every(t.run.evaluation.eval_steps), t.every(t.run.saving.save_steps)
        pending: tuple[Metrics, Batch] | None = None
        self.watch = Stopwatch()
        self.agreement.saved()
        self.watchdog.at(WAITING, done + 1)
        for batch in profile.waiting_for(self.agreement.batches(ready, like)):
            self.watchdog.at(STEPPING, done + 1)
            with self.profile.step(done + 1, state):
                state, metrics = train_step(state, batch | self.agreement.said())
            done += 1
            self.profile.ended(done, metrics)
            if pending is not None:
                self._record(pending, state, ready.wait_s)
            pending = metrics, batch
            evaluates = self.evaluates and (done % eval_every == 0 or done == t.total_steps)
            saves = done % save_every == 0 or done == t.total_steps or self.agreement.saves
            stops = False
            if evaluates or saves or self.agreement.stop:
                self._record(pending, state, ready.wait_s)
                pending = None
                began = time.perf_counter()
                if self.progress.step < done:  # an idle step: some process ends, and has no data
                    done, evaluates, saves = self.progress.step, False, False
                if evaluates:
                    self.watchdog.at(EVALUATING, done)
                    with profile.doing(profile.EVALUATING):
                        state = self._evaluate(state)
                    stops = self._stops_early(self.progress) and done < t.total_steps
                if saves or stops or self.agreement.stop:
                    with profile.doing(profile.SAVING):
                        self._save(state)
                self.watch.pause(time.perf_counter() - began)
            if stops:
                selection = self.progress.selection
                self._event("early_stop", {"best_step": selection.best_step, "stale": selection.stale})
                self.console.note(f"Early stop at step {done:,}: {selection.stale} evaluations without improvement since step {selection.best_step:,}.")
            if done == t.total_steps or stops:
                return state
            if self.agreement.stop:
                self._interrupted()
            self.watchdog.at(WAITING, done + 1)
        if pending is not None:
            self._record(pending, state, ready.wait_s)
        if self.agreement.stop:  # while the next batch was waited for
            self.checkpoints.wait()
            self._save(state)
            self._interrupted()
        self._event("end_of_data")
        self.console.warn(f"The data ended after {done} of {t.total_steps} steps.")
        return state

    def _meet(self) -> None:
        """All processes have compiled: collectives wait for a latecomer for a short time only."""
        if self.peers is not None:
            self.peers.gather("compiled")

    # ---------------------------------------------------------------------------------------------------------------- beginning

    def _header(self) -> None:
        t, step = self.trainer, self._resume_step()
        goes_on = [] if step is None or self._is_complete() else [("goes on", f"from step {step:,} of {t.total_steps:,}")]
        self.console.header([*header(t, self.built), *goes_on])
        for sentence in warnings(t, self.built):
            self.console.warn(sentence)

    def _is_complete(self) -> bool:
        """The last step is saved, and the model was exported behind it."""
        step = self._resume_step()
        if step is None or not (self.directory.path / "final" / "config.json").is_file():
            return False
        return step >= self.trainer.total_steps or self._stops_early(Progress.from_json(self.checkpoints.record(step)))

    def _stops_early(self, progress: Progress) -> bool:
        options = self.trainer.run.evaluation
        return progress.selection.is_over(options.early_stopping_patience, progress.step, options.early_stopping_min_steps)

    def _resume_step(self) -> int | None:
        """The step of the checkpoint to go on from, the newest that is whole; None for a new run."""
        step = natural(self.trainer.run.saving.resume)
        if step is not None:
            return step
        return self.checkpoints.newest() if self.directory.holds_run else None

    def _already_complete(self) -> dict[str, float]:
        """Say so, and touch nothing."""
        t, final = self.trainer, self.directory.path / "final"
        self.console.finish([f"This run is complete: {t.total_steps:,} steps. Its model is in {final}."])
        if isinstance(t.model, ConsynLMHeadModel):
            t.model = ConsynLMHeadModel.from_pretrained(str(final))
        lines = read_metrics(self.directory.path / "metrics.jsonl")
        return {**_last_values(self.directory.path / "metrics.jsonl"), "step": lines[-1]["step"], "tokens": lines[-1]["tokens"]}

    def _begin(self) -> TrainState:
        """The state to start from: restored, or new."""
        t, path, wanted = self.trainer, self.directory.path, self._resume_step()
        if wanted is not None:
            state, record = self.checkpoints.restore(wanted, self.program.state_like)
            self.progress = Progress.from_json(record)
            self.checkpoints.delete_after(wanted)
        elif t.run.optimizer.decay_from is not None:
            state = self._branch(Path(t.run.saving.output) / CHECKPOINTS, t.run.optimizer.decay_from)
        else:
            state = self.program.initial_state(t.parameters(self.program.mesh))
        if self.writes:
            self.directory.write_config(t.run, t.origins, t.derived())
            if t.tokenizer is not None:
                try:
                    t.tokenizer.save(path / "tokenizer")
                except OSError as error:
                    raise UserError(f"{path / 'tokenizer'} cannot be written: {error.strerror}. Make room, or name another --output.") from error
        self.log = self.stack.enter_context(MetricsLog(path)) if self.writes else None
        if self.log is not None:
            start = -1 if wanted is None else wanted
            if any(line.get("event") == "best" and line["step"] > start for line in read_metrics(self.log.path)):
                shutil.rmtree(path / "best", ignore_errors=True)  # of a step that is taken back
            self.log.truncate_from(start)
            self.last = _last_values(self.log.path)
        self._check_best()
        self.trackers: Trackers | None = None
        if self.writes:
            logging = t.run.logging
            self.trackers = build_trackers(
                logging.logging_backend,
                directory=path,
                project=logging.wandb_project,
                run_name=logging.wandb_run_name,
                config=flat(t.run),
                # -1: curves of a run that was stopped before its first checkpoint are forgotten
                resume_step=wanted if wanted is not None else -1 if (path / "logs").exists() else None,
                run_id=self.progress.tracker_id,
                warn=self.console.warn,
            )
            self.stack.callback(self.trackers.close)
            self.progress.tracker_id = self.trackers.run_id
        if wanted is not None:
            self._ended_passes(wanted, again=True)
        self._event("start" if wanted is None else "resume")
        return state

    def _check_best(self) -> None:
        """Where the best model so far is gone, the next evaluation is the best."""
        there = str((self.directory.path / "best" / "config.json").is_file())
        if self.peers is not None:
            there = self.peers.gather(there)[0]
        if there != "True":
            self.progress.selection = replace(self.progress.selection, best_value=None, best_step=None)

    def _branch(self, checkpoints: Path, step: int) -> TrainState:
        """The state of another run at `step`, which may still be going on: it is only read. What has been best there does not count here."""
        with closing(Checkpoints(checkpoints)) as others:
            state, record = others.restore(step, self.program.state_like)
        there = Progress.from_json(record)
        self.progress = replace(self.progress, step=step, tokens=there.tokens, left_out=there.left_out)
        return state

    # ---------------------------------------------------------------------------------------------------------- at a step's end

    def _record(self, step: tuple[Metrics, Batch], state: TrainState, waited_s: float) -> None:
        """Read a step's metrics (this waits for the step), check them, and log them when it is time.

        Args:
            step: its metrics and its batch.
            state: the newest.
        """
        t, progress, (metrics, batch) = self.trainer, self.progress, step
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not self.agreement.counts(values):
            return
        progress.step += 1
        progress.tokens += int(values["tokens"])
        self.watch.steps += 1
        self.watch.tokens += int(values["tokens"])
        self._ended_passes(progress.step)
        if not values["tokens"] and not self.warned_of_nothing:
            self.warned_of_nothing = True
            self.console.warn(f"Step {progress.step:,} had no token to learn from. Prompts may be longer than --max_tokens.")
        progress.clipped, progress.unlogged = progress.clipped + int(values["clipped"]), progress.unlogged + 1
        self._check_finite(values, batch, state)
        self._look_for_spike(values)
        if progress.step % t.run.logging.logging_steps and progress.step not in (1, t.total_steps):
            self.console.step(progress.step, values["loss"], self.watch.tokens_per_s)
            return
        clipped, progress.clipped, progress.unlogged = progress.clipped / progress.unlogged, 0, 0
        step_time_s, tokens_per_s, waiting = self.watch.lap(waited_s)
        line = {
            "train/loss": values["loss"],
            "train/grad_norm": values["grad_norm"],
            "train/learning_rate": self._rate(values),
            "train/clipped_fraction": clipped,
            "throughput/tokens_per_s": tokens_per_s,
            "throughput/step_time_s": step_time_s,
            "throughput/data_wait_fraction": waiting,
        }
        if "skipped" in values:
            line |= {"train/loss_scale": values["loss_scale"], "train/skipped_steps": values["skipped_steps"]}
        line = {name: value for name, value in line.items() if math.isfinite(value)}
        if t.train_source.sequences:
            line["train/epoch"] = progress.step * t.sequences_per_step / t.train_source.sequences
        program = self.profile.program
        if program is not None and program.peak is not None:  # of all positions: the device computes those that are not learned, too
            line["throughput/mfu"] = program.flops / (step_time_s * program.peak)
        line["memory/peak_bytes"] = _peak_bytes(jax.local_devices()[0])
        self.console.step(progress.step, values["loss"], tokens_per_s)
        self._log(line)

    def _rate(self, values: dict[str, float]) -> float:
        """The learning rate of the step just recorded. Steps that changed nothing do not count for the schedule."""
        skipped = int(values.get("skipped_steps", 0.0) - values.get("skipped", 0.0))
        taken = self.progress.step - 1 - skipped - self.progress.left_out + (values["nonfinite"] > 0)
        return float(self.schedule(taken)) * (1.0 if self.progress.plateau is None else self.progress.plateau.scale)

    def _check_finite(self, values: dict[str, float], batch: Batch, state: TrainState) -> None:
        """Tell of a step that was not finite. What becomes of its update, the device has decided (training/guard.py)."""
        step, in_a_row, limit = self.progress.step, int(values["nonfinite"]), self.program.max_nonfinite_steps
        if not in_a_row:
            return
        details = {"loss": values["loss"], "grad_norm": values["grad_norm"], "in_a_row": in_a_row}
        happened = f"Step {step:,}: loss {values['loss']:g}, gradient norm {values['grad_norm']:g}"
        if in_a_row < limit:
            self.progress.left_out += 1
            self._event("nonfinite", {"action": "skip", **details})
            self.console.warn(f"{happened}; its update is left out ({in_a_row} in a row, and {limit} end the run).")
            return
        self.watchdog.at(FINISHING, step)
        try:
            self._event("nonfinite", {"action": "halt", **details, "bundle": f"{BUNDLES}/{step}"})
        except UserError as refused:  # a full disk must not hide what has happened
            self.console.warn(str(refused))
        A, B, _ = batch["labels"].shape
        incident = Incident(step, values, self.trainer.total_steps, sample_names(self.trainer.train_source.order, step, A, B))
        path = self.directory.path
        said = leave_bundle(path / BUNDLES / str(step), self.program, state, batch, incident, path / CONFIG, self.console.warn)
        skip = ", or leave such steps out with --on_nonfinite skip" if limit == 1 else ""
        raise Diverged(f"{happened}; training has diverged. Lower --lr, lengthen --warmup_steps{skip}. {said}")

    def _look_for_spike(self, values: dict[str, float]) -> None:
        if not values["tokens"] or not math.isfinite(values["loss"]):
            return
        usual = self.progress.recent.update(values["loss"])
        if usual is not None:
            self._event("loss_spike", {"loss": values["loss"], "usual": usual})
            self.console.note(f"Step {self.progress.step:,}: the loss is {values['loss']:.4f}, where {usual:.4f} is usual.")

    def _log(self, values: dict[str, float]) -> None:
        self.last |= values
        if self.log is not None and self.trackers is not None:
            self.log.write(self.progress.step, self.progress.tokens, values)
            self.trackers.log(self.progress.step, {**values, "tokens": self.progress.tokens})

    def _event(self, event: str, details: dict[str, Any] | None = None) -> None:
        if self.log is not None:
            self.log.write(self.progress.step, self.progress.tokens, details, event=event)

    def _ended_passes(self, step: int, again: bool = False) -> None:
        """An event for every pass over a source that ended within `step`, and a line on the screen for the last of each.

        Args:
            again: `step` is that of a checkpoint. The log behind it was cut off, these events with it, and they have been told.
        """
        order, size = self.trainer.train_source.order, self.trainer.sequences_per_step
        if order is None or step == 0:
            return
        before, after = order.passes((step - 1) * size), order.passes(step * size)
        for name, passes in after.items():
            for epoch in range(before[name] + 1, passes + 1):
                self._event("end_of_data", {"epoch": epoch, "source": name} if name else {"epoch": epoch})
            if passes > before[name] and not again:
                self.console.note(f"{f'End of {name}: epoch' if name else 'Epoch'} {passes} is over at step {step:,}.")

    def _taken(self) -> dict[str, Any]:
        """For events: the sequences taken from each source of a mixture so far; nothing where there is one source."""
        order = self.trainer.train_source.order
        return {"sources": order.counts(self.progress.step * self.trainer.sequences_per_step)} if isinstance(order, Mixture) else {}

    def _evaluate(self, state: TrainState) -> TrainState:
        """Evaluate, and act on it; gives the state back, which a plateau changes."""
        t, progress, options = self.trainer, self.progress, self.trainer.run.evaluation
        assert t.eval_source is not None
        if t.eval_source.sequences == 0:  # of a growing corpus it is known only now
            self.console.warn("There is no evaluation: no document fell into the validation split. Give --validation or a larger --validation_fraction.")
            self.evaluates = False
            return state
        if self.evaluation is None:  # compiled only now, so that training has begun sooner
            self.watchdog.at(COMPILING, progress.step)
            self.evaluation = t.evaluation(self.program, self.watchdog.moved)
            self._meet()
            self.watchdog.at(EVALUATING, progress.step)
        params = self.evaluated(state.opt_state, state.params)
        values = self.evaluation(params)
        metric = options.metric_for_best_model
        if metric not in values:
            raise UserError(f"--metric_for_best_model {metric} is not logged here: nobody has counted the bytes of this text. Take eval/loss.")
        self._log(values)
        best = progress.selection.update(metric, values[metric], progress.step, options.early_stopping_min_delta)
        self.console.evaluation(values, best)
        if best:
            self._event("best", {metric: values[metric]})  # first: a run that goes on from before it knows by the event what to delete
            export_model(self.directory.path / "best", t.model.config, params, t.tokenizer)
        if progress.plateau is None:
            return state
        before = progress.plateau.scale
        if progress.plateau.update(values[metric]) != before:
            self.console.note(f"Plateau at step {progress.step:,}: the learning rate is {progress.plateau.scale:g} of the schedule's from here.")
        return state._replace(opt_state=with_rate_scale(state.opt_state, progress.plateau.scale))

    def _save(self, state: TrainState) -> None:
        self.watchdog.at(SAVING, self.progress.step)
        self.agreement.saved()
        if self.progress.step in self.checkpoints.steps():  # a signal came behind it, and there was no step since
            return
        if self.checkpoints.save(self.progress.step, state, asdict(self.progress)):
            self._event("save", self._taken())

    def _interrupted(self) -> None:
        self.checkpoints.wait()
        self._event("signal", {"signal": self.agreement.stop, **self._taken()})
        happened, steps = f"{self.agreement.stop} at step {self.progress.step}", self.checkpoints.steps()
        if self.progress.step not in steps:
            raise Interrupted(f"{happened}: the state could not be saved. The same command goes on from {f'step {steps[-1]}' if steps else 'the beginning'}.")
        raise Interrupted(f"{happened}: the state is saved in {self.directory.path}. Run the same command again to go on.")

    # ------------------------------------------------------------------------------------------------------------------- ending

    def _finish(self, state: TrainState) -> dict[str, float]:
        t, path, progress = self.trainer, self.directory.path, self.progress
        self.watchdog.at(FINISHING, progress.step)
        params = self._final_params(state)
        export_model(path / "final", t.model.config, params, t.tokenizer)
        t.model = ConsynLMHeadModel.from_parameters(t.model.config, params)
        text = self._sample(t.model)
        self.checkpoints.wait()
        selection = progress.selection
        self._event("finish", ({"best_step": selection.best_step} if selection.best_step else {}) | self._taken())
        if self.writes and self.log is not None:
            metrics = read_metrics(self.log.path)
            try:
                write_loss_plot(metrics, path / "loss.png")
                write_report(path, metrics, flat(t.run), [(progress.step, text)] if text else [], self._summary(), t.origins)
            except Exception as error:  # noqa: BLE001 - drawn from what is whole by now; no picture is worth an exit code
                reason = (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"
                self.console.warn(f"The report could not be written ({reason}); the model and metrics.jsonl are whole.")
        lines = [f"{progress.step:,} steps, {progress.tokens:,} tokens: loss {self.last.get('train/loss', math.nan):.4f}"]
        if selection.best_value is not None:
            name = t.run.evaluation.metric_for_best_model.replace("/", " ")
            lines.append(f"best {name} {selection.best_value:.4f} at step {selection.best_step:,}: {path / 'best'}")
        lines.append(f"Everything is in {path}: final/ (the model), report.html, loss.png, metrics.jsonl.")
        if self.writes:
            if text:
                self.console.sample(text)
            self.console.finish(lines)
        return self._summary()

    def _final_params(self, state: TrainState) -> Params:
        """What final/ holds: the last parameters, or the best where that was asked for."""
        best = self.directory.path / "best"
        if self.peers is not None:
            self.peers.gather("written")  # by process 0
        if self.trainer.run.evaluation.load_best_model_at_end and (best / "config.json").is_file():
            return load_parameters(best, self.trainer.model.config, self.program.mesh)
        return self.evaluated(state.opt_state, state.params)

    def _summary(self) -> dict[str, float]:
        return {**self.last, "step": self.progress.step, "tokens": self.progress.tokens}

    def _sample(self, model: ConsynLMHeadModel) -> str:
        """What the model writes from the beginning of a document on; nothing where there is no tokenizer."""
        t = self.trainer
        if t.tokenizer is None:
            return ""
        prompt, new = jnp.array([[t.tokenizer.bos_token_id]], jnp.int32), min(SAMPLE_TOKENS, model.config.context - 1)
        ids = model.generate(prompt, new, temperature=0.8, top_k=50, seed=t.run.budget.seed)
        text = t.tokenizer.decode([int(i) for i in np.asarray(ids)[0]])
        if self.trackers is not None:
            self.trackers.sample(self.progress.step, text)
        return text


def _last_values(metrics: Path) -> dict[str, float]:
    """The newest value of every metric in a `metrics.jsonl`."""
    last: dict[str, float] = {}
    for line in read_metrics(metrics):
        if "event" not in line:
            last |= {name: value for name, value in line.items() if "/" in name}
    return last


def _peak_bytes(device: jax.Device) -> int:
    """The most memory in use so far: the device's, or the process's where the device does not count."""
    memory = device.memory_stats() or {}
    return int(memory.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))

