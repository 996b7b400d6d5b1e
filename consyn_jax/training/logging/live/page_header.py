"""The header of `report.html`: the main facts about a run, and the rest in a collapsed section."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence

from consyn_jax.pages import escape, unbroken

# Header rows about how the run computes; the page collapses them.
DETAILS = frozenset(
    {
        "attention",
        "precision",
        "optimizer",
        "weights",
        "rows",
        "cleaned",
        "packing",
        "tokenizer",
        "output",
        "compiled programs",
    }
)


def header_section(about: Sequence[tuple[str, str]], duration: str) -> str:
    """Format the header as HTML.

    Args:
        about: Header rows, as (name, text).
        duration: Time of the run so far, as text; "" if unknown.
    """
    first = [row for row in about if row[0] not in DETAILS]
    rest = [row for row in about if row[0] in DETAILS]
    times = [("duration", duration)] if duration else []
    shown = _rows([*first, *times, ("page written", now())])
    folded = f"<details><summary>More</summary>{_rows(rest)}</details>" if rest else ""
    return f"<section class='about'>{shown}{folded}</section>"


def _rows(rows: Sequence[tuple[str, str]]) -> str:
    lines = []
    for name, text in rows:
        shown = f"<code>{unbroken(text)}</code>" if name == "command" else unbroken(text)
        lines.append(f"<tr><td>{escape(name)}</td><td>{shown}</td></tr>")
    return f"<div class='wide whole'><table>{''.join(lines)}</table></div>"


def command_rows(config: Mapping[str, object], origins: Mapping[str, str]) -> list[tuple[str, str]]:
    """The command that started a run, as a header row; an empty list for a run from Python.

    Args:
        config: Values by flag name, as the user gave them; batch sizes are those before an
            automatic reduction.
        origins: Origin of each value.
    """
    if not origins or "keyword" in origins.values():
        return []
    files = {o.removeprefix("file ") for o in origins.values() if o.startswith("file ")}
    words = ["consyn-train", *(word for file in sorted(files) for word in ("--config", file))]
    for name, value in config.items():
        if origins.get(name) == "flag" and value is not None:
            values = value if isinstance(value, (list, tuple)) else [value]
            words += [f"--{name}", *(_word(one) for one in values)]
    return [("command", shlex.join(words))]


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def now() -> str:
    """The date and time of day, as text."""
    return time.strftime("%Y-%m-%d %H:%M %z")


HEADER_STYLE = """
code { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.about details { margin: 6px 0 0; }
"""
