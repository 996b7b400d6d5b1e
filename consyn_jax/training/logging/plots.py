"""Drawing helpers: a PNG from a matplotlib figure, and bar charts of text."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def png(height: float, draw: Callable[[Figure], None]) -> bytes:
    """Make a PNG from a matplotlib figure, nine inches wide and `height` inches high.

    Args:
        draw: draws on the empty figure.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    image = io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # ignore the user's matplotlibrc
        figure = Figure(figsize=(9, height), dpi=150, layout="constrained")
        draw(figure)
        FigureCanvasAgg(figure).print_png(image)
    return image.getvalue()


def bars(eighths: np.ndarray, height: int, top: str, bottom: str) -> list[str]:
    r"""Draw a bar chart as lines of text, with an axis below.

    Args:
        eighths: height of the bar in each column, in eighths of a line.
        height: number of lines of text.
        top, bottom: labels of the first and the last line.

    >>> print("\n".join(bars(np.array([16, 9, 3]), 2, "1", "0")))
            1 ┤█▁
            0 ┤██▃
              └───
    """
    lines = []
    for row in range(height):
        filled = np.clip(eighths - 8 * (height - 1 - row), 0, 8)
        label = top if row == 0 else bottom if row == height - 1 else ""
        line = f"{label:>9} {'┤' if label else '│'}" + "".join(" ▁▂▃▄▅▆▇█"[n] for n in filled)
        lines.append(line.rstrip())
    return [*lines, " " * 10 + "└" + "─" * len(eighths)]
