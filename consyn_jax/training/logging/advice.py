"""Advice from what a run measures: what holds it back, and the flag to try.

Every rule needs evidence over several lines or evaluations, gives its advice once per run, and
names what it measured. docs/training.md lists the rules.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

AT_ONCE = 3  # sentences at one step; others wait for the next line
# Steps before the loss can be called unchanged, and how little of it counts as that.
UNCHANGED_STEPS, UNCHANGED_SHARE, STIRRED = 200, 0.01, 3.0
CLIPPED_SHARE, CLIPPED_STEPS = 0.9, 200
SPIKES, SPIKE_STEPS = 3, 500
WORSE_SHARE, WORSE_EVALUATIONS = 0.02, 3
FLAT_SHARE, FLAT_EVALUATIONS = 0.001, 5
# Shares of the time. Below these seconds of training none of them is judged.
LEAST_SECONDS, WAITING_SHARE, EVALUATING_SHARE, SAVING_SHARE = 60.0, 0.2, 0.3, 0.1
FULL_SHARE, SPARE_SHARE = 0.95, 0.45  # of the device's memory
LOW_MFU = 0.2  # half of what small models reach on a GPU
SLOW_WRITE, LONG_WRITE_S = 50e6, 10.0  # bytes per second, as consyn-doctor judges a disk
LATE_SHARE, IN_TIME_SHARE = 0.2, 0.05  # of a process's time, waiting for its own data


@dataclass(frozen=True)
class Advice:
    """One piece of advice.

    Attributes:
        about: its name; each is given once in a run.
        sentence: what was measured, and what to try.
    """

    about: str
    sentence: str


@dataclass(frozen=True)
class RunSettings:
    """Settings that advice depends on.

    Attributes:
        warmup_steps: steps before the learning rate is at its peak.
        gradient_checkpointing: its policy; "none" recomputes nothing.
    """

    total_steps: int
    warmup_steps: int
    learning_rate: float
    max_grad_norm: float | None
    batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: str
    eval_steps: int | None
    save_steps: int | None


@dataclass(frozen=True)
class Usage:
    """The time by activity since the first line of this process, and the memory in use.

    Attributes:
        seconds: all of the time.
        waiting, evaluating, saving: seconds of it.
        memory_share: the device's peak memory as a share of what JAX may use; None if unknown.
        mfu: model FLOP/s as a share of the device's peak; None if unknown.
        writes: bytes and seconds of the last two checkpoints.
        throttled: which GPU lowers its clock and why; empty if none does.
    """

    seconds: float
    waiting: float
    evaluating: float
    saving: float
    memory_share: float | None
    mfu: float | None = None
    writes: Sequence[tuple[int, float]] = ()
    throttled: str = ""


@dataclass(frozen=True)
class ProcessUsage:
    """Measurements of one of several processes.

    Attributes:
        seconds: since its first line.
        waiting: seconds of them spent waiting for its data.
        throttled: as in `Usage`.
    """

    host: str
    seconds: float
    waiting: float
    throttled: str = ""


@dataclass
class Adviser:
    """Follows a run and remembers the advice given. Its state is in every checkpoint.

    Attributes:
        given: names of the advice that was given.
        first_loss, first_spread: mean and deviation of the first losses; None before there are
            enough.
        clipped_since: the step from which on nearly every step was clipped; None if not so now.
        spikes: steps at which the last loss spikes began.
        best, train_at_best: the lowest evaluation loss, and the training loss then.
        newest_step, at_newest_step: the step of the newest advice, and the advice given there.
        worse, flat: consecutive evaluations clearly above the lowest, and about equal to it.
    """

    given: list[str] = field(default_factory=list)
    first_loss: float | None = None
    first_spread: float | None = None
    clipped_since: int | None = None
    spikes: list[int] = field(default_factory=list)
    best: float | None = None
    train_at_best: float | None = None
    worse: int = 0
    flat: int = 0
    newest_step: int = 0
    at_newest_step: int = 0

    def line(
        self, step: int, clipped: float, losses: list[float], usage: Usage, facts: RunSettings
    ) -> list[Advice]:
        """Take in a line of metrics.

        Args:
            clipped: share of the steps since the last line whose gradients were clipped.
            losses: losses of the last steps, up to a hundred.
        """
        if self.first_loss is None and len(losses) >= 20:
            self.first_loss = statistics.fmean(losses[:20])
            self.first_spread = statistics.pstdev(losses[:20])
        if clipped < CLIPPED_SHARE:
            self.clipped_since = None
        elif self.clipped_since is None:
            self.clipped_since = step
        return self._new(
            step,
            [
                *self._of_rate(step, losses, facts),
                *_of_time(step, usage, facts),
                *_of_memory(usage, facts),
                *_of_writes(usage),
                *_of_clocks(usage.throttled),
            ],
        )

    def processes(self, step: int, usages: Sequence[ProcessUsage]) -> list[Advice]:
        """Take in the measurements of all processes, which wait for the slowest in every step."""
        slow = [
            f"process {i} ({each.host}), {each.throttled}"
            for i, each in enumerate(usages)
            if each.throttled
        ]
        return self._new(step, [*_of_lateness(usages), *_of_clocks("; ".join(slow[:3]))])

    def spike(self, step: int, facts: RunSettings) -> list[Advice]:
        """Take in the step at which a loss spike began."""
        self.spikes = [*(each for each in self.spikes if each > step - SPIKE_STEPS), step]
        if len(self.spikes) < SPIKES:
            return []
        return self._new(
            step,
            [
                Advice(
                    "rate too high",
                    f"The loss jumped {len(self.spikes)} times within {SPIKE_STEPS} steps. Try "
                    f"--lr {facts.learning_rate / 2:.2g}, or a longer warm-up.",
                )
            ],
        )

    def evaluation(
        self, step: int, loss: float, losses: list[float], facts: RunSettings
    ) -> list[Advice]:
        """Take in an evaluation loss, with the training losses of the last steps."""
        if not losses or not math.isfinite(loss):
            return []
        before, train = self.best, statistics.fmean(losses)
        if before is None or loss < before:
            self.best, self.train_at_best, self.worse = loss, train, 0
            self.flat = self.flat + 1 if before and before - loss < FLAT_SHARE * before else 0
        else:
            memorises = loss > (1 + WORSE_SHARE) * before and train < (self.train_at_best or 0)
            self.worse = self.worse + 1 if memorises else 0
            self.flat = self.flat + 1 if loss < (1 + FLAT_SHARE) * before else 0
        return self._new(step, self._of_evaluations(step, loss, train, facts))

    def _new(self, step: int, found: Iterable[Advice]) -> list[Advice]:
        if step != self.newest_step:
            self.newest_step, self.at_newest_step = step, 0
        left = AT_ONCE - self.at_newest_step
        new = [advice for advice in found if advice.about not in self.given][:left]
        self.given = [*self.given, *(advice.about for advice in new)]
        self.at_newest_step += len(new)
        return new

    def _of_rate(self, step: int, losses: list[float], facts: RunSettings) -> Iterator[Advice]:
        first, since = self.first_loss, self.clipped_since
        now = statistics.fmean(losses) if losses else 0.0
        is_judged = first is not None and step >= facts.warmup_steps + UNCHANGED_STEPS
        if (
            is_judged
            and first
            and abs(first - now) < UNCHANGED_SHARE * first
            and self._calm(losses)
        ):
            yield Advice(
                "rate too low",
                f"The loss has hardly changed since the beginning: {first:.4g} then, {now:.4g} "
                "now. The learning rate may be too low; consyn-train --lr_find suggests one.",
            )
            return  # gradients are large where nothing is learned, and clipped for that reason
        lasts = since is not None and step >= max(since, facts.warmup_steps) + CLIPPED_STEPS
        if lasts and facts.max_grad_norm is not None:
            yield Advice(
                "most steps clipped",
                f"The gradients of nearly all steps are larger than --max_grad_norm "
                f"{facts.max_grad_norm:g} and are clipped. Try --lr "
                f"{facts.learning_rate / 2:.2g}, or a larger --max_grad_norm.",
            )

    def _calm(self, losses: list[float]) -> bool:
        """Whether the losses vary as at the beginning; a rate that is too high stirs them up."""
        usual = max(self.first_spread or 0.0, UNCHANGED_SHARE * (self.first_loss or 0.0))
        return statistics.pstdev(losses) < STIRRED * usual

    def _of_evaluations(
        self, step: int, loss: float, train: float, facts: RunSettings
    ) -> Iterator[Advice]:
        if self.worse >= WORSE_EVALUATIONS:
            yield Advice(
                "overfitting",
                f"The evaluation loss was {self.best:.4g} at its lowest and is {loss:.4g} now, "
                f"while the training loss fell to {train:.4g}: the model memorises. Try --dropout "
                "0.1, more data, or --early_stopping_patience 3 with --load_best_model_at_end.",
            )
        if self.flat >= FLAT_EVALUATIONS and step < 0.8 * facts.total_steps:
            yield Advice(
                "plateau",
                f"The last {self.flat} evaluations are within {FLAT_SHARE:.1%} of the best. "
                "--early_stopping_patience 3 would end the run; --scheduler plateau would lower "
                "the learning rate.",
            )


def _of_time(step: int, usage: Usage, facts: RunSettings) -> Iterator[Advice]:
    if usage.seconds < LEAST_SECONDS:
        return
    waiting, evaluating, saving = (
        part / usage.seconds for part in (usage.waiting, usage.evaluating, usage.saving)
    )
    if waiting >= WAITING_SHARE:
        yield Advice(
            "waiting for data",
            f"{waiting:.0%} of the time is spent waiting for data. Prepare it once with "
            "consyn-prepare, keep it on a faster disk, or give your data loader more workers.",
        )
    if evaluating >= EVALUATING_SHARE and step > (facts.eval_steps or step):
        rarer = math.ceil((facts.eval_steps or 0) * evaluating / (1 - evaluating) * 9)
        yield Advice(
            "evaluations too frequent",
            f"{evaluating:.0%} of the time is spent on evaluations. --eval_steps {rarer} would "
            "bring this to about a tenth, and so would less --validation data.",
        )
    # best/ and the page are written, too; without a checkpoint so far they were it.
    if saving >= SAVING_SHARE and step > (facts.save_steps or step):
        rarer = math.ceil((facts.save_steps or 0) * saving / (1 - saving) * 49)
        yield Advice(
            "saves too frequent",
            f"{saving:.0%} of the time is spent on writing checkpoints. --save_steps {rarer} "
            "would bring this to about 2 %, and so may a faster disk.",
        )


def _of_memory(usage: Usage, facts: RunSettings) -> Iterator[Advice]:
    share, count = usage.memory_share, facts.gradient_accumulation_steps
    if share is None or usage.seconds < LEAST_SECONDS:
        return
    if share >= FULL_SHARE:
        yield Advice(
            "memory nearly full",
            f"The device's memory is used to {share:.0%}. Half the --batch_size with twice the "
            "--gradient_accumulation_steps needs less, with the same result.",
        )
    elif share < SPARE_SHARE and facts.gradient_checkpointing != "none":
        yield Advice(
            "recomputation without need",
            f"Activations are computed twice, though only {share:.0%} of the memory is used. Try "
            "--gradient_checkpointing none: it is faster where it fits, and computes the same.",
        )
    elif share < SPARE_SHARE and count > 1 and count % 2 == 0:
        yield Advice(
            "memory to spare",
            f"Only {share:.0%} of the memory is used. --batch_size {facts.batch_size * 2} "
            f"--gradient_accumulation_steps {count // 2} computes the same in larger pieces, which "
            "is faster.",
        )
    elif (
        share < SPARE_SHARE
        and count == 1
        and usage.mfu is not None
        and usage.mfu < LOW_MFU
        and usage.waiting < WAITING_SHARE * usage.seconds
    ):
        yield Advice(
            "small batch",
            f"The device computes at {usage.mfu:.0%} of its peak and uses {share:.0%} of its "
            f"memory: the batch is small for it. Try --batch_size {facts.batch_size * 2}; a step "
            "then has twice the tokens, so the run needs fewer steps and perhaps a higher --lr.",
        )


def _of_writes(usage: Usage) -> Iterator[Advice]:
    if len(usage.writes) < 2 or any(
        seconds < LONG_WRITE_S or num_bytes > SLOW_WRITE * seconds
        for num_bytes, seconds in usage.writes
    ):
        return
    num_bytes, seconds = usage.writes[-1]
    yield Advice(
        "slow storage",
        f"The last checkpoints were written at {num_bytes / seconds / 1e6:.2g} MB/s; the newest "
        f"took {seconds:.0f} s. Give --output on a faster disk (consyn-doctor --output DIR "
        "measures one), or save less often with --save_steps.",
    )


def _of_clocks(throttled: str) -> Iterator[Advice]:
    if throttled:
        yield Advice(
            "a GPU throttles",
            f"A GPU lowers its clock: {throttled}. The run is as fast as its slowest GPU. Check "
            "its cooling and power with nvidia-smi -q -d PERFORMANCE, or leave it out with "
            "CUDA_VISIBLE_DEVICES.",
        )


def _of_lateness(usages: Sequence[ProcessUsage]) -> Iterator[Advice]:
    if len(usages) < 2 or min(each.seconds for each in usages) < LEAST_SECONDS:
        return
    shares = [each.waiting / each.seconds for each in usages]
    latest = max(range(len(shares)), key=shares.__getitem__)
    usual = statistics.median(shares[:latest] + shares[latest + 1 :])
    if shares[latest] >= LATE_SHARE and usual < IN_TIME_SHARE:
        yield Advice(
            "imbalance between processes",
            f"Process {latest} ({usages[latest].host}) waits {shares[latest]:.0%} of its time for "
            f"its data, the others {usual:.0%}, and all wait for it in every step. Compare the "
            "hosts with consyn-doctor --distributed, and give all of them --data on an equally "
            "fast disk.",
        )
