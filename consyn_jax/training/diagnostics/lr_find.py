"""The learning-rate range test (Smith, 2017).

A short run with a rising learning rate gives a curve of losses, from which a peak rate is chosen.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Float

from consyn_jax.config import OptimizerOptions
from consyn_jax.data.loader import prefetch
from consyn_jax.distributed.mesh import local_rows, placer
from consyn_jax.errors import UserError
from consyn_jax.files import write_whole
from consyn_jax.optimizer_config import OPTIMIZERS
from consyn_jax.training.inputs.batch_source import BatchSource
from consyn_jax.training.logging.plots import bars, png
from consyn_jax.training.program import TRAIN_AXES
from consyn_jax.training.step import Batch, TrainState

AnyState = TypeVar("AnyState")
AnyBatch = TypeVar("AnyBatch")
Curve = list[tuple[float, float]]  # (learning rate, loss in nats per token) of each step

NUM_STEPS = 200

FEWEST_STEPS = 20  # fewer steps are too few for a suggestion
LEVEL_SHARE = 0.1  # the median loss of this share of first steps is "the loss before training"
DIVERGED = 1.25  # a mean loss above this multiple of the loss before training has diverged
AVERAGE = 0.9  # weight of earlier losses in the running mean that is compared with DIVERGED
WIDTH = 1 / 40  # standard deviation of the smoothing kernel, as a share of the steps
SIGNIFICANT = 5.0  # standard errors that a fall must exceed
LEAST_FALL = 1e-3  # share of the loss before training that a fall must exceed
RULES = {
    "valley": "midway between steepest and lowest, on a log scale",
    "steepest": "where the loss falls fastest",
    "lowest": "where the loss is lowest",
    "lowest / 10": "a tenth of lowest",
}
CHOSEN = "valley"


# ----------------------------------------------------------------------------------------- the test


def check_beginning(options: OptimizerOptions) -> None:
    """Check that the run starts at step 0.

    Raises:
        UserError: --decay_from is given.
    """
    if options.decay_from is not None:
        raise UserError(
            "--lr_find starts at the beginning of a run, but --decay_from starts in the middle. "
            "Leave one of the two flags out."
        )


def rising_rates(optimizer: str, num_steps: int = NUM_STEPS) -> Float[np.ndarray, " steps"]:
    """Return rates that rise by a constant factor over the range that suits `optimizer`.

    >>> rising_rates("adamw", 8).round(7).tolist()
    [1e-07, 1e-06, 1e-05, 0.0001, 0.001, 0.01, 0.1, 1.0]
    """
    return np.geomspace(*OPTIMIZERS[optimizer].lr_range, num_steps)


def rising_schedule(rates: Float[np.ndarray, " steps"]) -> optax.Schedule:
    """Make a schedule with the rate `rates[i]` at step i."""
    table = np.asarray(rates, np.float32)
    return lambda step: jnp.asarray(table)[jnp.minimum(step, len(table) - 1)]


def range_test(
    step: Callable[[AnyState, AnyBatch], tuple[AnyState, dict[str, Any]]],
    state: AnyState,
    batches: Iterable[AnyBatch],
    rates: Float[np.ndarray, " steps"],
    on_step: Callable[[int, float], None] = lambda done, loss: None,
) -> Curve:
    """Train with rising rates until the rates or the batches are used up, or the loss diverges.

    The loss has diverged if it or the gradient is not finite. It has also diverged if its running
    mean exceeds 1.25 times the loss before training, because the model has then lost all that it
    learned. fastai stops at four times the best loss instead. For losses in nats, that would be too
    late: a short run starts at ln V and stays above half of ln V, so the threshold would be above
    2 ln V.

    Args:
        step: Compiled train step whose optimizer has the schedule `rising_schedule(rates)`.
        state: State before the first step, which is donated to the train step.
        on_step: Function that is called after each step with the number of steps and the loss.

    Returns:
        Rate and loss of every step. The last loss is NaN if the loss or the gradient was not
        finite.
    """
    curve: Curve = []
    mean = 0.0
    for batch in batches:
        state, metrics = step(state, batch)
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        loss = values["loss"] if math.isfinite(values["grad_norm"]) else math.nan
        if values.get("skipped") and values["loss_scale"] > 1 and math.isfinite(values["loss"]):
            continue  # float16: the loss scale was too large; the next step has this rate again
        curve.append((float(rates[len(curve)]), loss))
        on_step(len(curve), loss)
        mean = AVERAGE * mean + (1 - AVERAGE) * loss
        corrected = mean / (1 - AVERAGE ** len(curve))
        settled = _num_settled(len(rates))
        diverged = len(curve) > settled and corrected > DIVERGED * float(
            np.median([loss for _, loss in curve[:settled]])
        )
        if len(curve) == len(rates) or not math.isfinite(loss) or diverged:
            break
    return curve


def measure_curve(
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]],
    state: TrainState,
    source: BatchSource,
    shape: tuple[int, int, int],
    mesh: Mesh,
    rates: Float[np.ndarray, " steps"],
    show: Callable[[int, float, float], None],
) -> Curve:
    """Run the range test on the first batches of the training data, then close the data.

    Args:
        train_step, state, rates: Arguments of `range_test`.
        shape: Shape of a batch, (A, B, T).
        show: Function that is called after each step with the number of steps, the loss and
            tokens/s.
    """
    accumulation, batch_size, _ = shape
    batches = source.training(0, batch_size, accumulation, local_rows(mesh, batch_size))
    tokens, began = math.prod(shape), time.perf_counter()

    def on_step(done: int, loss: float) -> None:
        show(done, loss, done * tokens / (time.perf_counter() - began))

    with prefetch(batches, transform=placer(mesh, TRAIN_AXES)) as ready:
        try:
            return range_test(train_step, state, ready, rates, on_step)
        finally:
            source.close()


def _num_settled(num_steps: int) -> int:
    """Return how many steps at the start have a rate that is too low to change the loss."""
    return max(FEWEST_STEPS // 4, round(LEVEL_SHARE * num_steps))


# ----------------------------------------------------------------------------------- the suggestion


@dataclass(frozen=True)
class Suggestion:
    """The result of a range test.

    Attributes:
        rate: The suggested peak learning rate; None if no rate lowered the loss.
        reason: A sentence for the user.
        rule: The rule that suggests `rate`, a key of `candidates`.
        candidates: Learning rate that each of `RULES` suggests.
        smoothed: Smoothed losses. If the last loss is not finite, it is left out.
    """

    rate: float | None
    reason: str
    rule: str | None = None
    candidates: dict[str, float] = field(default_factory=dict)
    smoothed: list[float] = field(default_factory=list)


def suggest(curve: Curve) -> Suggestion:
    """Suggest a peak learning rate, from the losses at rising rates.

    The losses are smoothed with a symmetric kernel over the steps, because a running mean would lag
    and shift every suggestion up. The rules use the curve up to its lowest point, and slopes with
    respect to the logarithm of the rate:

    - "steepest", as in Lightning: the rate at which the loss falls fastest.
    - "lowest / 10", fastai's first rule: a tenth of the rate with the lowest loss.
    - "valley", fastai's later rule: a rate midway along the descent. Here, the descent begins where
      it is steepest. In fastai it begins at the start of the curve, which makes the result depend
      on the first rate that was tried.

    The first two rules suggest rates that are several times too low for a model with random
    weights, in which the loss falls fastest while the model learns which tokens are frequent.

    Args:
        curve: Rates, which rise by a constant factor, and losses; only the last loss may be
            non-finite.
    """
    is_finite = all(math.isfinite(loss) for _, loss in curve)
    x, y = _arrays(curve if is_finite else curve[:-1])
    length = len(y)
    if length < FEWEST_STEPS:
        reason = (
            f"The test ended after {length} steps with a finite loss, but a suggestion needs at "
            f"least {FEWEST_STEPS}."
        )
        return Suggestion(None, reason, smoothed=y.tolist())
    before, width = float(np.median(y[: _num_settled(length)])), WIDTH * length
    smoothed = _smooth(np.minimum(y, DIVERGED * before), width)
    lowest = int(np.argmin(smoothed))
    fall = before - float(smoothed[lowest])
    if lowest < _num_settled(length) or fall < max(
        SIGNIFICANT * _standard_error(y[: lowest + 1], width), LEAST_FALL * before
    ):
        reason = f"No rate up to {10 ** x[-1]:.2g} lowered the loss by more than its noise."
        return Suggestion(None, reason, smoothed=smoothed.tolist())
    candidates = _candidates(x, smoothed, lowest)
    reason = (
        f"The loss fell from {before:.3f} to {smoothed[lowest]:.3f} nats. It fell fastest at a "
        f"rate of {candidates['steepest']:g}, and was lowest at {candidates['lowest']:g}"
    )
    ends_there = is_finite and lowest >= length - 1 - width
    reason += ", where the test ended, so higher rates may be good, too." if ends_there else "."
    return Suggestion(candidates[CHOSEN], reason, CHOSEN, candidates, smoothed.tolist())


def _candidates(
    x: Float[np.ndarray, " steps"], smoothed: Float[np.ndarray, " steps"], lowest: int
) -> dict[str, float]:
    """Compute the learning rate that each of `RULES` suggests, rounded to two digits."""
    steepest = int(np.argmin(np.gradient(smoothed, x)[: lowest + 1]))
    rates = {
        "valley": 10 ** ((x[steepest] + x[lowest]) / 2),
        "steepest": 10 ** x[steepest],
        "lowest": 10 ** x[lowest],
        "lowest / 10": 10 ** (x[lowest] - 1),
    }
    return {rule: float(f"{rate:.2g}") for rule, rate in rates.items()}


def _arrays(curve: Curve) -> tuple[Float[np.ndarray, " steps"], Float[np.ndarray, " steps"]]:
    """Return the decimal logarithms of the rates, and the losses."""
    rates, losses = np.asarray(curve, np.float64).reshape(-1, 2).T
    return np.log10(rates), losses


def _smooth(y: Float[np.ndarray, " steps"], width: float) -> Float[np.ndarray, " steps"]:
    """Smooth with a Gaussian kernel whose standard deviation is `width` steps."""
    distance = np.subtract.outer(np.arange(len(y)), np.arange(len(y))) / width
    weights = np.exp(-(distance**2) / 2)
    return weights @ y / weights.sum(axis=1)


def _standard_error(y: Float[np.ndarray, " steps"], width: float) -> float:
    """Estimate the standard error of a smoothed loss; trends and outliers have little effect."""
    jumps = np.diff(y)
    noise = 1.4826 * float(np.median(np.abs(jumps - np.median(jumps)))) / math.sqrt(2)
    return noise / math.sqrt(2 * math.sqrt(math.pi) * width)


# ------------------------------------------------------------------------------------------ showing


def draw_curve(curve: Curve, suggestion: Suggestion, width: int = 64, height: int = 10) -> str:
    """Draw the smoothed losses as text, and list the rate that each rule suggests.

    The horizontal axis is the logarithm of the rate. A line has at most `width` + 11 columns.
    """
    lines = []
    if suggestion.smoothed:
        x = _arrays(curve)[0][: len(suggestion.smoothed)]
        y = np.interp(np.linspace(x[0], x[-1], width), x, suggestion.smoothed)
        bottom, top = float(y.min()), float(y.max())
        levels = (y - bottom) / max(top - bottom, 1e-9) * (8 * height - 1)
        lines += bars(1 + np.round(levels).astype(int), height, f"{top:.3f}", f"{bottom:.3f}")
        first, last = f"{10 ** x[0]:.2g}", f"{10 ** x[-1]:.2g}"
        lines.append(" " * 11 + first + last.rjust(width - len(first)))
        if suggestion.rate is not None:
            column = round((math.log10(suggestion.rate) - x[0]) / (x[-1] - x[0]) * (width - 1))
            mark = f"▲ {suggestion.rate:g}"
            lines.append(
                " " * (11 + column) + mark
                if column + len(mark) <= width
                else f"{suggestion.rate:g} ▲".rjust(11 + column + 1)
            )
        lines.append("")
    for rule, rate in suggestion.candidates.items():
        mark = "  <- suggested" if rule == suggestion.rule else ""
        lines.append(f"{rule:<11}  {rate:>8g}  {RULES[rule]}{mark}")
    suggested = "" if suggestion.rate is None else f" Suggested: --lr {suggestion.rate:g}"
    return "\n".join([*lines, suggestion.reason + suggested])


def write_results(directory: Path, curve: Curve, suggestion: Suggestion) -> None:
    """Write `lr_find.json` and `lr_find.png` to a directory, which is created if it does not exist.

    The JSON file has the suggestion and the curve; a non-finite loss is null.

    Raises:
        UserError: The directory cannot be written.
    """
    losses = [loss if math.isfinite(loss) else None for _, loss in curve]
    rates = [rate for rate, _ in curve]
    record: dict[str, Any] = asdict(suggestion) | {"rates": rates, "losses": losses}
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / "lr_find.json", text)
        write_whole(directory / "lr_find.png", _picture(curve, suggestion))
    except OSError as error:
        raise UserError(
            f"{directory / 'lr_find.json'} cannot be written: {error.strerror}. Name another "
            "--output."
        ) from error


def _picture(curve: Curve, suggestion: Suggestion) -> bytes:
    """Draw the losses, the smoothed losses and the rates of all rules as a PNG."""
    rates, losses = [rate for rate, _ in curve], [loss for _, loss in curve]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.plot(rates, losses, color="#3b6fb6", alpha=0.35, linewidth=0.9, label="loss")
        axes.plot(
            rates[: len(suggestion.smoothed)],
            suggestion.smoothed,
            color="#3b6fb6",
            linewidth=1.9,
            label="smoothed",
        )
        for rule, rate in suggestion.candidates.items():
            chosen = rule == suggestion.rule
            axes.axvline(
                rate,
                color="#2f8f5b" if chosen else "#5f6772",
                linewidth=1.8 if chosen else 1.0,
                linestyle="-" if chosen else ":",
            )
            axes.annotate(
                f" {rule} {rate:g}",
                (rate, 0.98),
                xycoords=("data", "axes fraction"),
                rotation=90,
                va="top",
                ha="right",
                fontsize=8,
            )
        if suggestion.smoothed:
            low, high = min(suggestion.smoothed), max(suggestion.smoothed)
            margin = 0.08 * (high - low) or 0.1
            axes.set_ylim(low - margin, high + margin)
        axes.set_xlabel("learning rate")
        axes.set_ylabel("loss (nats per token)")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left")

    return png(4.2, draw)
