"""The results of runs, and what differs between them, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from consyn_jax.reporting.recorded_run import RecordedRun, differing
from consyn_jax.reporting.runs_page import shown


def as_lines(runs: Sequence[RecordedRun]) -> list[str]:
    """A table with a line for each run, and one with a line for each flag that differs."""
    head = ["run", *(runs[0].results if runs else ())]
    rows = [[run.name, *(shown(*item) for item in run.results.items())] for run in runs]
    lines = list(_aligned([head, *rows]))
    found = differing(runs) if len(runs) > 1 else []
    if found:
        values = [[name, *texts] for name, texts in found]
        lines += ["", *_aligned([["what differs", *(run.name for run in runs)], *values])]
    return lines


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(
            f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)
        ).rstrip()
