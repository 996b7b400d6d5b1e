"""Learning-rate schedules, and the plateau rule that lowers the rate after evaluations.

Schedules are functions of the number of updates, so skipped steps do not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from consyn_jax.config import BudgetOptions
from consyn_jax.errors import UserError
from consyn_jax.files import write_whole
from consyn_jax.optimizer_config import OptimizerOptions
from consyn_jax.training.logging.plots import bars, png

MOST_STEPS = 2**31 - 1
RATES_AHEAD = 256  # learning rates that are computed at once
TIMESCALE_WITHOUT_WARMUP = 10_000  # steps, for inverse_sqrt (Raffel et al., 2020)


def warmup_length(total_steps: int, warmup_steps: int | None, warmup_ratio: float) -> int:
    """Return the number of warm-up steps: as given, or a fraction of the run.

    >>> warmup_length(1000, None, 0.02)
    20
    """
    return round(total_steps * warmup_ratio) if warmup_steps is None else warmup_steps


class StepTime(NamedTuple):
    """The position of a step in a schedule.

    Attributes:
        since_warmup: Steps since the end of warm-up; 0 during warm-up.
        done: Fraction of the decay that has passed, from 0 to 1.
        before_end: Whether the step is before the end of the run.
        warmup_steps: Number of warm-up steps.
        decay_steps: Number of steps of the decay, at least 1.
    """

    since_warmup: Float[Array, "..."]
    done: Float[Array, "..."]
    before_end: Bool[Array, "..."]
    warmup_steps: int
    decay_steps: int


Shape = Callable[[StepTime, OptimizerOptions], jax.Array]
DECAYS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + jnp.cos(jnp.pi * done)) / 2,  # Loshchilov and Hutter (2017)
    "sqrt": lambda done: 1 - jnp.sqrt(done),
}


def _constant(time: StepTime, _: OptimizerOptions) -> jax.Array:
    return jnp.ones_like(time.done)


def _restarts(time: StepTime, options: OptimizerOptions) -> jax.Array:
    """A cosine decay over each of `num_cycles` equal parts of the time after warm-up."""
    # The product is an integer, so rounding cannot miss a restart. The run ends without a restart.
    part = time.since_warmup * options.num_cycles % time.decay_steps / time.decay_steps
    return DECAYS["cosine"](jnp.where(time.before_end, part, 1.0))


def _inverse_sqrt(time: StepTime, _: OptimizerOptions) -> jax.Array:
    """sqrt(w / (w + steps since warm-up)) for w steps of warm-up (Vaswani et al., 2017)."""
    timescale = time.warmup_steps or TIMESCALE_WITHOUT_WARMUP
    return jnp.sqrt(timescale / (timescale + time.since_warmup))


class ScheduleRule(NamedTuple):
    """An entry of the table of schedules.

    Attributes:
        shape: Function that returns the rate after warm-up: 1 for the peak, 0 for the lowest rate.
        has_warmup: Whether the schedule begins with warm-up; otherwise it begins at the peak.
        has_floor: Whether the lowest rate is set by `--min_lr_ratio`; otherwise it is 0.
        decays_late: Whether the rate decays only in the last fraction `--decay_ratio` of the run;
            otherwise it decays from the end of warm-up.
    """

    shape: Shape
    has_warmup: bool = True
    has_floor: bool = True
    decays_late: bool = False


SCHEDULES = {
    "cosine": ScheduleRule(lambda time, _: DECAYS["cosine"](time.done)),
    "linear": ScheduleRule(lambda time, _: DECAYS["linear"](time.done)),
    "constant": ScheduleRule(_constant, has_warmup=False),
    "constant_with_warmup": ScheduleRule(_constant),
    # Warm-up, stable, decay (Hägele et al., 2024).
    "wsd": ScheduleRule(
        lambda time, options: DECAYS[options.decay_shape](time.done), decays_late=True
    ),
    "cosine_with_restarts": ScheduleRule(_restarts),
    "inverse_sqrt": ScheduleRule(_inverse_sqrt, has_floor=False),
    "polynomial": ScheduleRule(lambda time, options: (1 - time.done) ** options.power),
    "plateau": ScheduleRule(_constant),  # lowered by `Plateau`
}


def build_schedule(options: OptimizerOptions, total_steps: int) -> optax.Schedule:
    """Build the learning-rate schedule, which is a function of the step, from resolved options.

    In warm-up, step s has the rate peak x (s + 1) / (warmup + 1), so that no step has a rate of 0.
    After warm-up, the rate is peak x (floor + (1 - floor) x shape). With `--decay_from`, the
    schedule has only the decay, and steps are counted from the beginning of the original run.

    Raises:
        UserError: Warm-up is longer than the run.
    """
    assert options.lr is not None
    peak = options.lr
    if options.decay_from is not None:
        ratio = (total_steps - options.decay_from) / total_steps
        options = replace(options, scheduler="wsd", warmup_steps=0, decay_ratio=ratio)
    rule, warmup_steps = SCHEDULES[options.scheduler], 0
    if rule.has_warmup:
        warmup_steps = warmup_length(total_steps, options.warmup_steps, options.warmup_ratio)
    if warmup_steps > total_steps:
        raise UserError(
            f"Warm-up of {warmup_steps} steps is longer than the run of {total_steps} steps. Lower "
            "--warmup_steps."
        )
    decay_steps = total_steps - warmup_steps
    if rule.decays_late:
        decay_steps = min(decay_steps, max(1, round(options.decay_ratio * total_steps)))
    length, floor = max(decay_steps, 1), options.min_lr_ratio if rule.has_floor else 0.0

    def rate(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum((step + 1) / (warmup_steps + 1), 1.0)
        done = jnp.clip((step - (total_steps - decay_steps)) / length, 0.0, 1.0)
        since_warmup = jnp.maximum(step - warmup_steps, 0)
        time = StepTime(since_warmup, done, step < total_steps, warmup_steps, length)
        return peak * rise * (floor + (1 - floor) * rule.shape(time, options))

    return rate


class RatesAhead:
    """Learning rates by the number of updates, computed on the host for many updates at once.

    Computing one rate takes a dozen calls of JAX, which on a CPU wait for the running step. Blocks
    of rates begin at multiples of their length, so a resumed run has the same rates to the last
    bit.
    """

    def __init__(self, schedule: optax.Schedule) -> None:
        self._schedule, self._block, self._rates = schedule, -1, np.empty(0)

    def __call__(self, updates: int) -> float:
        """Return the rate after `updates` updates."""
        block, place = divmod(updates, RATES_AHEAD)
        if block != self._block:
            first = block * RATES_AHEAD
            with jax.default_device(_host()):
                found = np.asarray(self._schedule(np.arange(first, first + RATES_AHEAD)))
            self._block, self._rates = block, np.broadcast_to(found, (RATES_AHEAD,))
        return float(self._rates[place])


def _host() -> jax.Device | None:
    """Return the CPU device, which is free while a GPU computes; None without JAX's CPU backend."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def decay_end(decay_from: int, decay_ratio: float) -> int:
    """Return the last step of a run that decays from step `decay_from` to its end.

    The decay takes the fraction `decay_ratio` of all steps.

    >>> decay_end(800, 0.2)
    1000
    """
    return max(decay_from + 1, round(decay_from / (1 - decay_ratio)))


