"""The charts of a run, as static SVG and as JSON points for the script of the page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from consyn_jax.pages import escape
from consyn_jax.training.logging.charts import Line, chart
from consyn_jax.training.logging.curves import Point, best, loss_limits, thin
from consyn_jax.training.logging.live.activities import ACTIVITIES, key
from consyn_jax.training.logging.live.history import History

STATIC_BUCKETS = 300  # per curve in the static SVG; the script draws all stored points
OTHER_CURVES = {
    "train/learning_rate": ("Learning rate", "rate"),
    "train/grad_norm": ("Gradient norm, before clipping", "rate"),
    "throughput/tokens_per_s": ("Tokens per second", "count"),
    "throughput/mfu": ("Model FLOP/s utilisation (MFU)", "share"),
    "memory/peak_bytes": ("Peak memory of a device", "bytes"),
}
NOT_DRAWN = {"eval/loss", "eval/perplexity", "eval/bits_per_byte", "eval/tokens"}
MOST_EVALUATION_CHARTS = 12
MOST_DOTS = 40  # points of a curve that are drawn as dots; more dots would hide the line


@dataclass(frozen=True)
class RunChart:
    """One chart.

    Attributes:
        unit: number format of the values, named as in the script of the page.
        limits: the range of the y axis before a zoom; None for the range of the data.
        kind: "lines", or "stack" for stacked shares of time.
    """

    title: str
    unit: str
    lines: Sequence[Line]
    height: int = 170
    limits: tuple[float, float] | None = None
    kind: str = "lines"


def run_charts(history: History) -> list[RunChart]:
    """Make all charts for which the history has points, except the chart of activities."""
    return [*_loss(history), *_evaluations(history), *_others(history)]


def _loss(history: History) -> Iterator[RunChart]:
    train, evaluation = history.points("train/loss"), history.points("eval/loss")
    if not train and not evaluation:
        return
    lowest = best(evaluation)
    smoothed = history.curves["train/loss"].smooth() if len(train) > 1 else []
    lines = [
        Line(train, "raw", "train", dots=len(train) == 1),
        Line(smoothed, "train", "train, smoothed"),
        Line(evaluation, "eval", "eval", dots=len(evaluation) <= MOST_DOTS),
        Line([lowest] if lowest else [], "best", "best", dots=True),
    ]
    limits = loss_limits(train, evaluation)
    yield RunChart("Loss, nats per token", "number", lines, 300, limits)


def _evaluations(history: History) -> Iterator[RunChart]:
    names = [n for n in history.curves if n.startswith("eval/") and n not in NOT_DRAWN]
    for name in names[:MOST_EVALUATION_CHARTS]:
        points = history.points(name)
        if len(points) > 1:
            title = f"Evaluation: {name.removeprefix('eval/')}"
            lines = [Line(points, "eval", "eval", dots=len(points) <= MOST_DOTS)]
            yield RunChart(title, "rate", lines, limits=_from_zero(points))


def _others(history: History) -> Iterator[RunChart]:
    for name, (title, unit) in OTHER_CURVES.items():
        points = history.points(name)
        if len(points) > 1:
            lines = [Line(points, "train", title.partition(",")[0].lower())]
            yield RunChart(title, unit, lines, limits=_from_zero(points))


def _from_zero(points: Sequence[Point]) -> tuple[float, float]:
    values = [point.value for point in points]
    low, high = min(0.0, *values), 1.08 * max(values)
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def activity_chart(history: History, now: Mapping[str, float]) -> list[RunChart]:
    """Make the chart of the share of time spent on each activity.

    Args:
        now: seconds of each activity until now, by key in `metrics.jsonl`.

    Returns:
        A list with the chart; an empty list before the first records.
    """
    last = history.last
    place = Point(last["step"], last["tokens"], 0.0, float(last["time_s"]))
    seconds = tuple(now.get(key(name), 0.0) for name in ACTIVITIES)
    moments = [*history.moments, (place, seconds)]
    if len(moments) < 2:
        return []
    lines = [
        Line([Point(p.step, p.tokens, values[i], p.time_s) for p, values in moments], name, name)
        for i, name in enumerate(ACTIVITIES)
    ]
    return [RunChart("Time by activity, as shares", "share", lines, 170, (0.0, 1.0), "stack")]


def draw_charts(
    charts: Sequence[RunChart], resumed: Sequence[Point], note: str, legend: str = ""
) -> str:
    """Format the charts as an HTML section, with tokens on the x axis.

    Args:
        resumed: points at which the run was resumed, drawn as vertical lines.
        note: a sentence about the charts; "" for none.
        legend: HTML of a legend for all charts; "" if each chart has its own.
    """
    return section_of(draw_figures(charts, resumed, has_legend=not legend), note, legend)


def draw_figures(
    charts: Sequence[RunChart], resumed: Sequence[Point], *, has_legend: bool = True, first: int = 0
) -> list[str]:
    """Format each chart as an HTML figure, with tokens on the x axis.

    In the browser, the script replaces the figures by charts with zoom and other x axes.

    Args:
        resumed: points at which the run was resumed, drawn as vertical lines.
        has_legend: whether a chart of several lines has a legend.
        first: number of the first chart, for the ids of the HTML elements.
    """
    figures = []
    for i, each in enumerate(charts, first):
        is_labelled = has_legend and sum(bool(line.points) for line in each.lines) > 1
        lines = [
            Line(thin(x.points, STATIC_BUCKETS), x.look, x.label if is_labelled else "", x.dots)
            for x in each.lines
        ]
        drawn = chart(each.title, lines, each.height, each.limits or (0.0, 1.0), resumed)
        look = "chart needs-script" if each.kind == "stack" else "chart"
        look += " tall" if each.height > 200 else ""
        read = "<p class='read'></p>"
        figures.append(f'<figure class="{look}" id="chart{i}">{drawn}{read}</figure>')
    return figures


def section_of(figures: Sequence[str], note: str, legend: str = "") -> str:
    """Join figures into an HTML section with buttons for the x axis; empty if there are none."""
    if not figures:
        return ""
    buttons = "".join(
        f'<button type="button" data-by="{axis}" aria-pressed="false">{name}</button>'
        for axis, name in (("step", "Steps"), ("tokens", "Tokens"), ("time", "Time"))
    )
    tools = f'<div id="axis" hidden>{buttons}<button type="button" data-all hidden>Show all'
    said = f"<p class='plain'>{escape(note)}</p>" if note else ""
    drawn = f"<div class='charts'>{''.join(figures)}</div>"
    return f"<section><h2>Curves</h2>{tools}</button></div>{said}{legend}{drawn}</section>"


def points_json(charts: Sequence[RunChart], resumed: Sequence[Point], **about: Any) -> str:
    """Format the charts as JSON for the script, escaped for use in an HTML element.

    Args:
        about: further values for the script.
    """
    return join_points(chart_points(charts), resumed, **about)


def chart_points(charts: Sequence[RunChart]) -> list[str]:
    """Format each chart as JSON, for `join_points`."""
    return [
        _json(
            {
                "title": each.title,
                "unit": each.unit,
                "kind": each.kind,
                "height": each.height,
                "limits": each.limits,
                "lines": [_line(line) for line in each.lines if line.points],
            }
        )
        for each in charts
    ]


def join_points(charts: Sequence[str], resumed: Sequence[Point], **about: Any) -> str:
    """Build the JSON of `points_json` from charts that `chart_points` has formatted."""
    marks = [{"step": p.step, "tokens": p.tokens, "time": p.time_s} for p in resumed]
    rest = _json({"marks": marks, **about})
    return f'{{"charts":[{",".join(charts)}],{rest[1:]}'


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _line(line: Line) -> dict[str, Any]:
    points = line.points
    return {
        "name": line.label,
        "look": line.look,
        "dots": line.dots,
        "x": {
            "step": [p.step for p in points],
            "tokens": [p.tokens for p in points],
            "time": [round(p.time_s, 2) for p in points],
        },
        "y": [float(f"{p.value:.6g}") for p in points],
    }
