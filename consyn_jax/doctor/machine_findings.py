"""Findings about a machine, and their layout as text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

PASS, INFO, WARN, FAIL = "pass", "info", "warn", "fail"
SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
NAME_WIDTH, LINE_WIDTH = 18, 88  # columns
INDENT = " " * (6 + NAME_WIDTH)


@dataclass(frozen=True)
class Finding:
    """The result of one check, shown as one line.

    Attributes:
        name: what was checked; unique on a host.
        status: "pass", "warn", "fail", or "info" for a figure without a known reference.
        found: the state that the check found.
        advice: what to do, one sentence; empty unless the status is "warn" or "fail".
        host: names of the hosts that the finding is about; empty if one machine is checked.
    """

    name: str
    status: str
    found: str
    advice: str = ""
    host: str = ""

    def __post_init__(self) -> None:
        assert bool(self.advice) == (self.status in (WARN, FAIL)), self


def lines(findings: Sequence[Finding]) -> list[str]:
    """Format findings as lines: the advice is below its finding, and the counts come last."""
    shown = []
    for each in findings:
        found = f"{each.host}: {each.found}" if each.host else each.found
        shown += _wrapped(f"{each.status:<4}  {each.name:<{NAME_WIDTH}}", found)
        if each.advice:
            shown += _wrapped(INDENT, f"-> {each.advice}")
    return [*shown, "", verdict(findings)]


def _wrapped(head: str, text: str) -> list[str]:
    width = LINE_WIDTH - len(INDENT)
    # A name that is longer than its column shifts the first line of its own finding only.
    parts = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]
    return [f"{head} {parts[0]}".rstrip(), *(f"{INDENT} {part}" for part in parts[1:])]


def verdict(findings: Iterable[Finding]) -> str:
    """Count the findings by status, in a sentence.

    >>> verdict([Finding("disk", PASS, "fine"), Finding("ECC", FAIL, "3 errors", "Reset it.")])
    '2 checks: 1 pass, 1 fail.'
    """
    statuses = [each.status for each in findings]
    counts = [(statuses.count(status), status) for status in (PASS, INFO, WARN, FAIL)]
    shown = ", ".join(f"{count} {status}" for count, status in counts if count)
    return f"{len(statuses)} check{'' if len(statuses) == 1 else 's'}: {shown}."


def size(number: float) -> str:
    """Format a number of bytes.

    >>> size(84_942_979_072), size(512)
    ('84.9 GB', '512 bytes')
    """
    for unit, name in SIZES:
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number:.0f} bytes"
