"""Learning-rate schedules: the rate at each optimizer step, counted from 0, and the rule that lowers it by the evaluations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from consyn_jax.config import DECAY_SHAPES, SCHEDULERS, OptimizerOptions, UserError, nearest
from consyn_jax.training.drawing import bars, png

TIMESCALE_WITHOUT_WARMUP = 10_000  # steps, of inverse_sqrt (Raffel et al., 2020)


def warmup_length(total_steps: int, warmup_steps: int | None, warmup_ratio: float) -> int:
    """Steps of warm-up: as given, else a share of the run.

    >>> warmup_length(1000, None, 0.02)
    20
    """
    return round(total_steps * warmup_ratio) if warmup_steps is None else warmup_steps


def build_schedule(
    name: str,
    peak: float,
    total_steps: int,
    warmup_steps: int,
    min_ratio: float,
    *,
    num_cycles: int = 1,
    power: float = 1.0,
    decay_ratio: float = 0.2,
    decay_shape: str = "linear",
) -> optax.Schedule:
    """A function from the step to its learning rate.

    In warm-up step s has rate peak x (s + 1) / (warmup + 1), so that no step is lost on a rate of 0. Then, with r running from 0 to 1
    over the rest, the rate is peak x (min_ratio + (1 - min_ratio) x shape):

    - linear 1 - r; polynomial (1 - r)^power; cosine (1 + cos pi r) / 2 (Loshchilov and Hutter, 2017);
    - cosine_with_restarts: the cosine over each of `num_cycles` equal parts of the rest; the run ends at the end of the last;
    - wsd: 1, and over the last `decay_ratio` of the whole run 1 - r', (1 + cos pi r') / 2 or 1 - sqrt r' (Hägele et al., 2024);
    - inverse_sqrt: sqrt(w / (w + steps since warm-up)) x peak with w the steps of warm-up, 10,000 without (Vaswani et al., 2017), no `min_ratio`;
    - constant, constant_with_warmup and plateau stay at the peak (constant has no warm-up at all; plateau is lowered by `Plateau`).

    Raises:
        UserError: unknown name or shape, or warm-up longer than the run.
    """
    if name not in SCHEDULERS:
        raise UserError(f"--scheduler {name!r} is not known{nearest(name, SCHEDULERS)} Known: {', '.join(SCHEDULERS)}.")
    if decay_shape not in DECAY_SHAPES:
        raise UserError(f"--decay_shape {decay_shape!r} is not known{nearest(decay_shape, DECAY_SHAPES)} Known: {', '.join(DECAY_SHAPES)}.")
    if name == "constant":
        warmup_steps = 0
    if warmup_steps > total_steps:
        raise UserError(f"Warm-up of {warmup_steps} steps is longer than the run of {total_steps} steps. Lower --warmup_steps.")
    decay_steps = total_steps - warmup_steps
    if name == "wsd":
        decay_steps = min(decay_steps, max(1, round(decay_ratio * total_steps)))
    length = max(decay_steps, 1)
    falls = decay_shape if name == "wsd" else name
    timescale = warmup_steps or TIMESCALE_WITHOUT_WARMUP

    def shape(step: jax.Array, done: jax.Array) -> jax.Array:
        if falls == "cosine_with_restarts":
            # the product is whole, so that a restart is not missed by a rounding; and there is none at the very end
            cycle = jnp.where(step < total_steps, jnp.maximum(step - warmup_steps, 0) * num_cycles % length / length, 1.0)
            return (1 + jnp.cos(jnp.pi * cycle)) / 2
        if falls == "inverse_sqrt":
            return jnp.sqrt(timescale / (timescale + jnp.maximum(step - warmup_steps, 0)))
        shapes = {"cosine": (1 + jnp.cos(jnp.pi * done)) / 2, "linear": 1 - done, "sqrt": 1 - jnp.sqrt(done), "polynomial": (1 - done) ** power}
        return shapes.get(falls, jnp.ones_like(done))

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum((step + 1) / (warmup_steps + 1), 1.0)
        done = jnp.clip((step - (total_steps - decay_steps)) / length, 0.0, 1.0)
        least = 0.0 if name == "inverse_sqrt" else min_ratio
        return peak * rise * (least + (1 - least) * shape(step, done))

    return rate


def decay_end(decay_from: int, decay_ratio: float) -> int:
    """Steps of a run that decays from step `decay_from` on, for `decay_ratio` of all its steps.

    >>> decay_end(800, 0.2)
    1000
    """
    return max(decay_from + 1, round(decay_from / (1 - decay_ratio)))


def configured_schedule(options: OptimizerOptions, total_steps: int) -> optax.Schedule:
    """The schedule that resolved options describe, for a run of `total_steps`.

    With `--decay_from` it is that of the run which decays, and counts steps as the run that it comes from.

    Raises:
        UserError: warm-up longer than the run.
    """
    assert options.lr is not None
    if options.decay_from is not None:
        ratio = (total_steps - options.decay_from) / total_steps
        return build_schedule("wsd", options.lr, total_steps, 0, options.min_lr_ratio, decay_ratio=ratio, decay_shape=options.decay_shape)
    return build_schedule(
        options.scheduler,
        options.lr,
        total_steps,
        warmup_length(total_steps, options.warmup_steps, options.warmup_ratio),
        options.min_lr_ratio,
        num_cycles=options.num_cycles,
        power=options.power,
        decay_ratio=options.decay_ratio,
        decay_shape=options.decay_shape,
    )


# --------------------------------------------------------------------------------------------------------------------- plateau


@dataclass
class Plateau:
    """Lowers the learning rate when a metric gets no better: torch's `ReduceLROnPlateau` with a relative threshold.

    All of its state is in its fields, so `Plateau(**json.loads(json.dumps(asdict(plateau))))` goes on as if nothing had been.

    Attributes:
        factor: what the scale is multiplied by.
        patience: updates in a row without a better value that are borne.
        cooldown: updates after a reduction that do not count as bad.
        threshold: relative change that counts as better.
        min_scale: the scale never goes below it.
        greater_is_better: of the metric.
        scale: what the schedule's rate is multiplied by.
        best: value so far; None before the first.
        num_bad: updates in a row without a better value.
        cooling: updates of the cool-down that are left.
    """

    factor: float = 0.5
    patience: int = 2
    cooldown: int = 0
    threshold: float = 1e-4
    min_scale: float = 0.0
    greater_is_better: bool = False
    scale: float = 1.0
    best: float | None = None
    num_bad: int = 0
    cooling: int = 0

    def update(self, metric: float) -> float:
        """Take note of one evaluation's value; the scale from now on. A value that is not finite is no better than any."""
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
        return metric > self.best * (1 + self.threshold) if self.greater_is_better else metric < self.best * (1 - self.threshold)


