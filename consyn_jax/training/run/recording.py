"""Record a run in its log, in its callbacks and trackers, and on the screen."""

from __future__ import annotations

import json
import math
import resource
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jax

from consyn_jax.data.loader import Order
from consyn_jax.data.mixture import Mixture
from consyn_jax.distributed.process_group import gather
from consyn_jax.training.checkpointing.run_state import Progress
from consyn_jax.training.logging.advice import Advice, ProcessUsage, RunSettings, Usage
from consyn_jax.training.logging.clock_watch import ClockWatch
from consyn_jax.training.logging.console import Console
from consyn_jax.training.logging.live.activities import ACTIVITIES, ActivityClock, key
from consyn_jax.training.logging.live.history import History
from consyn_jax.training.logging.metrics import MetricsLog
from consyn_jax.training.logging.stopwatch import Stopwatch
from consyn_jax.training.logging.tracking.callbacks import Callbacks
from consyn_jax.training.step import TrainState

COMPARED = 20  # lines of metrics between two comparisons of the processes


@dataclass(frozen=True)
class Lengths:
    """The lengths of a run, in steps and sequences.

    Attributes:
        total_steps: Number of optimizer steps in the run.
        logging_steps: Number of steps between two lines of metrics.
        sequences_per_step: Number of sequences per optimizer step.
        sequences_per_epoch: Number of sequences per epoch; None if unknown.
        order: Order of the training data; None if the data cannot be read by position.
    """

    total_steps: int
    logging_steps: int
    sequences_per_step: int
    sequences_per_epoch: int | None
    order: Order | None


