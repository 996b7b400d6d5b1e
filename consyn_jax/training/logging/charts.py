"""Draw curves as inline SVG, for pages that must work without JavaScript."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from consyn_jax.pages import escape
from consyn_jax.training.logging.curves import Point
from consyn_jax.training.logging.formats import compact

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 760, 64, 12, 12, 40  # a chart's width and margins in pixels


@dataclass(frozen=True)
class Line:
    """A curve to draw; `look` is its CSS class."""

    points: list[Point]
    look: str
    label: str = ""
    dots: bool = False


@dataclass(frozen=True)
class Frame:
    """The mapping from tokens and values to the pixels of a chart."""

    height: int
    right: int
    low: float
    high: float

    def x(self, tokens: int | float) -> float:
        """The x position, in pixels from the left, of a number of tokens."""
        return round(LEFT + (WIDTH - LEFT - RIGHT) * tokens / self.right, 1)

    def y(self, value: float) -> float:
        """The y position, in pixels from the top, of a value."""
        span = self.high - self.low
        return round(TOP + (self.height - TOP - BOTTOM) * (self.high - value) / span, 1)


def chart(
    title: str,
    lines: Sequence[Line],
    height: int,
    limits: tuple[float, float],
    resumed: Sequence[Point] = (),
) -> str:
    """Draw lines over the number of tokens as HTML; `CHART_STYLE` sets the colours.

    Args:
        limits: the lowest and the highest value of the y axis.
        resumed: points at which the run was resumed, drawn as vertical lines.
    """
    lines = [line for line in lines if line.points]
    points = [*(point for line in lines for point in line.points), *resumed]
    half = max(0.5, 0.01 * abs(limits[0]))  # half the range to show if the limits are equal
    low, high = limits if limits[1] > limits[0] else (limits[0] - half, limits[0] + half)
    frame = Frame(height, max((point.tokens for point in points), default=0) or 1, low, high)
    legend = "".join(
        f'<span class="{line.look}">{escape(line.label)}</span>' for line in lines if line.label
    )
    legend += '<span class="mark">resumed</span>' if resumed else ""
    parts = [
        f"<h3>{escape(title)}<span class='legend'>{legend}</span></h3>",
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title>",
        *_grid(frame),
        *_marks(frame, resumed),
        *_paths(frame, lines),
        *_dots(frame, lines),
        "</svg>",
    ]
    return "".join(parts)


def _grid(frame: Frame) -> Iterable[str]:
    ticks = _ticks(frame.low, frame.high, 6 if frame.height > 200 else 3)
    for tick, text in zip(ticks, _tick_texts(ticks), strict=True):
        at = frame.y(tick)
        yield f'<path class="grid" d="M{LEFT} {at}H{WIDTH - RIGHT}"/>'
        yield f'<text x="{LEFT - 8}" y="{at + 4}" text-anchor="end">{text}</text>'
    bottom = frame.height - BOTTOM
    for tick in _ticks(0.0, float(frame.right), 8):
        at = frame.x(tick)
        yield f'<path class="grid" d="M{at} {TOP}V{bottom}"/>'
        yield f'<text x="{at}" y="{bottom + 17}" text-anchor="middle">{compact(tick)}</text>'
    yield f'<text x="{WIDTH - RIGHT}" y="{frame.height - 5}" text-anchor="end">tokens</text>'


def _marks(frame: Frame, resumed: Sequence[Point]) -> Iterable[str]:
    for point in resumed:
        line = f"M{frame.x(point.tokens)} {TOP}V{frame.height - BOTTOM}"
        title = f"<title>resumed at step {point.step:,}</title>"
        yield f'<path class="mark" d="{line}">{title}</path>'


def _paths(frame: Frame, lines: Sequence[Line]) -> Iterable[str]:
    """Draw the lines in an inner SVG, which clips them at the limits."""
    width, height = WIDTH - LEFT - RIGHT, frame.height - TOP - BOTTOM
    place = f'x="{LEFT}" y="{TOP}" width="{width}" height="{height}"'
    yield f'<svg {place} viewBox="{LEFT} {TOP} {width} {height}">'
    for line in lines:
        places = "L".join(f"{frame.x(p.tokens)} {frame.y(p.value)}" for p in line.points)
        yield f'<path class="{line.look}" d="M{places}"/>'
    yield "</svg>"


def _dots(frame: Frame, lines: Sequence[Line]) -> Iterable[str]:
    for line in lines:
        size = 5 if line.look == "best" else 3
        for point in line.points:
            if line.dots and frame.low <= point.value <= frame.high:
                place = f'cx="{frame.x(point.tokens)}" cy="{frame.y(point.value)}"'
                title = f"<title>step {point.step:,}: {point.value:.4f}</title>"
                yield f'<circle class="{line.look}" {place} r="{size}">{title}</circle>'


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from `low` to `high`.

    >>> _ticks(0.0, 1.0, 5)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / gap - 1e-9)
    return [
        round(i * gap, 12)
        for i in itertools.takewhile(lambda i: i * gap <= high + gap * 1e-9, itertools.count(first))
    ]


def _tick_texts(ticks: Sequence[float]) -> list[str]:
    """Format numbers with enough digits to distinguish them.

    >>> _tick_texts([0.0, 0.5]), _tick_texts([5.552, 5.554]), _tick_texts([0.0, 2e-5])
    (['0', '0.5'], ['5.552', '5.554'], ['0', '2e-5'])
    """
    texts = [_tick_text(tick, 3) for tick in ticks]
    for digits in range(4, 10):
        if len(set(texts)) == len(texts):
            break
        texts = [_tick_text(tick, digits) for tick in ticks]
    return texts


def _tick_text(value: float, digits: int) -> str:
    if value == 0 or abs(value) >= 1e-3:
        return compact(value, digits)
    text, _, exponent = f"{value:.{digits - 2}e}".partition("e")
    return f"{float(text):g}e{int(exponent)}"


CHART_STYLE = """
h3 {
  font-size: 14px; font-weight: 600; margin: 14px 0 4px;
  display: flex; flex-wrap: wrap; justify-content: space-between; gap: 4px 16px;
}
svg.chart {
  display: block; width: 100%; height: auto;
  background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
}
svg text { fill: var(--soft); font: 11.5px system-ui, sans-serif; }
@media (max-width: 600px) { svg text { font-size: 17px; } }
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
.legend span::before {
  content: ""; display: inline-block; width: 14px; height: 3px; margin: 0 6px 3px 0;
  border-radius: 2px; background: var(--blue);
}
.legend .raw::before { opacity: .38; }
.legend .eval::before { background: var(--orange); }
.legend .mark::before {
  background: repeating-linear-gradient(90deg, var(--soft) 0 4px, transparent 4px 7px);
}
.legend .best::before {
  background: var(--green); width: 9px; height: 9px; border-radius: 50%; margin-bottom: 0;
}
"""
