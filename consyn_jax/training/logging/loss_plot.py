"""Draw `loss.png`: losses and learning rate over the number of training tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consyn_jax.files import write_whole
from consyn_jax.training.logging.curves import (
    Metrics,
    Point,
    best,
    curve,
    loss_limits,
    smooth,
    thin,
)
from consyn_jax.training.logging.plots import png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, GREY = "#3b6fb6", "#d9731a", "#2f8f5b", "#5f6772"
POINTS = 1000  # buckets of a drawn line


def write_loss_plot(metrics: Metrics, path: Path) -> None:
    """Draw training loss, evaluation loss and learning rate over tokens as a PNG.

    Args:
        metrics: lines of `metrics.jsonl`; there may be none.

    Raises:
        OSError: `path` cannot be written.
    """
    train, evaluation = curve(metrics, "train/loss"), curve(metrics, "eval/loss")
    rate = curve(metrics, "train/learning_rate")

    def draw(figure: Any) -> None:
        if rate:
            upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [4, 1]})
            dots = "" if len(rate) > 1 else "o"
            _plot(lower, rate, color=GREY, linewidth=1.4, marker=dots, markersize=3)
            lower.set_ylabel("learning rate", color=GREY)
            lower.set_ylim(bottom=0)
            lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
        else:
            upper = lower = figure.subplots()
        if train or evaluation:
            _draw_losses(upper, train, evaluation)
        else:
            place = {"ha": "center", "va": "center", "transform": upper.transAxes}
            upper.text(0.5, 0.5, "no finite loss was logged", color=GREY, **place)
        points = [*train, *evaluation, *rate]
        _draw_axes(upper, lower, max(points, key=lambda point: point.tokens, default=None))
        figure.align_ylabels([upper, lower])

    write_whole(path, png(5.6 if rate else 4.8, draw))


def _plot(axes: Axes, points: Sequence[Point], **style: Any) -> None:
    axes.plot([p.tokens for p in points], [p.value for p in points], **style)


def _draw_losses(axes: Axes, train: Sequence[Point], evaluation: Sequence[Point]) -> None:
    if train:
        dots = "o" if len(train) < 20 else ""
        look = {"color": BLUE, "alpha": 0.3, "linewidth": 0.9, "marker": dots, "markersize": 3}
        _plot(axes, thin(train, POINTS), label="train", **look)
    if len(train) > 1:
        smoothed = thin(smooth(train), POINTS)
        _plot(axes, smoothed, label="train, smoothed", color=BLUE, linewidth=1.9)
    lowest = best(evaluation)
    if lowest is not None:
        look = {"color": ORANGE, "linewidth": 1.4, "marker": "o", "markersize": 4.5}
        _plot(axes, evaluation, label="eval", **look)
        label = f"best: {lowest.value:.4f} at step {lowest.step:,}"
        star = {"marker": "*", "markersize": 15, "markeredgecolor": "white", "markeredgewidth": 0.8}
        _plot(axes, [lowest], label=label, linestyle="", color=GREEN, zorder=5, **star)
    axes.set_ylim(*loss_limits(train, evaluation))
    axes.legend(loc="upper right", facecolor="white", edgecolor="none", framealpha=0.9)


def _draw_axes(upper: Axes, lower: Axes, last: Point | None) -> None:
    from matplotlib.ticker import EngFormatter

    for axes in {upper, lower}:
        axes.grid(True, color="#e3e6ea", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#b8bec6")
        axes.tick_params(colors=GREY)
    upper.set_ylabel("loss (nats per token)")
    lower.set_xlabel("tokens trained on")
    lower.xaxis.set_major_formatter(EngFormatter(sep=""))
    if last is None:
        upper.set_xticks([])
        upper.set_yticks([])
        return
    lower.set_xlim(0, 1.015 * last.tokens or 1)
    if last.tokens:
        _draw_steps(upper, last.tokens / max(last.step, 1))


def _draw_steps(axes: Axes, tokens_per_step: float) -> None:
    """Add a step axis on top. It is exact only if all steps have the same number of tokens."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    steps = axes.secondary_xaxis(
        "top",
        functions=(
            lambda x: np.divide(x, tokens_per_step),
            lambda x: np.multiply(x, tokens_per_step),
        ),
    )
    steps.set_xlabel("steps", color=GREY)
    steps.xaxis.set_major_locator(MaxNLocator(integer=True))
    steps.xaxis.set_major_formatter("{x:,.0f}")
    steps.tick_params(colors=GREY)
    steps.spines["top"].set_visible(False)
