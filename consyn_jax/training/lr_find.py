"""The learning-rate range test (Smith, 2017): a short run at rising rates, and the peak rate that the curve of its losses suggests."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from consyn_jax.training.drawing import bars, png

State = TypeVar("State")
Batch = TypeVar("Batch")
Curve = list[tuple[float, float]]  # (learning rate, loss in nats a token) of each step

NUM_STEPS = 200
# From rates that change nothing to rates at which nothing trains, by the size of a rule's steps: seven decades each.
_ENDS = {"lion": (1e-8, 0.1), "sgd": (1e-5, 100.0)}
_USUAL_ENDS = (1e-7, 1.0)

FEWEST_STEPS = 20  # with fewer there is no curve
LEVEL_SHARE = 0.1  # of the steps, at the beginning: their median is the loss before training
DIVERGED = 1.25  # times the loss before training
AVERAGE = 0.9  # weight of the past in the running mean that ends the test
WIDTH = 1 / 40  # standard deviation of the smoothing kernel, as a share of the steps
SIGNIFICANT = 5.0  # a fall counts from so many standard errors on
LEAST_FALL = 1e-3  # and from this share of the loss before training
RULES = {
    "valley": "midway between the next two, in the logarithm",
    "steepest": "where the loss falls fastest",
    "lowest": "where the loss is lowest",
    "lowest / 10": "a tenth of that",
}
CHOSEN = "valley"


# -------------------------------------------------------------------------------------------------------------------- the test


def rising_rates(optimizer: str, num_steps: int = NUM_STEPS) -> Float[np.ndarray, " steps"]:
    """Rates that rise by one factor from step to step, over the decades that matter to `optimizer`.

    >>> rising_rates("adamw", 8).round(7).tolist()
    [1e-07, 1e-06, 1e-05, 0.0001, 0.001, 0.01, 0.1, 1.0]
    """
    return np.geomspace(*_ENDS.get(optimizer, _USUAL_ENDS), num_steps)


def rising_schedule(rates: Float[np.ndarray, " steps"]) -> optax.Schedule:
    """The schedule that has `rates[i]` at step i."""
    table = np.asarray(rates, np.float32)
    return lambda step: jnp.asarray(table)[jnp.minimum(step, len(table) - 1)]


def range_test(
    step: Callable[[State, Batch], tuple[State, dict[str, Any]]],
    state: State,
    batches: Iterable[Batch],
    rates: Float[np.ndarray, " steps"],
    on_step: Callable[[int, float], None] = lambda done, loss: None,
) -> Curve:
    """Train at rising rates until they or the batches end, or the loss has diverged.

    It has diverged when it or the gradient is not finite, or when its running mean is a quarter above what it was before training:
    then nothing of what was learned is left. A multiple of the best loss, such as fastai's four, says less where losses are in nats and
    a short run from ln V ends above half of that.

    Args:
        step: a compiled train step whose optimizer has `rising_schedule(rates)`.
        state: step 0; the train step takes it over.
        on_step: told of each step the steps so far and the loss.

    Returns:
        The rate and the loss of every step; the loss of the last is NaN where it or the gradient was not finite.
    """
    curve: Curve = []
    mean = 0.0
    for batch in batches:
        state, metrics = step(state, batch)
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        loss = values["loss"] if math.isfinite(values["grad_norm"]) else math.nan
        if values.get("skipped") and values["loss_scale"] > 1 and math.isfinite(values["loss"]):
            continue  # float16: the scale of the loss was too large for a gradient, and the next step has this rate again
        curve.append((float(rates[len(curve)]), loss))
        on_step(len(curve), loss)
        mean = AVERAGE * mean + (1 - AVERAGE) * loss
        corrected = mean / (1 - AVERAGE ** len(curve))
        settled = _num_settled(len(rates))
        diverged = len(curve) > settled and corrected > DIVERGED * float(np.median([loss for _, loss in curve[:settled]]))
        if len(curve) == len(rates) or not math.isfinite(loss) or diverged:
            break
    return curve


def _num_settled(num_steps: int) -> int:
    """Steps at the beginning whose rates are too low to change the loss."""
    return max(FEWEST_STEPS // 4, round(LEVEL_SHARE * num_steps))


# -------------------------------------------------------------------------------------------------------------- the suggestion


@dataclass(frozen=True)
class Suggestion:
    """What a range test comes to.

    Attributes:
        rate: the suggested peak rate; None where no rate made the loss fall.
        rule: where it comes from, a key of `candidates`.
        candidates: the rate by each of `RULES`.
        reason: a sentence for people.
        smoothed: the losses without their noise, as far as they are finite.
    """

    rate: float | None
    reason: str
    rule: str | None = None
    candidates: dict[str, float] = field(default_factory=dict)
    smoothed: list[float] = field(default_factory=list)


def suggest(curve: Curve) -> Suggestion:
    """The peak learning rate that a curve of losses over rising rates suggests.

    Losses are smoothed by a symmetric kernel over the steps: a running mean would lag, and move every rate up. The rules look at the
    part up to the lowest smoothed loss. The slope is that over the logarithm of the rate, and the steepest descent what Lightning
    suggests; a tenth of the rate of the lowest loss is fastai's first rule. Both are several times too low for a run from random
    weights, where the steepest part is the learning of which tokens are frequent. The valley is fastai's later rule, midway along the
    descent, here from where it is steepest: theirs begins where the curve begins, so that their rate moves with the first one tried.

    Args:
        curve: of rates that rise by one factor from step to step; only the last loss may be other than finite.
    """
    whole = all(math.isfinite(loss) for _, loss in curve)
    x, y = _arrays(curve if whole else curve[:-1])
    length = len(y)
    if length < FEWEST_STEPS:
        return Suggestion(None, f"The test ended after {length} steps with a finite loss, and a curve needs {FEWEST_STEPS}.", smoothed=y.tolist())
    before = float(np.median(y[: _num_settled(length)]))
    width = WIDTH * length
    smoothed = _smooth(np.minimum(y, DIVERGED * before), width)
    lowest = int(np.argmin(smoothed))
    fall = before - float(smoothed[lowest])
    if lowest < _num_settled(length) or fall < max(SIGNIFICANT * _standard_error(y[: lowest + 1], width), LEAST_FALL * before):
        return Suggestion(None, f"No rate up to {10 ** x[-1]:.2g} made the loss fall by more than its noise.", smoothed=smoothed.tolist())
    steepest = int(np.argmin(np.gradient(smoothed, x)[: lowest + 1]))
    middle = 10 ** ((x[steepest] + x[lowest]) / 2)
    found = {"valley": middle, "steepest": 10 ** x[steepest], "lowest": 10 ** x[lowest], "lowest / 10": 10 ** (x[lowest] - 1)}
    candidates = {rule: float(f"{rate:.2g}") for rule, rate in found.items()}
    ends = lowest >= length - 1 - width and whole
    reason = f"The loss fell from {before:.3f} to {smoothed[lowest]:.3f} nats, fastest at {candidates['steepest']:g} and until {candidates['lowest']:g}"
    reason += ", where the test ended, so higher rates may be good as well." if ends else "."
    return Suggestion(candidates[CHOSEN], reason, CHOSEN, candidates, smoothed.tolist())


def _arrays(curve: Curve) -> tuple[Float[np.ndarray, " steps"], Float[np.ndarray, " steps"]]:
    """Decimal logarithms of the rates, and the losses."""
    rates, losses = np.asarray(curve, np.float64).reshape(-1, 2).T
    return np.log10(rates), losses


def _smooth(y: Float[np.ndarray, " steps"], width: float) -> Float[np.ndarray, " steps"]:
    """Weighted means with a Gaussian of that standard deviation, in steps; at the ends of what there is."""
    distance = np.subtract.outer(np.arange(len(y)), np.arange(len(y))) / width
    weights = np.exp(-(distance**2) / 2)
    return weights @ y / weights.sum(axis=1)


def _standard_error(y: Float[np.ndarray, " steps"], width: float) -> float:
    """Of a smoothed loss; outliers and the trend do not count."""
    jumps = np.diff(y)
    noise = 1.4826 * float(np.median(np.abs(jumps - np.median(jumps)))) / math.sqrt(2)
    return noise / math.sqrt(2 * math.sqrt(math.pi) * width)


# -------------------------------------------------------------------------------------------------------------------- showing


def draw_curve(curve: Curve, suggestion: Suggestion, width: int = 64, height: int = 10) -> str:
    """The smoothed losses over the logarithm of the rate as a chart of text, at most `width` + 11 columns, and the rates by rule."""
    lines = []
    if suggestion.smoothed:
        x = _arrays(curve)[0][: len(suggestion.smoothed)]
        y = np.interp(np.linspace(x[0], x[-1], width), x, suggestion.smoothed)
        bottom, top = float(y.min()), float(y.max())
        eighths = 1 + np.round((y - bottom) / max(top - bottom, 1e-9) * (8 * height - 1)).astype(int)
        lines += bars(eighths, height, f"{top:.3f}", f"{bottom:.3f}")
        first, last = f"{10 ** x[0]:.2g}", f"{10 ** x[-1]:.2g}"
        lines.append(" " * 11 + first + last.rjust(width - len(first)))
        if suggestion.rate is not None:
            column = round((math.log10(suggestion.rate) - x[0]) / (x[-1] - x[0]) * (width - 1))
            mark = f"▲ {suggestion.rate:g}"
            lines.append(" " * (11 + column) + mark if column + len(mark) <= width else f"{suggestion.rate:g} ▲".rjust(11 + column + 1))
        lines.append("")
    lines += [f"{rule:<11}  {rate:>8g}  {RULES[rule]}{'  <- suggested' if rule == suggestion.rule else ''}" for rule, rate in suggestion.candidates.items()]
    lines.append(suggestion.reason + ("" if suggestion.rate is None else f" Suggested: --lr {suggestion.rate:g}"))
    return "\n".join(lines)


def write_results(directory: Path, curve: Curve, suggestion: Suggestion) -> None:
    """Write `lr_find.json` (suggestion and curve; a loss that is not finite is null) and `lr_find.png`, and make the directory if need be.

    Raises:
        OSError: it cannot be written.
    """
    losses = [loss if math.isfinite(loss) else None for _, loss in curve]
    record: dict[str, Any] = asdict(suggestion) | {"rates": [rate for rate, _ in curve], "losses": losses}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "lr_find.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (directory / "lr_find.png").write_bytes(_picture(curve, suggestion))


def _picture(curve: Curve, suggestion: Suggestion) -> bytes:
    """A PNG of the losses, the smoothed losses and the rates by rule."""
    rates, losses = [rate for rate, _ in curve], [loss for _, loss in curve]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.plot(rates, losses, color="#3b6fb6", alpha=0.35, linewidth=0.9, label="loss")
        axes.plot(rates[: len(suggestion.smoothed)], suggestion.smoothed, color="#3b6fb6", linewidth=1.9, label="smoothed")
        for rule, rate in suggestion.candidates.items():
            chosen = rule == suggestion.rule
            axes.axvline(rate, color="#2f8f5b" if chosen else "#5f6772", linewidth=1.8 if chosen else 1.0, linestyle="-" if chosen else ":")
            axes.annotate(f" {rule} {rate:g}", (rate, 0.98), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right", fontsize=8)
        if suggestion.smoothed:
            low, high = min(suggestion.smoothed), max(suggestion.smoothed)
            margin = 0.08 * (high - low) or 0.1
            axes.set_ylim(low - margin, high + margin)
        axes.set_xlabel("learning rate")
        axes.set_ylabel("loss (nats per token)")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left")

    return png(4.2, draw)
