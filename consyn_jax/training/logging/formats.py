"""Format numbers, durations and texts for people."""

from __future__ import annotations

import math
import shlex


def compact(value: float | int, digits: int = 3) -> str:
    """Format a number with a few digits and a suffix k, M or G.

    >>> [compact(v) for v in (0.5, 999.4, 12345.0, 1.26e6, float("nan"))]
    ['0.5', '999', '12.3k', '1.26M', 'nan']
    """
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.{digits}g}{unit}"
    return f"{value:.{digits}g}"


def decimals(value: float | int, most: int = 4) -> str:
    """Format a number with at most `most` decimals; larger numbers get fewer.

    >>> [decimals(v) for v in (3.21, 24.83, 48213.7, 2e9)]
    ['3.2100', '24.83', '48,214', '2e+09']
    """
    for limit, shown in ((10, f".{most}f"), (10_000, ".2f"), (1e9, ",.0f")):
        if abs(value) < limit:
            return format(value, shown)
    return f"{value:.3g}"


def typed(command: str, indent: str = "  ", width: int = 79) -> str:
    r"""Break a shell command into lines that can be pasted into a terminal together.

    >>> print(typed("consyn-train --config runs/a/config.yaml --max_steps 500", width=46))
      consyn-train --config runs/a/config.yaml \
          --max_steps 500
    """
    lines = [indent]
    for word in _words(command):
        longer = f"{lines[-1]}{word}" if lines[-1].isspace() else f"{lines[-1]} {word}"
        if len(longer) + 2 <= width or lines[-1].isspace():
            lines[-1] = longer
        else:
            lines.append(f"{indent}    {word}")
    return " \\\n".join(lines)


def _words(command: str) -> list[str]:
    """Split a command into words, each quoted for the shell."""
    return [shlex.quote(word) for word in shlex.split(command)]


def duration(seconds: float | None) -> str:
    """Format a duration as hours, minutes and seconds; with days if it is at least 48 hours.

    >>> duration(3725.4), duration(200_000.0), duration(None)
    ('1:02:05', '2 d 7:33:20', '-:--:--')
    """
    if seconds is None or not math.isfinite(seconds):
        return "-:--:--"
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days = f"{hours // 24} d " if hours >= 48 else ""
    return f"{days}{hours % 24 if days else hours}:{minute:02}:{second:02}"
