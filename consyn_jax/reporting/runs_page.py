"""The page of several runs: results, overlaid curves, and what differs between them."""

from __future__ import annotations

from collections.abc import Sequence

from consyn_jax.pages import escape, html_page
from consyn_jax.reporting.recorded_run import RecordedRun, differing
from consyn_jax.training.logging.charts import CHART_STYLE, Line, chart
from consyn_jax.training.logging.curves import Point, curve, loss_limits, smooth, thin
from consyn_jax.training.logging.formats import duration

MAX_DRAWN = 12  # runs in a chart; more cannot be told apart
CURVES = {
    "train/learning_rate": "Learning rate",
    "train/grad_norm": "Gradient norm, before clipping",
    "throughput/tokens_per_s": "Tokens per second",
}


def runs_page(
    runs: Sequence[RecordedRun],
    title: str,
    unreadable: Sequence[str] = (),
    reload_s: int | None = None,
) -> str:
    """Make the page.

    Args:
        runs: in the order of the tables and of the colours.
        unreadable: sentences about runs that could not be read.
        reload_s: seconds after which the page loads itself again.
    """
    faults = "".join(f"<p class='fault'>{escape(sentence)}</p>" for sentence in unreadable)
    sections = [faults, _results(runs), _charts(runs), _differences(runs), _about(runs)]
    body = "\n".join(filter(None, sections)) or "<p>There is no run yet.</p>"
    style = CHART_STYLE + STYLE + _colours()
    source = "metrics.jsonl and config.yaml of each run"
    return html_page(title, style, body, source, script=SORTING, reload_s=reload_s)


def _results(runs: Sequence[RecordedRun]) -> str:
    if not runs:
        return ""
    rows = [
        [(run.name, run.name), *((shown(*result), result[1]) for result in run.results.items())]
        for run in runs
    ]
    return _table("Results", ["run", *runs[0].results], rows, first="mark")


def shown(name: str, value: float | str | None) -> str:
    """A result as text; empty for None."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if name == "seconds":
        return duration(value)
    return f"{value:.4f}" if "loss" in name else f"{value:,.0f}"


def _charts(runs: Sequence[RecordedRun]) -> str:
    drawn = runs[:MAX_DRAWN]
    train = [smooth(curve(run.metrics, "train/loss")) for run in drawn]
    evaluation = [curve(run.metrics, "eval/loss") for run in drawn]
    charts = []
    for title, curves in (
        ("Evaluation loss, nats per token", evaluation),
        ("Training loss, smoothed, nats per token", train),
    ):
        limits = [loss_limits(points, []) for points in curves if points]
        if limits:
            low, high = min(low for low, _ in limits), max(high for _, high in limits)
            dots = 100 if curves is evaluation else 1
            charts.append(chart(title, _lines(drawn, curves, dots), 300, (low, high)))
    for key, title in CURVES.items():
        curves = [curve(run.metrics, key) for run in drawn]
        values = [point.value for points in curves for point in points]
        if len(values) > 1:
            limits_of = min(0.0, *values), 1.08 * max(values)
            charts.append(chart(title, _lines(drawn, curves), 150, limits_of))
    if not charts:
        return ""
    left_out = len(runs) - len(drawn)
    note = f"<p class='plain'>The first {MAX_DRAWN} runs are drawn.</p>" if left_out else ""
    return f"<section><h2>Curves</h2>{note}{''.join(charts)}</section>"


def _lines(
    runs: Sequence[RecordedRun], curves: Sequence[list[Point]], max_dots: int = 1
) -> list[Line]:
    return [
        Line(thin(points), f"run{i}", run.name, dots=len(points) <= max_dots)
        for i, (run, points) in enumerate(zip(runs, curves, strict=True))
    ]


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
    ]
    return _table("Made with", ["run", *keys], rows) if keys else ""


def _table(
    title: str,
    head: Sequence[str],
    rows: Sequence[Sequence[tuple[str, float | str | None]]],
    first: str = "",
) -> str:
    """A table that a click on its head sorts.

    Args:
        rows: cells as text and as the value to sort by.
        first: `mark` for the colour of the run in front of its name.
    """
    heads = "".join(f"<th tabindex='0'>{escape(name)}</th>" for name in head)
    lines = []
    for i, row in enumerate(rows):
        mark = f"<i class='run{i}'></i>" if first and i < MAX_DRAWN else ""
        cells = [
            f"<td data-value='{escape('' if value is None else str(value))}'>"
            f"{'' if n else mark}{escape(text)}</td>"
            for n, (text, value) in enumerate(row)
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f"<section><h2>{escape(title)}</h2><div class='wide'><table class='sorted'>"
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></section>"
    )


# Hues of Okabe and Ito (2008), which colour-blind people can tell apart, then the same dashed.
_HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def _colours() -> str:
    rules = []
    for i in range(MAX_DRAWN):
        hue, dash = _HUES[i % len(_HUES)], "6 4" if i >= len(_HUES) else "none"
        rules += [
            f"path.run{i} {{ stroke: {hue}; stroke-width: 1.8; stroke-dasharray: {dash}; }}",
            f"circle.run{i}, i.run{i} {{ fill: {hue}; background: {hue}; }}",
            f".legend .run{i}::before {{ background: {hue}; }}",
        ]
    return "\n".join(rules)


STYLE = """
main { max-width: 1200px; }
.sorted td { white-space: nowrap; }
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
