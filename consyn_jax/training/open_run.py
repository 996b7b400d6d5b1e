"""The inputs of a run, the resources open while it runs, and its outcome."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from consyn_jax.config import RunConfig
from consyn_jax.distributed.launch import refuse_differences
from consyn_jax.distributed.process_group import current_process_group, gather
from consyn_jax.flags import flat
from consyn_jax.model.parameters import Params
from consyn_jax.tokenization import BPETokenizer
from consyn_jax.training.checkpointing.manager import Checkpoints
from consyn_jax.training.checkpointing.run_state import Progress
from consyn_jax.training.diagnostics.profile import Profile
from consyn_jax.training.inputs.batch_source import BatchSource
from consyn_jax.training.logging.advice import RunSettings
from consyn_jax.training.logging.console import Console
from consyn_jax.training.logging.live.activities import ActivityClock
from consyn_jax.training.logging.live.history import History, earlier_activities
from consyn_jax.training.logging.metrics import MetricsLog, ending, read_metrics
from consyn_jax.training.logging.run_page import command_rows
from consyn_jax.training.logging.tracking.callbacks import Callbacks, Maker, RunView
from consyn_jax.training.optim.schedules import warmup_length
from consyn_jax.training.program import Program
from consyn_jax.training.provenance.beginning_facts import begin_facts
from consyn_jax.training.provenance.run_facts import RunFacts
from consyn_jax.training.run import beginning
from consyn_jax.training.run.beginning import newest_values
from consyn_jax.training.run.directory import RunDirectory
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
    """Everything that a run is given.

    Attributes:
        origins: where each value of `run` comes from.
        derived: values that follow from flags and data, by their names in config.yaml.
        header, warnings: printed before the run begins.
        make_parameters: makes the parameters to train on a mesh, for the state to take over.
        make_base: makes what every batch has besides its arrays: the frozen weights under an
            adapter, or nothing.
        files: how best/ and final/ are written and read.
        compile_train_step: compiles the train step of `run`, or of the same run in smaller
            micro-batches.
        callbacks: functions that make the user's callbacks.
        signals: recorded by the process, if it does more than this run.
        exports_model: whether the run writes best/, final/ and loss.png, and lets its model write
            samples.
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


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        metrics: the newest value of every metric, with `step` and `tokens`.
        params: the trained parameters; None if the run was complete already.
        run: the configuration, in micro-batches that fit the devices.
    """

    metrics: dict[str, float | int]
    params: Params | None
    run: RunConfig


@dataclass(frozen=True)
class OpenRun:
    """The resources that are open while a run runs.

    Attributes:
        writes: whether this process writes to the run directory.
    """

    writes: bool
    directory: RunDirectory
    watchdog: Watchdog
    console: Console
    profile: Profile
    checkpoints: Checkpoints
    coordinator: StopCoordinator

    def before_commit(self, recorder: Recorder) -> None:
        """Write the log and the choice of kernels before a checkpoint or a model gets its name."""
        self.directory.check()
        recorder.flush()
        if self.writes:
            keep_kernels(self.directory.path)


def write_beginning(inputs: RunInputs, opened: OpenRun, step: int) -> RunFacts | None:
    """Write the files that precede a run's first step, in the process that writes.

    Args:
        step: the step from which the run starts or resumes.

    Returns:
        The provenance facts for the run's models; None in processes that do not write.

    Raises:
        UserError: the files cannot be written.
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
) -> tuple[Recorder, LiveReport, dict[str, int]]:
    """Open log, callbacks and page of the run, rewound to the step that it resumes from.

    Args:
        facts: the provenance facts of the run; None in processes that do not write.
        stack: closes them, and writes the final page then, however the run ends.

    Returns:
        Also the details of lost log lines, for the event `resume`.
    """
    run, path, warn = inputs.run, opened.directory.path, opened.console.warn
    log = None
    lines: list[dict[str, Any]] = []
    lost_lines: dict[str, int] = {}
    activities = ActivityClock()
    if opened.writes:
        log = stack.enter_context(MetricsLog(path, opened.directory.check, warn))
        step = -1 if resumed is None else resumed
        lost_lines = beginning.rewind(log, opened.directory, step, warn)
        lines = read_metrics(log.path)
        earlier = earlier_activities(lines)
        # The log's clock began a moment ago, when it was rewound.
        since = log.time_s - sum(earlier.values())
        activities.begin(earlier | {"other": earlier.get("other", 0.0) + since})
    if inputs.exports_model:
        beginning.forget_missing_best(progress, path)
    callbacks = _open_callbacks(inputs, opened, progress, resumed)
    opened.watchdog.entered = partial(_enter, activities, opened.console)
    parts = (progress, inputs.lengths, opened.console, log, callbacks, newest_values(lines))
    rate, advised = inputs.program.learning_rate, _advised(inputs)
    recorder = Recorder(*parts, rate, advised, activities=activities)
    recorder.history = History(lines)
    made_with = [] if facts is None else facts.made_with()
    command = command_rows(flat(run), inputs.origins)
    start = ("this start", time.strftime("%Y-%m-%d %H:%M:%S %z"))
    about = [*inputs.header, *made_with, *command, start]
    told = flat(run), inputs.origins, about, opened.console.left_s
    report = LiveReport(opened.directory, recorder, *told)
    callbacks.run.samples = report.samples
    stack.callback(lambda: callbacks.end(ending(recorder.history.events)))
    stack.callback(report.close)
    return recorder, report, lost_lines


def _open_callbacks(
    inputs: RunInputs, opened: OpenRun, progress: Progress, resumed: int | None
) -> Callbacks:
    """Begin trackers and callbacks, in the process that writes."""
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
    """The settings that advice depends on."""
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


def _enter(activities: ActivityClock, console: Console, phase: str) -> None:
    """Count and show that the run enters a phase of the watchdog."""
    activities.enter(phase)
    console.enter("" if phase in (STEPPING, WAITING) else phase, is_told=phase == COMPILING)


def open_run(inputs: RunInputs, stack: ExitStack) -> OpenRun:
    """Open what a run needs; `stack` closes it after the run has ended in any way.

    Raises:
        UserError: the processes of the run differ, or the run directory does not fit.
    """
    saving, logging = inputs.run.saving, inputs.run.logging
    derived = gather(json.dumps(describe_derived(inputs.derived)))  # the slowest prepares its data
    refuse_differences([json.loads(text) for text in derived])
    writes = jax.process_index() == 0
    directory = open_run_directory(inputs.run, inputs.derived, write=writes)
    stack.callback(directory.close)
    path, minutes = directory.path, inputs.run.hardware.watchdog_minutes
    watchdog = stack.enter_context(Watchdog(path, minutes, current_process_group(), directory.beat))
    console = stack.enter_context(
        Console(quiet=logging.quiet or not writes, logging_steps=logging.logging_steps)
    )
    if directory.is_adopted:
        console.note(
            f"The run in {path} was started by a version that gave runs no identity; it gets one "
            "now."
        )
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
    coordinator = StopCoordinator(signals, inputs.program.mesh, saving.save_minutes)
    return OpenRun(writes, directory, watchdog, console, profile, checkpoints, coordinator)