def configured_plateau(options: OptimizerOptions, greater_is_better: bool = False) -> Plateau | None:
    """The rule that resolved options describe, at its beginning; None where the scheduler is another.

    `--min_lr_ratio` is the floor of the scale.
    """
    if options.scheduler != "plateau":
        return None
    return Plateau(
        options.plateau_factor, options.plateau_patience, options.plateau_cooldown, options.plateau_threshold, options.min_lr_ratio, greater_is_better
    )


# --------------------------------------------------------------------------------------------------------------------- drawing


def draw_schedule(schedule: optax.Schedule, total_steps: int, width: int = 64, height: int = 10) -> str:
    """The rates of a run as a chart of text, `height` lines and an axis, each at most `width` + 11 columns.

    >>> print(draw_schedule(build_schedule("linear", 1e-3, 100, 0, 0.0), 100, width=10, height=3))
        0.001 ┤█▆▃▁
              │████▆▄▂
            0 ┤███████▇▅▃
              └──────────
               0      100
    """
    steps = np.round(np.linspace(0, max(total_steps - 1, 0), 32 * width)).astype(int)
    rates = (np.asarray(jax.device_get(schedule(steps)), np.float64) * np.ones(steps.shape)).reshape(width, -1).max(axis=1)
    top = max(float(rates.max()), 1e-300)
    eighths = np.round(rates / top * height * 8).astype(int)
    return "\n".join([*bars(eighths, height, f"{top:.3g}", "0"), " " * 11 + "0" + f"{total_steps:,}".rjust(width - 1)])


def write_schedule_plot(schedule: optax.Schedule, total_steps: int, path: Path) -> None:
    """Draw the rates of a run over its steps as a PNG.

    Raises:
        OSError: `path` cannot be written.
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

    path.write_bytes(png(3.2, draw))
