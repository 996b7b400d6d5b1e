"""HTML page that compares runs: their results, curves, and configuration differences."""

from __future__ import annotations

import time
from collections.abc import Sequence

from consyn_jax.pages import escape, html_page
from consyn_jax.reporting.recorded_run import RecordedRun, differing
from consyn_jax.training.logging.charts import CHART_STYLE, Line
from consyn_jax.training.logging.curves import Point, curve, loss_limits, smooth, thin
from consyn_jax.training.logging.formats import duration
from consyn_jax.training.logging.live.chart_script import CHART_PAGE_STYLE, SCRIPT
from consyn_jax.training.logging.live.run_charts import RunChart, draw_charts, points_json

QUIET_S = 1 << 30  # never stale: the server writes the page anew for each request
MAX_DRAWN = 18  # runs in a chart; more cannot be told apart
CURVES = {
    "train/learning_rate": ("Learning rate", "rate"),
    "train/grad_norm": ("Gradient norm, before clipping", "rate"),
    "throughput/tokens_per_s": ("Tokens per second", "count"),
    "throughput/mfu": ("Model FLOP/s utilisation (MFU)", "share"),
}


def runs_page(
    runs: Sequence[RecordedRun],
    title: str,
    unreadable: Sequence[str] = (),
    reload_s: int | None = None,
) -> str:
    """Return the HTML page that compares the runs.

    Args:
        runs: the runs, in the order of the table rows and the colours.
        unreadable: a sentence about each run that could not be read.
        reload_s: seconds after which the browser reloads the page; None for never.
    """
    faults = "".join(f"<p class='fault'>{escape(sentence)}</p>" for sentence in unreadable)
    drawn = _drawn(runs)
    points = points_json(
        drawn,
        [],
        alive=reload_s is not None,
        written=round(time.time(), 1),
        reload_s=reload_s,
        quiet_s=QUIET_S,
    )
    sections = [
        faults,
        _results(runs),
        draw_charts(drawn, [], _left_out(runs), _legend(runs)),
        _differences(runs),
        _about(runs),
    ]
    body = "\n".join(filter(None, sections)) or "<p>There is no run yet.</p>"
    return html_page(
        title,
        CHART_STYLE + CHART_PAGE_STYLE + STYLE + _colours(),
        f'{body}\n<script type="application/json" id="points">{points}</script>',
        "metrics.jsonl and config.yaml of each run",
        script=SCRIPT + SORTING,
        reload_without_script_s=reload_s,
    )


def _results(runs: Sequence[RecordedRun]) -> str:
    if not runs:
        return ""
    rows = [
        [(run.name, run.name), *((shown(*result), result[1]) for result in run.results.items())]
        for run in runs
    ]
    return _table("Results", ["run", *runs[0].results], rows, first="mark")