def countable(steps: int) -> int:
    """Return `steps` if schedules and optimizers can count that many steps in 32 bits.

    Raises:
        UserError: The number of steps is too large.
    """
    if steps > MOST_STEPS:
        about = f"{steps:,}" if steps < 10**18 else f"more than {10**18:,}"
        raise UserError(
            f"The run would take {about} steps, and at most {MOST_STEPS:,} can be counted. Lower "
            "--max_steps, --epochs or --total_tokens."
        )
    return steps


def count_steps(
    budget: BudgetOptions,
    optimizer: OptimizerOptions,
    tokens_per_row: int,
    rows_per_epoch: int | None,
) -> int:
    """Count the steps to the first limit of a run; with `--decay_from`, to the end of the decay.

    Args:
        tokens_per_row: Tokens in a row of a batch.
        rows_per_epoch: Rows in an epoch; None if unknown.

    Raises:
        UserError: The run has no limit, or too many steps.
    """
    size = budget.batch_size * budget.gradient_accumulation_steps
    if optimizer.decay_from is not None:
        return decay_end(optimizer.decay_from, optimizer.decay_ratio)
    limits = [] if budget.max_steps is None else [budget.max_steps]
    if budget.total_tokens is not None:
        limits.append(math.ceil(budget.total_tokens / (size * tokens_per_row)))
    if budget.epochs is not None and rows_per_epoch is not None:
        limits.append(max(1, math.ceil(budget.epochs * rows_per_epoch / size)))
    if not limits:
        raise UserError(
            "The length of an epoch of this iterable is unknown: give max_steps or total_tokens."
        )
    return countable(min(limits))


