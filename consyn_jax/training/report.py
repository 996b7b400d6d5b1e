"""What a run looks like when it is over: `loss.png`, and `report.html`, one file that needs no network and no script."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consyn_jax.data.html_page import escape, html_page
from consyn_jax.training.console import compact, duration
from consyn_jax.training.drawing import png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Metrics = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Point:
    step: int
    tokens: int
    value: float


def curve(metrics: Metrics, key: str) -> list[Point]:
    """The finite values of one key in order. Events may repeat a value among their details; those are not points."""
    lines = (line for line in metrics if "event" not in line and isinstance(line.get(key), (int, float)) and math.isfinite(line[key]))
    return [Point(line["step"], line["tokens"], float(line[key])) for line in lines]


def smooth(points: Sequence[Point]) -> list[Point]:
    """The mean over a window around each point, at most a twentieth of the curve and narrow near its beginning.

    A moving average of the past, the usual choice, shows the steep fall at the beginning much too late.
    """
    sums = [0.0, *itertools.accumulate(point.value for point in points)]
    half = max(1, len(points) // 40)
    smoothed = []
    for i, point in enumerate(points):
        reach = min(half, i // 2)
        first, end = i - reach, min(i + reach + 1, len(points))
        smoothed.append(dataclasses.replace(point, value=(sums[end] - sums[first]) / (end - first)))
    return smoothed


def thin(points: Sequence[Point], buckets: int = 300) -> list[Point]:
    """At most two points a bucket, its lowest and highest: a curve of a million points keeps its spikes and loses its weight."""
    if len(points) <= 2 * buckets:
        return list(points)
    size = math.ceil(len(points) / buckets)
    kept = []
    for start in range(0, len(points), size):
        bucket = range(start, min(start + size, len(points)))
        kept += [points[i] for i in sorted({min(bucket, key=lambda i: points[i].value), max(bucket, key=lambda i: points[i].value)})]
    return kept


def best(points: Sequence[Point]) -> Point | None:
    """The lowest; the first where several are."""
    return min(points, key=lambda point: point.value, default=None)


def _loss_limits(train: Sequence[Point], evaluation: Sequence[Point]) -> tuple[float, float]:
    """The range of losses to show. The fall of the first fiftieth of a long run would leave no room for the rest."""
    shown = [point.value for point in [*train[len(train) // 50 :], *evaluation]]
    if not shown:
        return 0.0, 1.0
    low, high = min(shown), max(shown)
    margin = 0.05 * (high - low) or max(0.05 * abs(high), 1e-3)
    return low - margin, high + margin


# --------------------------------------------------------------------------------------------------------------------- loss.png

_BLUE, _ORANGE, _GREEN, _GREY = "#3b6fb6", "#d9731a", "#2f8f5b", "#5f6772"


def write_loss_plot(metrics: Metrics, path: Path) -> None:
    """Draw training loss, evaluations and learning rate over tokens as a PNG.

    Args:
        metrics: lines of `metrics.jsonl`; any number, none too.

    Raises:
        OSError: `path` cannot be written.
    """
    train, rate = curve(metrics, "train/loss"), curve(metrics, "train/learning_rate")

    def draw(figure: Any) -> None:
        if rate:
            upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [4, 1]})
            lower.plot([p.tokens for p in rate], [p.value for p in rate], color=_GREY, linewidth=1.4, marker="" if len(rate) > 1 else "o", markersize=3)
            lower.set_ylabel("learning rate", color=_GREY)
            lower.set_ylim(bottom=0)
            lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
        else:
            upper = lower = figure.subplots()
        _draw_losses(upper, train, curve(metrics, "eval/loss"))
        _dress(upper, lower, max([*train, *curve(metrics, "eval/loss"), *rate], key=lambda point: point.tokens, default=None))
        figure.align_ylabels([upper, lower])

    path.write_bytes(png(5.6 if rate else 4.8, draw))


def _draw_losses(axes: Axes, train: Sequence[Point], evaluation: Sequence[Point]) -> None:
    if not train and not evaluation:
        axes.text(0.5, 0.5, "no finite loss was logged", ha="center", va="center", transform=axes.transAxes, color=_GREY)
        return
    if train:
        raw = thin(train, 1000)
        dots = "o" if len(train) < 20 else ""
        axes.plot([p.tokens for p in raw], [p.value for p in raw], color=_BLUE, alpha=0.3, linewidth=0.9, marker=dots, markersize=3, label="train")
    if len(train) > 1:
        line = thin(smooth(train), 1000)
        axes.plot([p.tokens for p in line], [p.value for p in line], color=_BLUE, linewidth=1.9, label="train, smoothed")
    if evaluation:
        axes.plot([p.tokens for p in evaluation], [p.value for p in evaluation], color=_ORANGE, linewidth=1.4, marker="o", markersize=4.5, label="eval")
    lowest = best(evaluation)
    if lowest is not None:
        label = f"best: {lowest.value:.4f} at step {lowest.step:,}"
        axes.plot(
            [lowest.tokens],
            [lowest.value],
            linestyle="",
            marker="*",
            markersize=15,
            color=_GREEN,
            markeredgecolor="white",
            markeredgewidth=0.8,
            zorder=5,
            label=label,
        )
    axes.set_ylim(*_loss_limits(train, evaluation))
    axes.legend(loc="upper right", facecolor="white", edgecolor="none", framealpha=0.9)


def _dress(upper: Axes, lower: Axes, last: Point | None) -> None:
    import numpy as np
    from matplotlib.ticker import EngFormatter, MaxNLocator

    for axes in {upper, lower}:
        axes.grid(True, color="#e3e6ea", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#b8bec6")
        axes.tick_params(colors=_GREY)
    upper.set_ylabel("loss (nats per token)")
    lower.set_xlabel("tokens trained on")
    lower.xaxis.set_major_formatter(EngFormatter(sep=""))
    if last is None:
        upper.set_xticks([])
        upper.set_yticks([])
        return
    lower.set_xlim(0, 1.015 * last.tokens or 1)
    tokens_per_step = last.tokens / max(last.step, 1)
    if tokens_per_step:  # tokens in a step vary little: the axis of steps is the axis of tokens, divided
        steps = upper.secondary_xaxis("top", functions=(lambda x: np.divide(x, tokens_per_step), lambda x: np.multiply(x, tokens_per_step)))
        steps.set_xlabel("steps", color=_GREY)
        steps.xaxis.set_major_locator(MaxNLocator(integer=True))
        steps.xaxis.set_major_formatter("{x:,.0f}")
        steps.tick_params(colors=_GREY)
        steps.spines["top"].set_visible(False)


# ------------------------------------------------------------------------------------------------------------------ report.html


def write_report(
    directory: Path,
    metrics: Metrics,
    config: Mapping[str, object],
    samples: Sequence[tuple[int, str]],
    summary: Mapping[str, object],
    origins: Mapping[str, str] | None = None,
) -> Path:
    """Write `report.html` into a run directory: result, curves, samples, throughput, events, configuration.

    Args:
        config: values by flag name, from `config.flat`.
        samples: step and text.
        summary: what else is to stand with the result, by label.
        origins: where each value of the configuration came from, from `resolve.resolve`.

    Returns:
        The file.

    Raises:
        OSError: the directory cannot be written.
    """
    sections = [
        _tiles(metrics),
        _table("Result", [(name, _cell(value)) for name, value in summary.items()]),
        _charts(metrics),
        "".join(["<section><h2>Samples</h2>", *(_sample(step, text) for step, text in samples), "</section>"]) if samples else "",
        _table("Throughput", _throughput(metrics), ("", "median", "range")),
        _table("Events", list(_events(metrics)), ("step", "event", "after", "details")),
        _table("Configuration", [(name, _cell(value), (origins or {}).get(name, "")) for name, value in config.items()], ("flag", "value", "origin")),
    ]
    page = html_page(f"Run {directory.resolve().name}", _STYLE, "\n".join(filter(None, sections)), "metrics.jsonl")
    path = directory / "report.html"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(page.encode("utf-8", "replace"))
    temporary.replace(path)
    return path


def _tiles(metrics: Metrics) -> str:
    """The numbers that one looks for first."""
    tiles: list[tuple[str, str, str]] = []
    train, evaluation = curve(metrics, "train/loss"), curve(metrics, "eval/loss")
    lowest = best(evaluation)
    if lowest is not None:
        tiles.append(("best eval loss", f"{lowest.value:.4f}", f"step {lowest.step:,}"))
        at_best = next(line for line in metrics if "event" not in line and line.get("eval/loss") == lowest.value)
        for key, name in (("eval/perplexity", "perplexity"), ("eval/bits_per_byte", "bits per byte"), ("eval/accuracy", "accuracy")):
            if isinstance(at_best.get(key), (int, float)):
                tiles.append((name, f"{at_best[key]:.4g}", "at the best eval"))
    if train:
        tiles.append(("train loss", f"{smooth(train)[-1].value:.4f}", "smoothed, at the end"))
    if metrics:
        last = metrics[-1]
        tiles.append(("trained on", compact(last["tokens"]), f"tokens, {last['step']:,} steps"))
        tiles.append(("time", duration(float(last["time_s"])), "with evaluations and saves"))
    speed = curve(metrics, "throughput/tokens_per_s")
    if speed:
        tiles.append(("speed", compact(statistics.median(p.value for p in speed)), "tokens/s, median"))
    if not tiles:
        return "<p>Nothing was logged.</p>"
    cells = (f"<div><span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>" for name, value, note in tiles)
    return f'<section class="tiles">{"".join(cells)}</section>'


def _throughput(metrics: Metrics) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    names = {
        "throughput/tokens_per_s": ("tokens/s", lambda value: f"{value:,.0f}"),
        "throughput/step_time_s": ("seconds a step", lambda value: f"{value:.4g}"),
        "throughput/mfu": ("model FLOP/s utilisation", lambda value: f"{value:.1%}"),
        "throughput/data_wait_fraction": ("time waiting for data", lambda value: f"{value:.2%}"),
        "memory/peak_bytes": ("peak memory of a device", lambda value: f"{value / 2**30:.2f} GiB"),
    }
    for key, (name, show) in names.items():
        values = sorted(point.value for point in curve(metrics, key))
        if values:
            rows.append((name, show(statistics.median(values)), f"{show(values[0])} to {show(values[-1])}"))
    return rows


def _events(metrics: Metrics) -> Iterable[tuple[str, ...]]:
    for line in metrics:
        if "event" in line:
            details = ", ".join(f"{key} {_cell(value)}" for key, value in line.items() if key not in ("step", "tokens", "time_s", "event"))
            yield f"{line['step']:,}", str(line["event"]), duration(float(line["time_s"])), details


def _sample(step: int, text: str) -> str:
    return f'<figure><figcaption>step {step:,}</figcaption><pre dir="auto">{escape(text)}</pre></figure>'


def _table(title: str, rows: Sequence[tuple[str, ...]], head: tuple[str, ...] = ()) -> str:
    if not rows:
        return ""
    top = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>" if head else ""
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<section><h2>{escape(title)}</h2><div class='wide'><table>{top}{body}</table></div></section>"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


# --------------------------------------------------------------------------------------------------------------- charts for HTML

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 64, 12, 12, 40


@dataclass(frozen=True)
class _Line:
    """Points to draw and the CSS class that says how."""

    points: list[Point]
    look: str
    label: str = ""
    dots: bool = False


def _charts(metrics: Metrics) -> str:
    train, evaluation = curve(metrics, "train/loss"), curve(metrics, "eval/loss")
    lowest = best(evaluation)
    lines = [
        _Line(thin(train), "raw", "train", dots=len(train) == 1),
        _Line(thin(smooth(train)) if len(train) > 1 else [], "train", "train, smoothed"),
        _Line(evaluation, "eval", "eval", dots=len(evaluation) <= 100),
        _Line([lowest] if lowest else [], "best", "best", dots=True),
    ]
    resumed = [Point(line["step"], line["tokens"], 0.0) for line in metrics if line.get("event") == "resume"]
    drawn = [_chart("Loss, nats per token", lines, 300, _loss_limits(train, evaluation), resumed)] if train or evaluation else []
    others = {"train/learning_rate": "Learning rate", "train/grad_norm": "Gradient norm, before clipping", "throughput/tokens_per_s": "Tokens per second"}
    for key, title in others.items():
        points = curve(metrics, key)
        if len(points) > 1:
            values = [point.value for point in points]
            drawn.append(_chart(title, [_Line(thin(points), "train")], 150, (min(0.0, *values, 0.0), 1.08 * max(values))))
    return f"<section><h2>Curves</h2>{''.join(drawn)}</section>" if drawn else ""


def _chart(title: str, lines: Sequence[_Line], height: int, limits: tuple[float, float], marks: Sequence[Point] = ()) -> str:
    """An inline SVG over tokens, whose colours come from the page's style."""
    lines = [line for line in lines if line.points]
    right = max((point.tokens for line in [*lines, _Line(list(marks), "mark")] for point in line.points), default=0) or 1
    low, high = limits if limits[1] > limits[0] else (limits[0] - 0.5, limits[0] + 0.5)

    def x(tokens: int | float) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * tokens / right, 1)

    def y(value: float) -> float:
        return round(_TOP + (height - _TOP - _BOTTOM) * (high - value) / (high - low), 1)

    parts = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img"><title>{escape(title)}</title>']
    for tick in _ticks(low, high, 6 if height > 200 else 3):
        parts.append(
            f'<path class="grid" d="M{_LEFT} {y(tick)}H{_WIDTH - _RIGHT}"/><text x="{_LEFT - 8}" y="{y(tick) + 4}" text-anchor="end">{_tick_text(tick)}</text>'
        )
    for tick in _ticks(0.0, float(right), 8):
        at = x(tick)
        parts.append(
            f'<path class="grid" d="M{at} {_TOP}V{height - _BOTTOM}"/><text x="{at}" y="{height - _BOTTOM + 17}" text-anchor="middle">{compact(tick)}</text>'
        )
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{height - 5}" text-anchor="end">tokens</text>')
    parts += [f'<path class="mark" d="M{x(mark.tokens)} {_TOP}V{height - _BOTTOM}"><title>resumed at step {mark.step:,}</title></path>' for mark in marks]
    inside = f'x="{_LEFT}" y="{_TOP}" width="{_WIDTH - _LEFT - _RIGHT}" height="{height - _TOP - _BOTTOM}"'
    window = f'viewBox="{_LEFT} {_TOP} {_WIDTH - _LEFT - _RIGHT} {height - _TOP - _BOTTOM}"'
    paths = (f'<path class="{line.look}" d="M{"L".join(f"{x(point.tokens)} {y(point.value)}" for point in line.points)}"/>' for line in lines)
    parts += [f"<svg {inside} {window}>", *paths, "</svg>"]  # an inner svg cuts off what lies outside of the limits
    parts += [_dot(point, line.look, x(point.tokens), y(point.value)) for line in lines for point in line.points if line.dots and low <= point.value <= high]
    legend = "".join(f'<span class="{line.look}">{escape(line.label)}</span>' for line in lines if line.label)
    legend += '<span class="mark">resumed</span>' if marks else ""
    return f"<h3>{escape(title)}<span class='legend'>{legend}</span></h3>{''.join(parts)}</svg>"


