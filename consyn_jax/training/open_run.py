"""The inputs of a run, the resources that are open while it runs, and its result."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from consyn_jax.config import RunConfig
from consyn_jax.distributed.launch import refuse_differences
from consyn_jax.distributed.process_group import current_process_group, gather
from consyn_jax.errors import Interrupted, settled
from consyn_jax.flags import flat
from consyn_jax.model.parameters import Params
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training.checkpointing.manager import Checkpoints
from consyn_jax.training.checkpointing.run_state import Progress
from consyn_jax.training.diagnostics.histograms import histogram_maker
from consyn_jax.training.diagnostics.profile import Profile
from consyn_jax.training.inputs.batch_source import BatchSource
from consyn_jax.training.logging.advice import RunSettings
from consyn_jax.training.logging.clock_watch import ClockWatch, gpus_in_use
from consyn_jax.training.logging.console import Console
from consyn_jax.training.logging.live.activities import ActivityClock
from consyn_jax.training.logging.live.history import History, earlier_activities
from consyn_jax.training.logging.live.page_header import command_rows, now
from consyn_jax.training.logging.metrics import MetricsLog, ending, read_metrics
from consyn_jax.training.logging.tracking.callbacks import Callbacks, Maker, RunView
from consyn_jax.training.mirror.remote_run import NO_REMOTE, open_remote
from consyn_jax.training.mirror.run_mirror import RunMirror
from consyn_jax.training.optim.schedules import warmup_length
from consyn_jax.training.program import Program
from consyn_jax.training.provenance.beginning_facts import begin_facts
from consyn_jax.training.provenance.run_facts import RunFacts
from consyn_jax.training.run import beginning
from consyn_jax.training.run.beginning import newest_values
from consyn_jax.training.run.directory import RunDirectory, run_path, same_command
from consyn_jax.training.run.identity import describe_derived
from consyn_jax.training.run.live_report import LiveReport
from consyn_jax.training.run.model_files import ModelFiles
from consyn_jax.training.run.opening import open_run_directory
from consyn_jax.training.run.recording import Lengths, Recorder
from consyn_jax.training.run.step_end import interval
from consyn_jax.training.runtime.kernel_choices import keep_kernels
from consyn_jax.training.runtime.signals import Signals, StopCoordinator
from consyn_jax.training.runtime.watchdog import COMPILING, STEPPING, WAITING, Watchdog
from consyn_jax.validation import parse_profile_steps


@dataclass(frozen=True)
class RunInputs:
    """All inputs of a run.

    Attributes:
        origins: Origin of each value of `run`, such as a flag or a default.
        derived: Values that follow from flags and data, by their names in config.yaml.
        header: Rows to print before the run begins.
        warnings: Warnings to print before the run begins.
        make_parameters: Function that makes the trainable parameters, placed on a mesh. The
            training state then owns them.
        make_base: Function that returns the frozen weights of an adapter run, as further entries of
            every batch; an empty dict for other runs.
        files: Format in which best/ and final/ are written and read.
        compile_train_step: Function that compiles the train step of `run`, or of the same run in
            smaller micro-batches.
        callbacks: Functions that make the user's callbacks.
        signals: Record of received signals, if the process already keeps one; otherwise None.
        exports_model: Whether the run writes best/, final/ and loss.png, and generates samples.
        is_trial: Whether the run is a trial of a study, which then owns the run directory.
        began: `time.perf_counter()` when this start began, before it prepared data and model. The
            run's time counts from then.
    """

    run: RunConfig
    origins: dict[str, str]
    derived: dict[str, Any]
    lengths: Lengths
    program: Program
    tokenizer: BPETokenizer | None
    train_source: BatchSource
    eval_source: BatchSource | None
    header: list[tuple[str, str]]
    warnings: list[str]
    make_parameters: Callable[[Mesh], Params]
    make_base: Callable[[], dict[str, Any]]
    files: ModelFiles
    compile_train_step: Callable[[RunConfig], Any]
    callbacks: tuple[Maker, ...] = ()
    signals: Signals | None = None
    exports_model: bool = True
    is_trial: bool = False
    began: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        metrics: Newest value of every metric, with `step` and `tokens`.
        params: Trained parameters; None if the run was already complete.
        run: Configuration of the run, with micro-batches that fit the devices.
    """

    metrics: dict[str, float | int]
    params: Params | None
    run: RunConfig


