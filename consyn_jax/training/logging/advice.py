"""Advice derived from a run's measurements: what slows the run down, and which flag to try.

Every rule needs evidence from several lines of metrics or evaluations. It gives its advice once per
run, and quotes the measurement. docs/training.md lists the rules.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

AT_ONCE = 3  # pieces of advice at one step; others wait for the next line of metrics
# The loss counts as unchanged if, this many steps after warm-up, it has changed by less than this
# share, and varies less than `STIRRED` times as much as at the beginning.
UNCHANGED_STEPS, UNCHANGED_SHARE, STIRRED = 200, 0.01, 3.0
CLIPPED_SHARE, CLIPPED_STEPS = 0.9, 200
SPIKES, SPIKE_STEPS = 3, 500
WORSE_SHARE, WORSE_EVALUATIONS = 0.02, 3
FLAT_SHARE, FLAT_EVALUATIONS = 0.001, 5
# Shares of the training time that trigger advice, once training has taken `LEAST_SECONDS`.
LEAST_SECONDS, WAITING_SHARE, EVALUATING_SHARE, SAVING_SHARE = 60.0, 0.2, 0.3, 0.1
FULL_SHARE, SPARE_SHARE = 0.95, 0.45  # of the device's memory
LOW_MFU = 0.2  # half of what small models reach on a GPU
SLOW_WRITE, LONG_WRITE_S = 50e6, 10.0  # bytes per second, as in consyn-doctor; seconds
LATE_SHARE, IN_TIME_SHARE = 0.2, 0.05  # shares of a process's time spent waiting for its own data


@dataclass(frozen=True)
class Advice:
    """One piece of advice.

    Attributes:
        about: the name of the advice; advice with the same name is given once per run.
        sentence: the measurement, and what to try.
    """

    about: str
    sentence: str


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run on which advice depends.

    Attributes:
        warmup_steps: number of steps before the learning rate reaches its peak.
        gradient_checkpointing: the value of `--gradient_checkpointing`; "none": no recomputation.
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
    """Time spent by this process since its first line of metrics, and memory in use.

    Attributes:
        seconds: total time.
        waiting, evaluating, saving: seconds spent on waiting for data, evaluating and saving.
        memory_share: the device's peak memory as a share of what JAX may use; None if unknown.
        mfu: model FLOP/s as a share of the device's peak; None if unknown.
        writes: bytes and seconds of the last two checkpoints.
        throttled: the GPUs that lower their clock, with reasons; empty if none does.
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
    """Measurements of one process in a run with several processes.

    Attributes:
        seconds: seconds since this process reached its first line of metrics.
        waiting: seconds that the process has spent waiting for its data.
        throttled: the GPUs of the process that lower their clock, with reasons; empty if none does.
    """

    host: str
    seconds: float
    waiting: float
    throttled: str = ""


@dataclass
class Adviser:
    """Chooses advice for a run, and gives each piece once. Checkpoints contain all attributes.

    Attributes:
        given: names of the advice already given.
        first_loss, first_spread: mean and standard deviation of the first 20 losses; None before
            there are 20.
        clipped_since: the step since which nearly all steps were clipped; None if few are.
        spikes: the steps at which recent loss spikes began.
        best, train_at_best: the lowest evaluation loss, and the training loss at that evaluation.
        worse: number of consecutive evaluations that show overfitting.
        flat: number of consecutive evaluations with about the lowest loss.
        newest_step: the last step that was checked for advice.
        at_newest_step: number of pieces of advice given at `newest_step`.
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
        """Return new advice after a line of metrics.

        Args:
            clipped: share of the steps since the previous line in which gradients were clipped.
            losses: losses of up to 100 recent steps.
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
        """Return new advice from the measurements of all processes.

        In every step, all processes wait for the slowest one.
        """
        slow = [
            f"process {i} ({each.host}), {each.throttled}"
            for i, each in enumerate(usages)
            if each.throttled
        ]
        return self._new(step, [*_of_lateness(usages), *_of_clocks("; ".join(slow[:3]))])

    def spike(self, step: int, facts: RunSettings) -> list[Advice]:
        """Return new advice after a loss spike that began at `step`."""
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
        """Return new advice after an evaluation.

        Args:
            loss: evaluation loss.
            losses: training losses of recent steps.
        """
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
            return  # a model that does not learn has large gradients, so clipping says nothing new
        lasts = since is not None and step >= max(since, facts.warmup_steps) + CLIPPED_STEPS
        if lasts and facts.max_grad_norm is not None:
            yield Advice(
                "most steps clipped",
                f"The gradients of nearly all steps are larger than --max_grad_norm "
                f"{facts.max_grad_norm:g} and are clipped. Try --lr "
                f"{facts.learning_rate / 2:.2g}, or a larger --max_grad_norm.",
            )

    def _calm(self, losses: list[float]) -> bool:
        """Whether the losses vary about as little as at the beginning of the run.

        If they vary more, the learning rate may be too high rather than too low.
        """
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
            "lower this to about 10 %; less --validation data also helps.",
        )
    # The time for saving includes best/ and the page, so wait for the first checkpoint.
    if saving >= SAVING_SHARE and step > (facts.save_steps or step):
        rarer = math.ceil((facts.save_steps or 0) * saving / (1 - saving) * 49)
        yield Advice(
            "saves too frequent",
            f"{saving:.0%} of the time is spent on writing checkpoints. --save_steps {rarer} "
            "would lower this to about 2 %; a faster disk may also help.",
        )


def _of_memory(usage: Usage, facts: RunSettings) -> Iterator[Advice]:
    share, count = usage.memory_share, facts.gradient_accumulation_steps
    if share is None or usage.seconds < LEAST_SECONDS:
        return
    if share >= FULL_SHARE:
        yield Advice(
            "memory nearly full",
            f"{share:.0%} of the device's memory is used. Halve --batch_size and double "
            "--gradient_accumulation_steps to use less memory, with the same result.",
        )
    elif share < SPARE_SHARE and facts.gradient_checkpointing != "none":
        yield Advice(
            "recomputation without need",
            f"Activations are recomputed, but only {share:.0%} of the device's memory is used. Try "
            "--gradient_checkpointing none, which gives the same result and is faster if it fits.",
        )
    elif share < SPARE_SHARE and count > 1 and count % 2 == 0:
        yield Advice(
            "memory to spare",
            f"Only {share:.0%} of the device's memory is used. Try --batch_size "
            f"{facts.batch_size * 2} --gradient_accumulation_steps {count // 2}, which is faster "
            "and gives the same result.",
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
            f"The batch is small: the device computes at {usage.mfu:.0%} of its peak rate and uses "
            f"{share:.0%} of its memory. Try --batch_size {facts.batch_size * 2}; with twice "
            "the tokens in a step, the run needs fewer steps and perhaps a higher --lr.",
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
        f"took {seconds:.0f} s. Put --output on a faster disk (consyn-doctor --output DIR "
        "measures a disk), or save less often with a larger --save_steps.",
    )


def _of_clocks(throttled: str) -> Iterator[Advice]:
    if throttled:
        yield Advice(
            "a GPU throttles",
            f"A GPU lowers its clock, which slows down the whole run: {throttled}. Check the "
            "GPU's cooling and power with nvidia-smi -q -d PERFORMANCE, or train without this GPU "
            "by setting CUDA_VISIBLE_DEVICES.",
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
            f"data, and the other processes wait {usual:.0%}; all processes wait for the slowest "
            "in every step. Compare the hosts with consyn-doctor --distributed, and put --data on "
            "an equally fast disk on all hosts.",
        )