# ------------------------------------------------------------------------------------------ plateau


@dataclass
class Plateau:
    """Lowers the learning rate when a metric stops improving.

    The rule is that of torch's `ReduceLROnPlateau` with a relative threshold. All of its state is
    in the fields, so `Plateau(**json.loads(json.dumps(asdict(plateau))))` continues from the same
    point.

    Attributes:
        factor: Factor by which `scale` is multiplied when the rate is lowered.
        patience: Number of consecutive evaluations without improvement before the rate is lowered.
        cooldown: Number of evaluations after a reduction that do not count towards `patience`.
        threshold: Smallest relative change that counts as an improvement.
        min_scale: Lowest value of `scale`.
        greater_is_better: Whether larger values of the metric are better.
        scale: Current factor of the schedule's learning rate.
        best: Best value so far; None before the first evaluation.
        num_bad: Number of consecutive evaluations without improvement.
        cooling: Number of evaluations that are left in the cool-down.
    """

    factor: float
    patience: int
    cooldown: int
    threshold: float
    min_scale: float
    greater_is_better: bool
    scale: float = 1.0
    best: float | None = None
    num_bad: int = 0
    cooling: int = 0

    def update(self, metric: float) -> float:
        """Process the metric of an evaluation, and return the new `scale`.

        A non-finite value never counts as an improvement.
        """
        if self._is_better(metric):
            self.best, self.num_bad = metric, 0
        else:
            self.num_bad += 1
        if self.cooling > 0:
            self.cooling -= 1
            self.num_bad = 0
        if self.num_bad > self.patience:
            self.scale = max(self.scale * self.factor, self.min_scale)
            self.cooling, self.num_bad = self.cooldown, 0
        return self.scale

    def _is_better(self, metric: float) -> bool:
        if self.best is None or not math.isfinite(metric):
            return math.isfinite(metric)
        return (
            metric > self.best * (1 + self.threshold)
            if self.greater_is_better
            else metric < self.best * (1 - self.threshold)
        )


def build_plateau(options: OptimizerOptions, greater_is_better: bool) -> Plateau | None:
    """Build the plateau rule in its initial state; None for other schedulers.

    The lowest scale is `--min_lr_ratio`.
    """
    if options.scheduler != "plateau":
        return None
    return Plateau(
        options.plateau_factor,
        options.plateau_patience,
        options.plateau_cooldown,
        options.plateau_threshold,
        options.min_lr_ratio,
        greater_is_better,
    )


# ------------------------------------------------------------------------------------------ drawing


def draw_schedule(
    schedule: optax.Schedule, total_steps: int, width: int = 64, height: int = 10
) -> str:
    """Draw the learning rates of a run as text.

    The drawing has `height` lines and an axis, and at most `width` + 11 columns.

    >>> options = OptimizerOptions(scheduler="linear", lr=1e-3, warmup_steps=0, min_lr_ratio=0.0)
    >>> print(draw_schedule(build_schedule(options, 100), 100, width=10, height=3))
        0.001 ┤█▆▃▁
              │████▆▄▂
            0 ┤███████▇▅▃
              └──────────
               0      100
    """
    steps = np.round(np.linspace(0, max(total_steps - 1, 0), 32 * width)).astype(int)
    rates = (
        (np.asarray(jax.device_get(schedule(steps)), np.float64) * np.ones(steps.shape))
        .reshape(width, -1)
        .max(axis=1)
    )
    top = max(float(rates.max()), 1e-300)
    eighths = np.round(rates / top * height * 8).astype(int)
    return "\n".join(
        [
            *bars(eighths, height, f"{top:.3g}", "0"),
            " " * 11 + "0" + f"{total_steps:,}".rjust(width - 1),
        ]
    )


def write_schedule_plot(schedule: optax.Schedule, total_steps: int, path: Path) -> None:
    """Draw the learning rates of a run as a PNG; create the directory if it does not exist.

    Raises:
        UserError: `path` cannot be written.
    """
    steps = np.unique(np.round(np.linspace(0, max(total_steps - 1, 0), 2000)).astype(int))
    rates = np.asarray(jax.device_get(schedule(steps))) * np.ones(len(steps))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot(steps, rates, linewidth=1.6)
        axes.set_xlabel("step")
        axes.set_ylabel("learning rate")
        axes.set_xlim(0, max(total_steps, 1))
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
        axes.grid(alpha=0.3)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, png(3.2, draw))
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}. Name another --output."
        ) from error