@dataclass(frozen=True)
class OpenRun:
    """The open resources of a run.

    Attributes:
        writes: Whether this process writes to the run directory.
    """

    writes: bool
    directory: RunDirectory
    watchdog: Watchdog
    console: Console
    profile: Profile
    checkpoints: Checkpoints
    coordinator: StopCoordinator

    def before_commit(self, recorder: Recorder) -> None:
        """Flush the log and save the kernel choices, before a checkpoint or model is committed."""
        self.directory.check()
        recorder.flush()
        if self.writes:
            keep_kernels(self.directory.path)


def write_beginning(inputs: RunInputs, opened: OpenRun, step: int) -> RunFacts | None:
    """Write the files that must exist before the first step, if this process writes.

    Args:
        step: Step from which the run starts or resumes.

    Returns:
        Provenance facts for the run's models; None in processes that do not write.

    Raises:
        UserError: A file cannot be written.
    """
    if not opened.writes:
        return None
    directory, mesh = opened.directory, inputs.program.mesh
    directory.write_config(inputs.run, inputs.origins, inputs.derived)
    if inputs.tokenizer is not None:
        directory.write_tokenizer(inputs.tokenizer)
    facts = begin_facts(
        directory,
        inputs.run,
        inputs.derived,
        inputs.train_source.order,
        dict(mesh.shape),
        list(mesh.devices.flat),
        step,
    )
    directory.write_provenance(facts.text())
    opened.checkpoints.provenance = facts.of_checkpoint
    return facts


def open_records(
    inputs: RunInputs,
    opened: OpenRun,
    progress: Progress,
    resumed: int | None,
    facts: RunFacts | None,
    stack: ExitStack,
    tuned_s: float = 0.0,
) -> tuple[Recorder, LiveReport, dict[str, int]]:
    """Open the log, the callbacks and the page of the run, and rewind them to the step `resumed`.

    Args:
        facts: Provenance facts of the run; None in processes that do not write.
        stack: Stack that closes the resources and writes the final page, however the run ends.
        tuned_s: Seconds for which the run has waited for its compiler.

    Returns:
        The recorder, the page, and details of lost log lines for the event `resume`.
    """
    run, path, warn = inputs.run, opened.directory.path, opened.console.warn
    log, lines, lost_lines = None, list[dict[str, Any]](), dict[str, int]()
    activities = ActivityClock()
    if opened.writes:
        log = MetricsLog(path, opened.directory.check_for_line, warn, inputs.began)
        stack.enter_context(log)
        step = -1 if resumed is None else resumed
        lost_lines = beginning.rewind(log, opened.directory, step, warn)
        lines = read_metrics(log.path)
        activities.begin(_until_now(log, lines, tuned_s))
    if inputs.exports_model:
        beginning.forget_missing_best(progress, path)
    callbacks = _open_callbacks(inputs, opened, progress, resumed)
    opened.watchdog.entered = partial(_enter, activities, opened.console)
    parts = (progress, inputs.lengths, opened.console, log, callbacks, newest_values(lines))
    settings = inputs.program.learning_rate, _advised(inputs)
    recorder = Recorder(*parts, *settings, activities=activities)
    _measure(recorder, inputs, opened)
    recorder.history = History(lines)
    command = command_rows(flat(run), inputs.origins)
    start = "started" if resumed is None else "resumed"
    made_with = [] if facts is None else facts.made_with()
    about = [*inputs.header, *made_with, *command, (start, now())]
    told = flat(run), inputs.origins, about, opened.console.left_s
    report = LiveReport(opened.directory, recorder, *told)
    callbacks.run.samples = report.samples
    stack.callback(lambda: callbacks.end(ending(recorder.history.events)))
    stack.callback(report.close)
    return recorder, report, lost_lines


def _until_now(log: MetricsLog, lines: list[dict[str, Any]], tuned_s: float) -> dict[str, float]:
    """Seconds of each activity until now.

    The log's clock includes the preparation of data and model, which counts as "other".
    """
    earlier = earlier_activities(lines)
    new = {"compiling": tuned_s, "other": log.time_s - sum(earlier.values()) - tuned_s}
    return earlier | {name: earlier.get(name, 0.0) + new[name] for name in new}


def _open_callbacks(
    inputs: RunInputs, opened: OpenRun, progress: Progress, resumed: int | None
) -> Callbacks:
    """Start trackers and callbacks, only in the process that writes to the run directory."""
    if not opened.writes:
        return Callbacks()
    run = inputs.run
    view = RunView(
        opened.directory.path,
        opened.directory.record.run,
        flat(run),
        inputs.lengths.total_steps,
        resumed,
        place=lambda: (progress.step, progress.tokens),
        ask_to_stop=opened.coordinator.ask_to_end,
    )
    told = progress, opened.console.warn, opened.checkpoints
    return beginning.open_callbacks(run.logging, view, inputs.callbacks, *told)


