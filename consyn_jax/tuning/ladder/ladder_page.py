"""The HTML page of a ladder: loss against compute, predictions, and critical batch size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from consyn_jax.pages import escape, html_page
from consyn_jax.training.logging.charts import CHART_STYLE
from consyn_jax.training.logging.formats import compact, decimals
from consyn_jax.tuning.ladder.ladder_results import (
    BEST_HEAD,
    NEXT,
    POINT_HEAD,
    PREDICTION_HEAD,
    LadderResults,
    best_row,
    between,
    command,
    law_text,
    point_rows,
    prediction_row,
)

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 320, 64, 16, 12, 40
STEPS = 60  # points of a curve
BEYOND = 10.0  # the chart ends at this multiple of the largest run's FLOPs


@dataclass(frozen=True)
class Marker:
    """A measurement in a chart."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Curve:
    """A fitted curve in a chart; `look` is the CSS class of its line."""

    points: Sequence[tuple[float, float]]
    look: str


def ladder_page(results: LadderResults, title: str, doubts: Sequence[str]) -> str:
    """Make the page.

    Args:
        doubts: sentences about the limits of the predictions.
    """
    said = "".join(f"<p class='plain'>{escape(sentence)}</p>" for sentence in doubts)
    best = ""
    if results.best:
        commands = escape("\n".join(map(command, results.best)))
        head = "<h2>Best size for a budget</h2>"
        rows = _table(BEST_HEAD, map(best_row, results.best))
        best = (
            f"<section>{head}{rows}<p class='plain'>{escape(NEXT)}</p><pre>{commands}</pre>"
            "</section>"
        )
    sections = [
        _tiles(results),
        said,
        f"<section><h2>Loss</h2>{_losses(results)}<p class='plain'>"
        f"{escape(law_text(results.forecast))}</p></section>",
        "<section><h2>Predictions</h2>"
        + _table(PREDICTION_HEAD, map(prediction_row, results.predicted))
        + "</section>",
        best,
        _batches(results),
        f"<section><h2>Runs</h2>{_table(POINT_HEAD, point_rows(results))}</section>",
    ]
    return html_page(title, CHART_STYLE + STYLE, "\n".join(filter(None, sections)), "ladder.json")


def _tiles(results: LadderResults) -> str:
    forecast = results.forecast
    tiles = [
        (
            f"{found.target.name}, {compact(found.tokens)} tokens",
            decimals(found.loss),
            between(found.interval),
        )
        for found in results.predicted[:3]
    ]
    tiles.append(
        ("median error of the fit", f"{forecast.error:.2%}", f"{len(forecast.points)} runs")
    )
    cells = "".join(
        f"<div><span>{escape(name)}</span><b>{escape(text)}</b><small>{escape(more)}</small></div>"
        for name, text, more in tiles
    )
    return f"<section class='tiles'>{cells}</section>"


def _losses(results: LadderResults) -> str:
    """Draw loss against compute: the runs, a fitted curve per size, and the lowest loss."""
    forecast, law = results.forecast, results.forecast.law
    markers = [
        Marker(
            p.tokens * results.flops[p.parameters],
            p.loss,
            f"{p.parameters:,.0f} parameters, {compact(p.tokens)} tokens: {decimals(p.loss)}",
        )
        for p in forecast.points
    ]
    low, high = min(m.x for m in markers), BEYOND * max(m.x for m in markers)
    budgets = np.geomspace(low, high, STEPS)
    curves = [
        Curve([(x, float(law.loss(size, x / cost))) for x in budgets], "raw")
        for size, cost in results.flops.items()
    ]
    frontier = [(float(x), float(forecast.lowest(x))) for x in budgets]
    curves.append(Curve(frontier, "eval"))
    legend = [("raw", "one size, fitted"), ("eval", "the best size"), ("best", "runs")]
    return _chart("eval/loss by FLOPs", markers, curves, legend, decimals, is_log_y=False)


