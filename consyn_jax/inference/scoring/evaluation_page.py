"""Write the table of an evaluation as one HTML page without network access or scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from consyn_jax.inference.scoring.comparison_table import Section, Value
from consyn_jax.inference.scoring.resampling import Interval
from consyn_jax.pages import escape, html_page

STYLE = """
td span { display: block; color: var(--soft); font-size: 12px; }
td svg { display: block; margin-top: 3px; }
.plain { color: var(--soft); font-size: 12.5px; }
"""
WIDTH, HEIGHT, EDGE = 160, 10, 4  # sizes in the drawing of an interval


def evaluation_page(content: Mapping[str, Any], sections: Sequence[Section]) -> str:
    """Return the HTML page of an evaluation, from the result of `Evaluation.as_json`.

    Each row is a metric, and each column is a model. A cell has the value, its interval as numbers
    and as a drawing, the difference from the first model, and the share of changed answers. The
    drawings in a row have the same scale.
    """
    models = [model["name"] for model in content["models"]]
    body = [_models(content["models"])]
    body += [_section(section, models) for section in sections]
    body.append(_settings(content["settings"], str(content["version"])))
    return html_page("Evaluation", STYLE, "\n".join(body), "the numbers of consyn-evaluate")


def _models(models: Sequence[Mapping[str, Any]]) -> str:
    rows = [(m["name"], m["taken"], m["run_as"]) for m in models]
    return _table("Models", ("model", "taken", "run as"), rows)


def _section(section: Section, models: Sequence[str]) -> str:
    head = _row("th", [escape(cell) for cell in ("", *models)])
    lines = [
        _row("td", [escape(metric), *(_cell(value, _scale(row)) for value in row)])
        for metric, row in section.values.items()
    ]
    notes = "".join(
        f"<p class='plain'>{escape(f'{model}: {note}')}</p>"
        for model, own in zip(models, section.notes, strict=True)
        for note in own
    )
    title = escape(f"{section.name} ({section.size})")
    return (
        f"<section><h2>{title}</h2><div class='wide'><table>{head}{''.join(lines)}</table></div>"
        f"{notes}</section>"
    )


def _scale(row: Sequence[Value | None]) -> Interval | None:
    """The smallest and the largest bound of the intervals in a row; None if there are none."""
    found = [value.interval for value in row if value is not None and value.interval is not None]
    finite = [each for each in found if abs(each.low) < 1e300 and abs(each.high) < 1e300]
    if not finite:
        return None
    return Interval(min(each.low for each in finite), max(each.high for each in finite))


def _cell(value: Value | None, scale: Interval | None) -> str:
    if value is None:
        return ""
    text = f"<b>{value.value:.6g}</b>"
    if value.interval is not None:
        text += f"<span>95 %: {value.interval.low:.4g} to {value.interval.high:.4g}</span>"
        text += _drawing(value, value.interval, scale)
    if value.difference is not None:
        own = value.difference_interval
        interval = "" if own is None else f" ({own.low:+.4g} to {own.high:+.4g})"
        text += f"<span>{value.difference:+.4g}{interval} from the first</span>"
    if value.changed is not None:
        text += f"<span>{value.changed:.1%} of answers changed</span>"
    return text


def _drawing(value: Value, interval: Interval, scale: Interval | None) -> str:
    if scale is None or not scale.low < scale.high:
        return ""

    def place(number: float) -> float:
        share = (number - scale.low) / (scale.high - scale.low)
        return EDGE + min(max(share, 0.0), 1.0) * (WIDTH - 2 * EDGE)

    low, middle, high = map(place, (interval.low, value.value, interval.high))
    y = HEIGHT / 2
    return (
        f"<svg width='{WIDTH}' height='{HEIGHT}' role='img' aria-label='95 % interval'>"
        f"<line x1='{low:.1f}' x2='{high:.1f}' y1='{y}' y2='{y}' stroke='var(--soft)'/>"
        f"<circle cx='{middle:.1f}' cy='{y}' r='3.5' fill='var(--blue)'/></svg>"
    )


def _settings(settings: Mapping[str, Any], version: str) -> str:
    rows = [(name, _shown(value)) for name, value in settings.items()]
    return _table("Settings", ("flag", "value"), [*rows, ("consyn-jax", version)])


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else str(value)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [_row("th", map(escape, head)), *(_row("td", map(escape, row)) for row in rows)]
    return (
        f"<section><h2>{escape(title)}</h2><div class='wide'><table>{''.join(lines)}</table></div>"
        "</section>"
    )


def _row(tag: str, cells: Any) -> str:
    return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"