@dataclass
class Recorder:
    """Counts steps, and records metrics and events.

    Attributes:
        log: The log; None in processes that do not write one.
        callbacks: Callbacks, including trackers; none in processes that do not write.
        last: Newest value of every metric.
        learning_rate: Function from a number of updates to the learning rate, before `--scheduler
            plateau` lowers it.
        settings: Settings on which advice depends.
        writes: Bytes and seconds of the last two checkpoints.
        histograms: Function that makes histograms of a state; None if they are not wanted.
        clocks: Watches the GPUs for throttling.
        stopwatch: Stopwatch that is restarted when the loop begins.
        activities: Time spent on each activity.
        history: The log so far, for the page of the run; kept only in the process that writes.
    """

    progress: Progress
    lengths: Lengths
    console: Console
    log: MetricsLog | None
    callbacks: Callbacks
    last: dict[str, float]
    learning_rate: Callable[[int], float]
    settings: RunSettings
    writes: Callable[[], Sequence[tuple[int, float]]] = tuple
    histograms: Callable[[TrainState], Mapping[str, Any]] | None = None
    clocks: ClockWatch = field(default_factory=ClockWatch)
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    activities: ActivityClock = field(default_factory=ActivityClock)
    history: History = field(default_factory=History)
    _has_warned_of_no_tokens: bool = False
    _first_line: dict[str, float] | None = None  # the first line of metrics of this process
    _memory: Mapping[str, int] = field(default_factory=dict)  # statistics at the newest line

    def metrics(self, values: dict[str, float]) -> dict[str, Any]:
        """Record metrics at the current step.

        Returns:
            The line of the log; empty in processes that do not write.
        """
        self.last |= values
        if self.log is None:
            return {}
        line = self.log.write(self.progress.step, self.progress.tokens, values)
        self.history.add(line)
        return line

    def event(self, event: str, details: dict[str, Any] | None = None) -> None:
        """Record an event at the current step."""
        if self.log is not None:
            place = self.progress.step, self.progress.tokens
            self.history.add(self.log.write(*place, details, event=event))

    def save(self) -> None:
        """Record that a checkpoint is being written."""
        self.event("save", self.sources_taken())

    def flush(self) -> None:
        """Flush the log to the disk; any thread may call this.

        Raises:
            OSError: The log cannot be written.
        """
        if self.log is not None:
            self.log.flush()

    def sources_taken(self) -> dict[str, Any]:
        """Number of sequences taken from each source of a mixture; empty without a mixture."""
        order, size = self.lengths.order, self.lengths.sequences_per_step
        if not isinstance(order, Mixture):
            return {}
        return {"sources": order.counts(self.progress.step * size)}

    def summary(self) -> dict[str, float | int]:
        """The newest value of every metric, with the step and the number of tokens."""
        return {**self.last, "step": self.progress.step, "tokens": self.progress.tokens}

    # ------------------------------------------------------------------------------------- one step

    def count(self, values: dict[str, float]) -> None:
        """Count a step, and add its metrics to the running sums."""
        progress, tokens = self.progress, int(values["tokens"])
        progress.step += 1
        progress.tokens += tokens
        self.stopwatch.count(tokens)
        self.ended_passes()
        if not tokens and not self._has_warned_of_no_tokens:
            self._has_warned_of_no_tokens = True
            self.console.warn(
                f"Step {progress.step:,} had no token to learn from. Prompts may be longer than "
                "--max_tokens."
            )
        progress.clipped += int(values["clipped"])
        progress.unlogged += 1

    def ended_passes(self, *, resumed: bool = False) -> None:
        """Record the epochs that ended in the current step, separately for each source of data.

        Args:
            resumed: Whether the run resumes from a checkpoint of this step. Resuming has removed
                these events from the log. They are logged again, but not printed again.
        """
        order, step, size = self.lengths.order, self.progress.step, self.lengths.sequences_per_step
        if order is None or step == 0:
            return
        before, after = order.passes((step - 1) * size), order.passes(step * size)
        for name, passes in after.items():
            for epoch in range(before[name] + 1, passes + 1):
                self.event(
                    "end_of_data", {"epoch": epoch, "source": name} if name else {"epoch": epoch}
                )
            if passes > before[name] and not resumed:
                epoch_of = f"End of {name}: epoch" if name else "Epoch"
                self.console.note(f"{epoch_of} {passes} is over at step {step:,}.")

    def step(self, values: dict[str, float], waited_s: float) -> None:
        """Record a line of metrics for the step just counted, if a line is due.

        Args:
            waited_s: Seconds spent waiting for data so far.
        """
        self._look_for_spike(values)
        self.callbacks.tick()
        progress, lengths = self.progress, self.lengths
        if progress.step % lengths.logging_steps and progress.step not in (1, lengths.total_steps):
            self.console.step(progress.step, values["loss"], self.stopwatch.tokens_per_s)
            return
        line = self._line(values, waited_s)
        self.console.step(progress.step, values["loss"], line["throughput/tokens_per_s"], line)
        self.callbacks.step(self.metrics(line))
        clipped, losses = line["train/clipped_fraction"], progress.recent.losses
        usage = self._usage(line)
        self._advise(progress.adviser.line(progress.step, clipped, losses, usage, self.settings))
        if jax.process_count() > 1 and progress.step % (COMPARED * lengths.logging_steps) == 0:
            self._compare_processes(usage)

    def evaluation(self, values: dict[str, float]) -> dict[str, Any]:
        """Record the metrics of an evaluation, and print advice about its loss.

        Returns:
            The line of the log; empty in processes that do not write.
        """
        line = self.metrics(values)
        if "eval/loss" in values:
            progress = self.progress
            known = progress.step, values["eval/loss"], progress.recent.losses, self.settings
            self._advise(progress.adviser.evaluation(*known))
        return line

    def tell_evaluation(self, line: dict[str, Any], state: TrainState) -> None:
        """Pass an evaluation to the callbacks, with histograms of the state if requested."""
        if self.histograms is not None:
            self.callbacks.run.histograms = self.histograms(state)
        self.callbacks.evaluate(line)

    def _usage(self, line: dict[str, float]) -> Usage:
        """Collect the time per activity since the first line of metrics, and the memory use."""
        self._first_line = first = self._first_line or line
        spent = {name: line[key(name)] - first[key(name)] for name in ACTIVITIES}
        limit = self._memory.get("bytes_limit")
        return Usage(
            seconds=sum(spent.values()),
            waiting=spent["data"],
            evaluating=spent["evaluation"],
            saving=spent["saving"],
            memory_share=limit and self._memory["peak_bytes_in_use"] / limit,
            mfu=line.get("throughput/mfu"),
            writes=self.writes(),
            throttled=self.clocks.throttled(),
        )

    def _compare_processes(self, usage: Usage) -> None:
        """Exchange measurements between all processes, which must call this at the same step."""
        own = ProcessUsage(socket.gethostname(), usage.seconds, usage.waiting, usage.throttled)
        texts = gather(json.dumps(asdict(own)))
        everyone = [ProcessUsage(**json.loads(text)) for text in texts]
        self._advise(self.progress.adviser.processes(self.progress.step, everyone))

    def _advise(self, found: list[Advice]) -> None:
        for advice in found:
            self.event("advice", {"about": advice.about, "sentence": advice.sentence})
            self.console.note(advice.sentence)

    def _line(self, values: dict[str, float], waited_s: float) -> dict[str, float]:
        """Build a line of training metrics, without non-finite values."""
        progress, lengths, lap = self.progress, self.lengths, self.stopwatch.lap(waited_s)
        clipped, progress.clipped, progress.unlogged = progress.clipped / progress.unlogged, 0, 0
        rate_scale = 1.0 if progress.plateau is None else progress.plateau.scale
        line = {
            "train/loss": values["loss"],
            "train/grad_norm": values["grad_norm"],
            "train/learning_rate": self.learning_rate(int(values["updates"])) * rate_scale,
            "train/clipped_fraction": clipped,
            "throughput/tokens_per_s": lap.tokens_per_s,
            "throughput/step_time_s": lap.step_time_s,
            "throughput/data_wait_fraction": lap.data_wait_fraction,
        }
        line |= {f"train/{name}": value for name, value in values.items() if "/" in name}
        if "skipped" in values:
            line |= {
                "train/loss_scale": values["loss_scale"],
                "train/skipped_steps": values["skipped_steps"],
            }
        line = {name: value for name, value in line.items() if math.isfinite(value)}
        if lengths.sequences_per_epoch:
            line["train/epoch"] = (
                progress.step * lengths.sequences_per_step / lengths.sequences_per_epoch
            )
        if lap.mfu is not None:
            line["throughput/mfu"] = lap.mfu
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self._memory = memory_stats()
        line["memory/peak_bytes"] = int(self._memory.get("peak_bytes_in_use", own))
        return line | self.activities.values()

    def _look_for_spike(self, values: dict[str, float]) -> None:
        if not values["tokens"] or not math.isfinite(values["loss"]):
            return
        usual = self.progress.recent.update(values["loss"])
        if usual is not None:
            self.event("loss_spike", {"loss": values["loss"], "usual": usual})
            self.console.note(
                f"Step {self.progress.step:,}: the loss is {values['loss']:.4f}; {usual:.4f} is "
                "usual."
            )
            self._advise(self.progress.adviser.spike(self.progress.step, self.settings))


def memory_stats() -> dict[str, int]:
    """Memory statistics from the first device; empty if it reports none, as on CPUs."""
    return jax.local_devices()[0].memory_stats() or {}
