"""The HTML page of a study: trials in order, flags against the metric, and importances."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from consyn_jax.pages import escape, html_page
from consyn_jax.training.logging.charts import CHART_STYLE
from consyn_jax.training.logging.formats import compact, decimals
from consyn_jax.tuning.search_space import Dimension, as_text
from consyn_jax.tuning.study_results import (
    DONE,
    OUTCOMES,
    RUNNING,
    StudyResults,
    TrialResult,
    row,
)

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 260, 84, 20, 12, 36
# The chart ends at this multiple of the distance from the best to the median value. Worse points
# are drawn at its edge.
WORST_SHOWN = 4.0


@dataclass(frozen=True)
class Spot:
    """A trial in a chart: its x position from 0 to 1, and its metric value."""

    x: float
    trial: TrialResult


def study_page(
    results: StudyResults, title: str, importance: Mapping[str, float], command: str
) -> str:
    """Make the page.

    Args:
        importance: share of the metric's variance by flag; empty if it is unknown.
        command: the command that trains with the best values.
    """
    sections = [_tiles(results), _command(results, command)]
    if any(trial.value is not None for trial in results.trials):
        sections += [_history(results), _importance(importance), _slices(results)]
    sections.append(_table(results))
    body = "\n".join(filter(None, sections))
    return html_page(title, CHART_STYLE + STYLE, body, "the study's storage")


def _tiles(results: StudyResults) -> str:
    best = results.best
    value = "-" if best is None or best.value is None else decimals(best.value)
    name = "no trial is done" if best is None else f"trial {best.number}"
    counts = [
        f"{results.count(outcome)} {outcome}"
        for outcome in (*OUTCOMES, RUNNING)
        if results.count(outcome)
    ]
    tiles = [
        (f"best {results.metric}", value, name),
        ("trials", f"{len(results.trials):,}", ", ".join(counts)),
        ("steps saved", f"{results.saved:.0%}", "by ending trials early"),
    ]
    cells = "".join(
        f"<div><span>{escape(name)}</span><b>{escape(text)}</b><small>{escape(more)}</small></div>"
        for name, text, more in tiles
    )
    return f"<section class='tiles'>{cells}</section>"


def _command(results: StudyResults, command: str) -> str:
    if results.best is None:
        return ""
    return f"<section><h2>Train with the best values</h2><pre>{escape(command)}</pre></section>"


def _history(results: StudyResults) -> str:
    most = max(len(results.trials) - 1, 1)
    spots = [Spot(trial.number / most, trial) for trial in results.trials]
    ticks = [(i / most, str(i)) for i in _whole_ticks(most)]
    chart = _scatter(f"{results.metric} by trial", spots, ticks, results)
    return f"<section><h2>History</h2><div class='charts'>{chart}</div></section>"


def _slices(results: StudyResults) -> str:
    charts = []
    for dimension in results.space:
        spots = [
            Spot(_place(dimension, trial.values[dimension.name]), trial)
            for trial in results.trials
            if dimension.name in trial.values
        ]
        if dimension.choices:
            ticks = [(_place(dimension, value), as_text(value)) for value in dimension.choices]
        else:
            ticks = [(part / 4, compact(_value(dimension, part / 4))) for part in range(5)]
        charts.append(_scatter(dimension.name, spots, ticks, results))
    return f"<section><h2>Flags</h2><div class='charts'>{''.join(charts)}</div></section>"


def _importance(importance: Mapping[str, float]) -> str:
    if not importance:
        return ""
    bars = "".join(
        f"<tr><td>{escape(name)}</td><td><i style='width:{100 * share:.1f}%'></i></td>"
        f"<td>{share:.0%}</td></tr>"
        for name, share in sorted(importance.items(), key=lambda item: -item[1])
    )
    note = "<p class='plain'>How much each flag decides whether a trial is good, as a share.</p>"
    return f"<section><h2>Importance</h2>{note}<table class='bars'>{bars}</table></section>"


def _table(results: StudyResults) -> str:
    head = ["trial", results.metric, *(d.name for d in results.space), "steps", "outcome"]
    heads = "".join(f"<th>{escape(name)}</th>" for name in head)
    rest = [trial for trial in results.trials if trial.outcome != DONE]
    lines = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row(trial, results.space))}</tr>"
        for trial in [*results.done, *rest]
    )
    return (
        f"<section><h2>Trials</h2><div class='wide'><table><thead><tr>{heads}</tr></thead>"
        f"<tbody>{lines}</tbody></table></div></section>"
    )


def _place(dimension: Dimension, value: Any) -> float:
    """The position of a value on the axis of its flag, from 0 to 1.

    >>> _place(Dimension("lr", 1e-4, 1e-2, True), 1e-3), _place(Dimension("a", choices=(1, 2)), 2)
    (0.5, 0.75)
    """
    if dimension.choices:
        return (dimension.choices.index(value) + 0.5) / len(dimension.choices)
    low, high = dimension.low, dimension.high
    if dimension.is_log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return float(round((value - low) / (high - low), 6))


def _value(dimension: Dimension, place: float) -> float:
    """The value of a numeric flag at a position from 0 to 1; the inverse of `_place`."""
    low, high = dimension.low, dimension.high
    if dimension.is_log:
        return float(low * (high / low) ** place)
    return float(low + (high - low) * place)


def _whole_ticks(most: int) -> range:
    return range(0, most + 1, max(1, math.ceil(most / 10)))


def _limits(results: StudyResults) -> tuple[float, float]:
    """The range of metric values to show; a few very bad trials must not compress the rest."""
    values = sorted(
        (trial.value for trial in results.trials if trial.value is not None),
        reverse=results.maximize,
    )
    best, middle, worst = values[0], values[len(values) // 2], values[-1]
    edge = best + WORST_SHOWN * (middle - best)
    if abs(worst - best) > abs(edge - best) > 0:
        worst = edge
    margin = 0.05 * abs(worst - best) or max(0.05 * abs(best), 1e-3)
    return min(best, worst) - margin, max(best, worst) + margin


def _scatter(
    title: str,
    spots: Sequence[Spot],
    ticks: Sequence[tuple[float, str]],
    results: StudyResults,
) -> str:
    """A chart with a dot for each trial; the dot's title shows the value."""
    low, high = _limits(results)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def y(value: float) -> float:
        share = (high - min(max(value, low), high)) / (high - low)
        return round(TOP + (bottom - TOP) * share, 1)

    def x(place: float) -> float:
        return round(LEFT + (right - LEFT) * place, 1)

    parts = [
        f"<figure><h3>{escape(title)}</h3>",
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title>",
    ]
    for part in range(5):
        value = low + (high - low) * (part + 0.5) / 5
        parts.append(f'<path class="grid" d="M{LEFT} {y(value)}H{right}"/>')
        parts.append(
            f'<text x="{LEFT - 8}" y="{y(value) + 5}" text-anchor="end">{decimals(value)}</text>'
        )
    for place, text in ticks:
        parts.append(
            f'<text x="{x(place)}" y="{bottom + 22}" text-anchor="middle">{escape(text)}</text>'
        )
    best = results.best
    for spot in sorted(spots, key=lambda spot: spot.trial is best):
        trial = spot.trial
        if trial.value is None:
            continue
        look = "best" if trial is best else "eval" if trial.outcome == DONE else "raw"
        name = f"trial {trial.number}: {decimals(trial.value)}, {trial.outcome}"
        parts.append(
            f'<circle class="{look}" cx="{x(spot.x)}" cy="{y(trial.value)}" '
            f'r="{6 if look == "best" else 4}"><title>{escape(name)}</title></circle>'
        )
    return "".join([*parts, "</svg></figure>"])


STYLE = """
figure { margin: 0; }
.charts { display: grid; gap: 0 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); }
.charts svg text { font-size: 15px; }
circle.raw { opacity: .38; }
.plain { color: var(--soft); font-size: 12.5px; }
.bars td:last-child { white-space: nowrap; text-align: right; }
.bars td:nth-child(2) { width: 70%; }
.bars i { display: block; height: 12px; margin-top: 5px; border-radius: 3px;
  background: var(--blue); }
"""