def _batches(results: LadderResults) -> str:
    forecast, law = results.forecast, results.forecast.batch
    if law is None:
        return ""
    markers = [
        Marker(b.tokens, b.scale, f"{b.parameters:,.0f} parameters: {compact(b.scale)} tokens")
        for b in forecast.batches
    ]
    places = np.geomspace(min(m.x for m in markers), BEYOND * max(m.x for m in markers), STEPS)
    curves = [Curve([(float(x), law.tokens(float(x))) for x in places], "eval")]
    legend = [("eval", "fitted"), ("best", "measured")]
    chart = _chart("critical batch size against training tokens", markers, curves, legend, compact)
    note = (
        "The critical batch size is measured as the gradient's simple noise scale. Below it, "
        "doubling the batch nearly halves the number of steps; above it, more tokens per step "
        "hardly help."
    )
    return f"<section><h2>Critical batch</h2>{chart}<p class='plain'>{note}</p></section>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    heads = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>" for cells in rows
    )
    return (
        f"<div class='wide'><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table>"
        "</div>"
    )


# ------------------------------------------------------------------------------------------- charts


@dataclass(frozen=True)
class _Axis:
    """Maps values in `low` .. `high` to pixels in `start` .. `end`."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool

    def place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return round(self.start + (self.end - self.start) * (value - low) / (high - low), 1)

    def ticks(self) -> list[float]:
        if not self.is_log:
            return [float(v) for v in np.linspace(self.low, self.high, 7)[1:-1]]
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found = [f * 10.0**p for p, f in itertools.product(powers, (1, 2, 5))]
        inside = [v for v in found if self.low <= v <= self.high]
        return inside if len(inside) <= 8 else [v for v in inside if f"{v:.0e}"[0] == "1"]


def _chart(
    title: str,
    markers: Sequence[Marker],
    curves: Sequence[Curve],
    legend: Sequence[tuple[str, str]],
    text: Callable[[float], str],
    is_log_y: bool = True,
) -> str:
    """Draw measurements and curves over a logarithmic axis."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [*(m.y for m in markers), *(curve.points[-1][1] for curve in curves)]
    if is_log_y:
        low, high = min(ys) / 1.2, max(ys) * 1.2
    else:
        margin = 0.05 * (max(ys) - min(ys)) or 0.01
        low, high = min(ys) - margin, max(ys) + margin
    x_axis = _Axis(min(xs), max(xs), LEFT, right, True)
    y_axis = _Axis(low, high, bottom, TOP, is_log_y)
    named = "".join(f'<span class="{look}">{escape(name)}</span>' for look, name in legend)
    parts = [
        f"<h3>{escape(title)}<span class='legend'>{named}</span></h3>",
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title>",
        *_grid(x_axis, y_axis, text),
    ]
    for curve in curves:
        shown = [(x, y) for x, y in curve.points if low <= y <= high]
        path = "L".join(f"{x_axis.place(x)} {y_axis.place(y)}" for x, y in shown)
        parts.append(f'<path class="{curve.look}" d="M{path}"/>' if shown else "")
    for marker in markers:
        place = f'cx="{x_axis.place(marker.x)}" cy="{y_axis.place(marker.y)}"'
        name = f"<title>{escape(marker.title)}</title>"
        parts.append(f'<circle class="best" {place} r="4">{name}</circle>')
    return "".join([*parts, "</svg>"])


def _grid(x_axis: _Axis, y_axis: _Axis, text: Callable[[float], str]) -> Iterable[str]:
    bottom = HEIGHT - BOTTOM
    for value in y_axis.ticks():
        at = y_axis.place(value)
        yield f'<path class="grid" d="M{LEFT} {at}H{WIDTH - RIGHT}"/>'
        yield f'<text x="{LEFT - 8}" y="{at + 4}" text-anchor="end">{text(value)}</text>'
    for value in x_axis.ticks():
        at = x_axis.place(value)
        name = compact(value) if value < 1e12 else f"{value:.0e}"
        yield f'<path class="grid" d="M{at} {TOP}V{bottom}"/>'
        yield f'<text x="{at}" y="{bottom + 17}" text-anchor="middle">{name}</text>'


STYLE = """
.plain { color: var(--soft); font-size: 12.5px; }
"""
