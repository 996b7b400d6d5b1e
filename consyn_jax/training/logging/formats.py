"""Format numbers, durations and texts for people."""

from __future__ import annotations

import math


def compact(value: float | int) -> str:
    """Format a number with three digits and a unit.

    >>> [compact(v) for v in (0.5, 999.4, 12345.0, 1.26e6, float("nan"))]
    ['0.5', '999', '12.3k', '1.26M', 'nan']
    """
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def decimals(value: float | int) -> str:
    """As many decimals as are useful, at most four.

    >>> [decimals(v) for v in (3.21, 24.83, 48213.7, 2e9)]
    ['3.2100', '24.83', '48,214', '2e+09']
    """
    for limit, shown in ((10, ".4f"), (10_000, ".2f"), (1e9, ",.0f")):
        if abs(value) < limit:
            return format(value, shown)
    return f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Hours, minutes, seconds.

    >>> duration(3725.4), duration(200_000.0), duration(None)
    ('1:02:05', '2 d 7:33:20', '-:--:--')
    """
    if seconds is None or not math.isfinite(seconds):
        return "-:--:--"
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days = f"{hours // 24} d " if hours >= 48 else ""
    return f"{days}{hours % 24 if days else hours}:{minute:02}:{second:02}"
