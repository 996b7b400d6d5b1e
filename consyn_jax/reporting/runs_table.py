"""Text tables of the results of runs, and of the flags that differ between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from consyn_jax.reporting.recorded_run import RecordedRun, differing
from consyn_jax.reporting.runs_page import shown

WIDTH = 80


def as_lines(runs: Sequence[RecordedRun]) -> list[str]:
    """Return two tables as lines, with a row per run: the results, and the flags that differ."""
    head = ["run", *(runs[0].results if runs else ())]
    rows = [[run.name, *(shown(*item) for item in run.results.items())] for run in runs]
    lines = list(_in_blocks([head, *rows]))
    found = differing(runs) if len(runs) > 1 else []
    if found:
        values = [[run.name, *(texts[i] for _, texts in found)] for i, run in enumerate(runs)]
        lines += ["", "What differs:", *_in_blocks([["run", *(n for n, _ in found)], *values])]
    return lines


def _in_blocks(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Align the columns, and split a table wider than `WIDTH` characters into several blocks.

    Each block has the first column and at least one other column, even if they exceed `WIDTH`.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numeric = [all(_is_number(row[n]) for row in rows[1:]) for n in range(len(widths))]
    blocks = [[0]]
    for n in range(1, len(widths)):
        if sum(widths[i] + 2 for i in [*blocks[-1], n]) - 2 > WIDTH and len(blocks[-1]) > 1:
            blocks.append([0])
        blocks[-1].append(n)
    for number, block in enumerate(blocks):
        if number:
            yield ""
        yield from _aligned(rows, block, widths, numeric)


def _aligned(
    rows: Sequence[Sequence[str]],
    block: Sequence[int],
    widths: Sequence[int],
    numeric: Sequence[bool],
) -> Iterator[str]:
    for row in rows:
        cells = (f"{row[n]:{'>' if numeric[n] else '<'}{widths[n]}}" for n in block)
        yield "  ".join(cells).rstrip()


def _is_number(text: str) -> bool:
    return not text or text[0] in "-.0123456789"
