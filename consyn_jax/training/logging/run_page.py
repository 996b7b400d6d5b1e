"""Write `report.html`, a page about a run, which loads nothing from the network."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from consyn_jax.files import write_whole
from consyn_jax.pages import escape, html_page, unbroken
from consyn_jax.training.logging.charts import CHART_STYLE
from consyn_jax.training.logging.curves import Point
from consyn_jax.training.logging.formats import compact, duration
from consyn_jax.training.logging.live.activities import ACTIVITIES
from consyn_jax.training.logging.live.activities import key as activity_key
from consyn_jax.training.logging.live.chart_script import CHART_PAGE_STYLE, SCRIPT
from consyn_jax.training.logging.live.history import History
from consyn_jax.training.logging.live.page_header import HEADER_STYLE, header_section, now
from consyn_jax.training.logging.live.run_charts import (
    activity_chart,
    chart_points,
    draw_figures,
    join_points,
    run_charts,
    section_of,
)

EVENT_HEAD, SHOWN_EVENTS = ("step", "event", "after", "details"), 1000
SHOWN_SAMPLES = 5  # earlier samples are collapsed
THINNED = (
    "Long curves show the lowest and the highest point of each group of steps, so spikes are not "
    "lost; smoothed curves are means of all points."
)
AT_BEST = {
    "eval/perplexity": "perplexity",
    "eval/bits_per_byte": "bits per byte",
    "eval/accuracy": "accuracy",
    "eval/rewards/margins": "reward margin",
    "eval/rewards/accuracies": "reward accuracy",
}
THROUGHPUT = {
    "throughput/tokens_per_s": ("tokens/s", lambda value: f"{value:,.0f}"),
    "throughput/step_time_s": ("seconds per step", lambda value: f"{value:.4g}"),
    "throughput/mfu": ("model FLOP/s utilisation", lambda value: f"{value:.1%}"),
    "throughput/data_wait_fraction": ("time waiting for data", lambda value: f"{value:.2%}"),
    "memory/peak_bytes": ("peak memory of a device", lambda value: f"{value / 2**30:.2f} GiB"),
}


PAGE = "report.html"


@dataclass(frozen=True)
class Status:
    """The state of a run.

    Attributes:
        words: "running", or a result of `metrics.ending` such as "complete".
        is_alive: whether the page will be written again.
        left_s: estimated seconds until the run ends; None if unknown.
        longest_gap_s: longest time so far between two versions of the page, in seconds.
    """

    words: str
    is_alive: bool
    total_steps: int
    left_s: float | None = None
    longest_gap_s: float = 0.0


def write_report(
    directory: Path,
    history: History,
    config: Mapping[str, object],
    samples: Sequence[tuple[int, str]],
    status: Status,
    *,
    summary: Mapping[str, object] | None = None,
    activities: Callable[[], Mapping[str, float]] = dict,
    origins: Mapping[str, str] | None = None,
    about: Sequence[tuple[str, str]] = (),
) -> Path:
    """Write `report.html` into a run directory, and return its path.

    Args:
        config: values by flag name, from `flags.flat`.
        samples: generated texts, each with its step.
        summary: newest values by metric.
        activities: function that returns the seconds of each activity so far, by key in
            `metrics.jsonl`. It is called last, so that most of the time spent on writing this page
            is included.
        origins: the origin of each value of the configuration, from `resolve.resolve`.
        about: header rows, as (name, text), about model, devices, data and versions.

    Raises:
        OSError: the directory cannot be written.
    """
    shown, newest = _samples(samples), _folded("All newest values", _newest(summary or {}))
    events, settings = _event_table(history), _configuration(config, origins or {})
    charts, resumed = run_charts(history), _resumed(history)
    figures, points = draw_figures(charts, resumed), chart_points(charts)
    spent = activities()
    passed_s, last = sum(spent.values(), 0.0), activity_chart(history, spent)
    figures += draw_figures(last, resumed, first=len(charts))
    sections = [
        _state(status, history),
        header_section(about, duration(passed_s) if spent else ""),
        _tiles(history, passed_s),
        section_of(figures, THINNED if history.is_thinned else ""),
        shown,
        _times(spent, history),
        events,
        *settings,
        newest,
        _points([*points, *chart_points(last)], resumed, status),
    ]
    page = _page(directory, "\n".join(filter(None, sections)), status)
    write_whole(directory / PAGE, page.encode("utf-8", "replace"))
    return directory / PAGE


def _page(directory: Path, sections: str, status: Status) -> str:
    return html_page(
        f"Run {directory.resolve().name}",
        CHART_STYLE + STYLE + HEADER_STYLE + CHART_PAGE_STYLE,
        sections,
        "metrics.jsonl",
        script=SCRIPT,
        reload_without_script_s=_reload_s(status) if status.is_alive else None,
    )


def _event_table(history: History) -> str:
    rows = list(_events(history))
    return _table(_events_title(history), rows, EVENT_HEAD, look="wide events")


def _newest(summary: Mapping[str, object]) -> str:
    return _table("", [(name, _cell(value)) for name, value in summary.items()])


def _configuration(config: Mapping[str, object], origins: Mapping[str, str]) -> tuple[str, str]:
    """Two tables: the values that are not defaults, and a collapsed table of all values."""
    settings = [(name, _cell(value), origins.get(name, "")) for name, value in config.items()]
    chosen = [row for row in settings if row[2] not in ("", "default")]
    head = ("flag", "value", "origin")
    return (
        _table("Configuration, without defaults", chosen, head),
        _folded("The whole configuration", _table("", settings, head)),
    )


def _points(charts: Sequence[str], resumed: Sequence[Point], status: Status) -> str:
    """The HTML script element with the points of the charts as JSON."""
    points = join_points(
        charts,
        resumed,
        alive=status.is_alive,
        written=round(time.time(), 1),
        reload_s=_reload_s(status),
        quiet_s=round(900 + 5 * status.longest_gap_s),
    )
    return f'<script type="application/json" id="points">{points}</script>'


def _reload_s(status: Status) -> int:
    """Seconds between reloads of the page, short enough to show each new version soon."""
    return round(min(60.0, max(10.0, status.longest_gap_s / 4)))


def _state(status: Status, history: History) -> str:
    step, total = int(history.last["step"]), status.total_steps
    share = f" ({step / total:.0%})" if total else ""
    left = "" if status.left_s is None else f", about {duration(status.left_s)} left"
    place = f"step {step:,} of {total:,}{share}{left}"
    words = status.words[:1].upper() + status.words[1:]
    look = "" if status.is_alive or status.words == "complete" else " stopped"
    news = f"<small id='news'>As of {now()}. This page reloads itself.</small>"
    return (
        f"<section class='state{look}'><b>{escape(words)}</b>: {place}"
        f"{news if status.is_alive else ''}</section>"
    )


def _tiles(history: History, spent_s: float) -> str:
    """The most important numbers, with a note on each.

    Args:
        spent_s: Seconds of the run until now; 0 to use the time of the newest line.
    """
    tiles: list[tuple[str, str, str]] = []
    if (found := history.at_best) is not None:
        tiles.append(("best eval loss", f"{found['eval/loss']:.4f}", f"step {found['step']:,}"))
        tiles += [
            (name, f"{found[key]:.4g}", "at the best eval")
            for key, name in AT_BEST.items()
            if isinstance(found.get(key), (int, float))
        ]
    if "train/loss" in history.curves:
        loss = history.curves["train/loss"].smooth()[-1].value
        tiles.append(("train loss", f"{loss:.4f}", "smoothed, at the end"))
    if history.num_events or history.curves:
        last = history.last
        tiles.append(
            ("trained on", compact(last["tokens"]), f"target tokens, {last['step']:,} steps")
        )
        passed = duration(spent_s or float(last["time_s"]))
        tiles.append(("time", passed, "from start to now" if spent_s else "at the last line"))
    if speeds := history.values["throughput/tokens_per_s"]:
        tiles.append(("speed", compact(statistics.median(speeds)), "tokens/s, median"))
    if not tiles:
        return "<p>Nothing was logged.</p>"
    cells = (
        f"<div><span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>"
        for name, value, note in tiles
    )
    return f'<section class="tiles">{"".join(cells)}</section>'


def _resumed(history: History) -> list[Point]:
    return [
        Point(line["step"], line["tokens"], 0.0, float(line["time_s"]))
        for line in history.events
        if line.get("event") == "resume"
    ]


def _times(spent: Mapping[str, float], history: History) -> str:
    """Tables of time by activity and of throughput, side by side."""
    times = _table("Time by activity", _time_rows(spent), ("activity", "time", "share"))
    throughput = _table("Throughput", _throughput(history), ("", "median", "range"))
    return f"<div class='pair'>{times}{throughput}</div>"


def _throughput(history: History) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for key, (name, show) in THROUGHPUT.items():
        if values := history.values[key]:
            spread = f"{show(min(values))} to {show(max(values))}"
            rows.append((name, show(statistics.median(values)), spread))
    return rows


def _time_rows(seconds: Mapping[str, float]) -> list[tuple[str, ...]]:
    """Table rows: the time of each activity, and the sum."""
    total = sum(seconds.values())
    if not total:
        return []
    rows = [
        (name, _seconds(spent), f"{spent / total:.1%}")
        for name in ACTIVITIES
        if (spent := seconds.get(activity_key(name), 0.0)) > 0
    ]
    return [*rows, ("together", _seconds(total), "100.0%")]


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 60 else duration(value)


def _events_title(history: History) -> str:
    shown = min(len(history.events), SHOWN_EVENTS)
    if shown == history.num_events:
        return "Events, newest first"
    return f"The last {shown:,} of {history.num_events:,} events, newest first"


def _events(history: History) -> Iterable[tuple[str, ...]]:
    for line in reversed(history.events[-SHOWN_EVENTS:]):
        details = str(line.get("sentence") or "") or ", ".join(
            f"{key} {_cell(value)}"
            for key, value in line.items()
            if key not in ("step", "tokens", "time_s", "event")
        )
        yield f"{line['step']:,}", str(line["event"]), duration(float(line["time_s"])), details


def _samples(samples: Sequence[tuple[int, str]]) -> str:
    """The newest samples, and a collapsed section with earlier samples."""
    figures = [
        f"<figure><figcaption>step {step:,}</figcaption>"
        f'<pre dir="auto">{escape(text)}</pre></figure>'
        for step, text in samples
    ]
    if not figures:
        return ""
    earlier, newest = figures[:-SHOWN_SAMPLES], figures[-SHOWN_SAMPLES:]
    folded = _folded(f"{len(earlier):,} earlier", "".join(earlier)) if earlier else ""
    return f"<section><h2>Samples</h2>{folded}{''.join(newest)}</section>"


def _table(
    title: str,
    rows: Sequence[tuple[str, ...]],
    head: tuple[str, ...] = (),
    look: str = "wide",
) -> str:
    if not rows:
        return ""
    lines = [_row("th", head)] if head else []
    table = "".join([*lines, *(_row("td", row) for row in rows)])
    heading = f"<h2>{escape(title)}</h2>" if title else ""
    return f"<section>{heading}<div class='{look}'><table>{table}</table></div></section>"


def _folded(title: str, section: str) -> str:
    """A collapsed section, which opens on a click."""
    return f"<details><summary>{escape(title)}</summary>{section}</details>" if section else ""


def _row(tag: str, cells: tuple[str, ...]) -> str:
    return f"<tr>{''.join(f'<{tag}>{unbroken(cell)}</{tag}>' for cell in cells)}</tr>"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)


STYLE = """
summary { cursor: pointer; margin: 14px 0 10px; color: var(--soft); }
figure { margin: 0 0 12px; }
.whole { max-height: none; }
td:not(:first-child) { overflow-wrap: anywhere; min-width: 9em; }
.events td:nth-child(-n + 3) { white-space: nowrap; min-width: 0; }
.pair { display: grid; gap: 0 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(360px, 100%), 1fr)); }
.pair td:first-child { white-space: normal; overflow-wrap: normal; }
.pair :is(td, th):not(:first-child) { min-width: 0; text-align: right; white-space: nowrap; }
.plain { color: var(--soft); font-size: 12.5px; }
pre {
  margin: 2px 0 0; padding: 12px 14px; max-height: 360px; overflow-y: auto;
  background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
}
"""