def _advised(inputs: RunInputs) -> RunSettings:
    """Collect the settings that are needed to give advice during the run."""
    run, total_steps = inputs.run, inputs.lengths.total_steps
    optimizer, budget = run.optimizer, run.budget
    return RunSettings(
        total_steps=total_steps,
        warmup_steps=warmup_length(total_steps, optimizer.warmup_steps, optimizer.warmup_ratio),
        learning_rate=optimizer.lr or 0.0,
        max_grad_norm=optimizer.max_grad_norm or None,
        batch_size=budget.batch_size,
        gradient_accumulation_steps=budget.gradient_accumulation_steps,
        gradient_checkpointing=run.hardware.gradient_checkpointing,
        eval_steps=interval(run.evaluation.eval_steps, total_steps),
        save_steps=interval(run.saving.save_steps, total_steps),
    )


def _measure(recorder: Recorder, inputs: RunInputs, opened: OpenRun) -> None:
    """Give the recorder access to checkpoint writes, GPU clocks and, if requested, histograms."""
    checkpoints = opened.checkpoints
    recorder.writes = lambda: [(each.num_bytes, each.seconds) for each in checkpoints.written]
    recorder.clocks = ClockWatch(gpus_in_use())
    if inputs.run.logging.histograms:
        recorder.histograms = histogram_maker(inputs.program)
        if inputs.eval_source is None:
            opened.console.warn("--histograms has no effect, because there is no evaluation.")


def _enter(activities: ActivityClock, console: Console, phase: str) -> None:
    """Enter a phase of the run: start to count its time, and display its name."""
    activities.enter(phase)
    console.enter("" if phase in (STEPPING, WAITING) else phase, is_told=phase == COMPILING)


@contextmanager
def run_resources(run: RunConfig) -> Iterator[ExitStack]:
    """Yield a stack for the resources of a run, and close them at the end of the `with` block.

    Args:
        run: Configuration of the run, for messages.

    Raises:
        Interrupted: A signal came after the end of the run, while resources were closed.
    """
    is_complete = False
    try:
        with ExitStack() as stack:
            yield stack
            is_complete = True
    except KeyboardInterrupt as stopped:
        if not is_complete:
            raise
        raise Interrupted(
            f"{settled(stopped)}: the run in {run_path(run)} is complete, but its last files may "
            f"be incomplete. Run {same_command(run.saving)} again to check them."
        ) from None


def open_run(inputs: RunInputs, stack: ExitStack) -> OpenRun:
    """Open the resources of a run; `stack` closes them, however the run ends.

    Raises:
        UserError: The processes of the run differ, or the run directory does not fit the run.
    """
    saving, logging = inputs.run.saving, inputs.run.logging
    # This waits until every process has prepared its data.
    derived = gather(json.dumps(describe_derived(inputs.derived)))
    refuse_differences([json.loads(text) for text in derived])
    writes = jax.process_index() == 0
    remote, fetch = open_remote(inputs.run, inputs.derived, stack) if writes else NO_REMOTE
    directory = open_run_directory(
        inputs.run, inputs.derived, write=writes, fetch=fetch, is_trial=inputs.is_trial
    )
    stack.callback(directory.close)
    path, minutes = directory.path, inputs.run.hardware.watchdog_minutes
    watchdog = stack.enter_context(Watchdog(path, minutes, current_process_group(), directory.beat))
    console = stack.enter_context(
        Console(quiet=logging.quiet or not writes, logging_steps=logging.logging_steps)
    )
    watchdog.entered = partial(_enter, ActivityClock(), console)  # until the log is open
    if directory.is_adopted:
        console.note(
            f"The run in {path} was started by an older version, which gave runs no id, so it gets "
            "an id now."
        )
    if remote is not None:
        say = console.warn, console.note
        mirror = RunMirror(remote, directory, saving, *say, watchdog.moved)
        stack.push(lambda kind, *_: mirror.close(is_complete=kind is None))
    traced = parse_profile_steps(logging.profile_steps) if writes else None
    profile = Profile(traced, path / "profile", console.note, console.warn)
    stack.callback(profile.close)
    checkpoints = Checkpoints(
        directory.checkpoints,
        saving.keep_last,
        saving.keep_every,
        console.warn,
        owner=directory.record,
    )
    stack.callback(checkpoints.close)
    signals = inputs.signals or stack.enter_context(Signals())
    signals.is_shown, console.alert = (lambda: console.is_live), signals.message
    coordinator = StopCoordinator(signals, inputs.program.mesh, saving.save_minutes)
    return OpenRun(writes, directory, watchdog, console, profile, checkpoints, coordinator)