def shown(name: str, value: float | str | None) -> str:
    """Format a result as text; None becomes an empty text."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if name == "time":
        return duration(value)
    return f"{value:.4f}" if "loss" in name else f"{value:,.0f}"


def _drawn(runs: Sequence[RecordedRun]) -> list[RunChart]:
    """Charts with one line for each of the first `MAX_DRAWN` runs."""
    drawn = runs[:MAX_DRAWN]
    train = [smooth(curve(run.metrics, "train/loss")) for run in drawn]
    evaluation = [curve(run.metrics, "eval/loss") for run in drawn]
    charts = []
    for title, curves, dots in (
        ("Evaluation loss, nats per token", evaluation, 100),
        ("Training loss, smoothed, nats per token", train, 1),
    ):
        limits = [loss_limits(points, []) for points in curves if points]
        if limits:
            span = min(low for low, _ in limits), max(high for _, high in limits)
            charts.append(RunChart(title, "number", _lines(drawn, curves, dots), 300, span))
    for key, (title, unit) in CURVES.items():
        curves = [curve(run.metrics, key) for run in drawn]
        values = [point.value for points in curves for point in points]
        if len(values) > 1:
            span = min(0.0, *values), 1.08 * max(values)
            charts.append(RunChart(title, unit, _lines(drawn, curves), limits=span))
    return charts


def _lines(
    runs: Sequence[RecordedRun], curves: Sequence[list[Point]], max_dots: int = 1
) -> list[Line]:
    return [
        Line(thin(points), f"run{i}", run.name, dots=len(points) <= max_dots)
        for i, (run, points) in enumerate(zip(runs, curves, strict=True))
    ]


def _left_out(runs: Sequence[RecordedRun]) -> str:
    return f"The first {MAX_DRAWN} runs are drawn." if len(runs) > MAX_DRAWN else ""


def _legend(runs: Sequence[RecordedRun]) -> str:
    names = "".join(
        f"<span><svg width='26' height='8'><path class='run{i}' d='M0 4H26'/></svg>"
        f"{escape(run.name)}</span>"
        for i, run in enumerate(runs[:MAX_DRAWN])
    )
    return f"<p class='runs'>{names}</p>"


def _differences(runs: Sequence[RecordedRun]) -> str:
    if len(runs) < 2:
        return ""
    found = differing(runs)
    if not found:
        return "<section><h2>Configuration</h2><p>It is the same in all runs.</p></section>"
    names = [name for name, _ in found]
    rows = [
        [(run.name, run.name), *((texts[i], _number(texts[i])) for _, texts in found)]
        for i, run in enumerate(runs)
    ]
    return _table("What differs in the configuration", ["run", *names], rows, first="mark")


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _about(runs: Sequence[RecordedRun]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.about))
    rows = [
        [(run.name, run.name), *((run.about.get(key, ""), run.about.get(key, "")) for key in keys)]
        for run in runs
        if run.about
    ]
    return _table("Made with", ["run", *keys], rows) if keys else ""


def _table(
    title: str,
    head: Sequence[str],
    rows: Sequence[Sequence[tuple[str, float | str | None]]],
    first: str = "",
) -> str:
    """Return an HTML table; a click on a column's head sorts the rows by that column.

    Args:
        rows: the cells of each row, as (text, value to sort by).
        first: "mark" to put a dot in the run's colour before the name of the run.
    """
    numeric = [any(isinstance(row[n][1], (int, float)) for row in rows) for n in range(len(head))]
    heads = "".join(
        f"<th{NUMBER * is_number} tabindex='0'>{escape(name)}</th>"
        for name, is_number in zip(head, numeric, strict=True)
    )
    lines = []
    for i, row in enumerate(rows):
        mark = f"<i class='run{i}'></i>" if first and i < MAX_DRAWN else ""
        cells = [
            f"<td{NUMBER * isinstance(value, (int, float))} "
            f"data-value='{escape('' if value is None else str(value))}'>"
            f"{'' if n else mark}{escape(text)}</td>"
            for n, (text, value) in enumerate(row)
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f"<section><h2>{escape(title)}</h2><div class='wide'><table class='sorted'>"
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></section>"
    )


# Colours of Okabe and Ito (2008), which colour-blind people can tell apart. After six runs they
# repeat with dashed lines, then with dotted ones.
_HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


_DASHES = ("none", "7 4", "2 3")
NUMBER = " class='number'"


def _colours() -> str:
    rules = []
    for i in range(MAX_DRAWN):
        hue, dash = _HUES[i % len(_HUES)], _DASHES[i // len(_HUES)]
        rules += [
            f"path.run{i} {{ stroke: {hue}; stroke-width: 1.8; stroke-dasharray: {dash}; }}",
            f"circle.run{i}, i.run{i} {{ fill: {hue}; background: {hue}; }}",
        ]
    return "\n".join(rules)


STYLE = """
main { max-width: 1200px; }
.wide { max-height: none; }
.sorted td { white-space: normal; overflow-wrap: break-word; min-width: 0; max-width: 24em; }
.sorted .number { text-align: right; white-space: nowrap; }
.sorted td:first-child { min-width: 15em; }
@media (max-width: 600px) { .sorted td:first-child { min-width: 0; max-width: 42vw; } }
.sorted :is(td, th):first-child { position: sticky; left: 0; background: var(--card); }
.runs { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 6px 0; font-size: 13px; }
.runs svg { margin-right: 6px; vertical-align: middle; }
.runs path { fill: none; }
th { cursor: pointer; white-space: nowrap; }
th[aria-sort=ascending]::after { content: " \\25b2"; }
th[aria-sort=descending]::after { content: " \\25bc"; }
td i { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 7px; }
.plain { color: var(--soft); font-size: 12.5px; }
.fault { color: var(--orange); }
"""

SORTING = """
for (const head of document.querySelectorAll("table.sorted th")) {
  const sort = () => {
    const table = head.closest("table"), body = table.tBodies[0], at = head.cellIndex;
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => row.cells[at].dataset.value;
    const compare = (a, b) => {
      if (!a || !b) return !a - !b;
      const order = isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
      return up ? order : -order;
    };
    const rows = [...body.rows].sort((a, b) => compare(value(a), value(b)));
    body.append(...rows);
  };
  head.addEventListener("click", sort);
  head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
}
"""