def _dot(point: Point, look: str, x: float, y: float) -> str:
    size = 5 if look == "best" else 3
    return f'<circle class="{look}" cx="{x}" cy="{y}" r="{size}"><title>step {point.step:,}: {point.value:.4f}</title></circle>'


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers within a range.

    >>> _ticks(0.0, 1.0, 5)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / gap - 1e-9)
    return [round(i * gap, 12) for i in itertools.takewhile(lambda i: i * gap <= high + gap * 1e-9, itertools.count(first))]


def _tick_text(value: float) -> str:
    if value == 0 or abs(value) >= 1e-3:
        return compact(value)
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{float(digits):g}e{int(exponent)}"


_STYLE = """
h3 { font-size: 14px; font-weight: 600; margin: 14px 0 4px; display: flex; flex-wrap: wrap; justify-content: space-between; gap: 4px 16px; }
svg.chart { display: block; width: 100%; height: auto; background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
svg text { fill: var(--soft); font: 11.5px system-ui, sans-serif; }
svg path { fill: none; stroke-linejoin: round; }
path.grid { stroke: var(--rule); stroke-width: 1; }
path.raw { stroke: var(--blue); stroke-width: 1; opacity: .38; }
path.train { stroke: var(--blue); stroke-width: 2; }
path.eval { stroke: var(--orange); stroke-width: 1.8; }
path.mark { stroke: var(--soft); stroke-width: 1.2; stroke-dasharray: 4 4; }
circle.raw, circle.train { fill: var(--blue); }
circle.eval { fill: var(--orange); }
circle.best { fill: var(--green); stroke: var(--card); stroke-width: 1.5; }
.legend { display: flex; flex-wrap: wrap; gap: 14px; font-weight: 400; color: var(--soft); }
.legend span::before { content: ""; display: inline-block; width: 14px; height: 3px; margin: 0 6px 3px 0; border-radius: 2px; background: var(--blue); }
.legend .raw::before { opacity: .38; }
.legend .eval::before { background: var(--orange); }
.legend .mark::before { background: repeating-linear-gradient(90deg, var(--soft) 0 4px, transparent 4px 7px); }
.legend .best::before { background: var(--green); width: 9px; height: 9px; border-radius: 50%; margin-bottom: 0; }
figure { margin: 0 0 12px; }
pre { margin: 2px 0 0; padding: 12px 14px; background: var(--card); border: 1px solid var(--rule); border-radius: 8px; max-height: 360px; overflow-y: auto; }
"""
