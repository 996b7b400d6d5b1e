"""`report.html` of a token store: what `report.json` says, for people. One file that needs no network and no script.

There are no times in it and no places of ours, so equal inputs give equal bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from consyn_jax.data.html_page import escape, html_page
from consyn_jax.data.report import CHANGES, RULES, Report

SHOWN = 200  # of sources, and of files left out: a data set of thousands of files still is a page

Rows = Iterable[tuple[str, ...]]


def page(report: Report, title: str, settings: Mapping[str, object]) -> str:
    """The page: counts in and out per rule, splits, lengths, samples of what was left out, sources and settings.

    Args:
        settings: values by flag name; only those that decide the content belong here, if equal stores shall have equal pages.
    """
    sections = [
        _tiles(report),
        _documents(report),
        _table("Changed", ("what", "how many"), _changes(report), "Text that was not taken as it was found."),
        _table("Splits", ("", "documents", "share", "tokens", "learned", "bytes", "bytes per token"), _splits(report), _SPLIT_NOTE),
        _lengths(report),
        _samples(report),
        _sources(report),
        _left_out(report),
        _table("Settings", ("flag", "value"), ((name, _cell(value)) for name, value in settings.items())),
    ]
    text = html_page(title, _STYLE, "\n".join(filter(None, sections)), "report.json")
    return text.encode("utf-8", "backslashreplace").decode()  # names of files need not be UTF-8


def bytes_per_token(counts: Mapping[str, int]) -> float | None:
    """Of a split's counts, its EOS tokens left out, which stand for no text; None where there is no token of text.

    >>> bytes_per_token({"documents": 1, "tokens": 11, "bytes": 42})
    4.2
    """
    tokens = counts.get("tokens", 0) - counts.get("documents", 0)
    return counts.get("bytes", 0) / tokens if tokens > 0 else None


def size(num_bytes: int | float) -> str:
    """Bytes in the largest decimal unit.

    >>> size(999), size(3_553_963), size(1e12)
    ('999 B', '3.6 MB', '1.0 TB')
    """
    value, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


# -------------------------------------------------------------------------------------------------------------------- sections

_SPLIT_NOTE = "Every document ends with one EOS token, which is counted; bytes per token are without it. Learned: tokens that give a loss."


def _tiles(report: Report) -> str:
    totals = _totals(report)
    ratio = bytes_per_token(totals)
    tiles = [
        ("documents kept", f"{report.kept:,}", f"{_share(report.kept, report.documents)} of {report.documents:,} read"),
        ("tokens", f"{totals['tokens']:,}", f"in {len(report.splits)} split{'' if len(report.splits) == 1 else 's'}"),
        ("text", size(totals["bytes"]), f"from files of {size(report.file_bytes)}"),
        ("bytes per token", "-" if ratio is None else f"{ratio:.3f}", "more is shorter"),
    ]
    cells = (f"<div><span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>" for name, value, note in tiles)
    return f'<section class="tiles">{"".join(cells)}</section>'


def _documents(report: Report) -> str:
    """In and out, rule by rule, in the order in which the rules look at a document; above it the same as a bar."""
    rows, left = [], report.documents
    for rule in _rules(report):
        dropped = report.dropped.get(rule, 0)
        rows.append((rule, f"{left:,}", f"{dropped:,}", _share(dropped, report.documents), f"{left - dropped:,}"))
        left -= dropped
    counts = [("kept", report.kept, "kept"), *((rule, report.dropped.get(rule, 0), f"r{i % 6}") for i, rule in enumerate(_rules(report)))]
    present = [(name, count, look) for name, count, look in counts if count]
    parts = (f'<div class="{look}" style="flex-grow:{count}" title="{escape(f"{name}: {count:,}")}"></div>' for name, count, look in present)
    legend = "".join(f'<span class="{look}">{escape(name)} {_share(count, report.documents)}</span>' for name, count, look in present)
    bar = f'<div class="bar">{"".join(parts)}</div><div class="legend">{legend}</div>' if present else ""
    return f"<section><h2>Documents</h2>{bar}{_wide(('rule', 'in', 'left out', 'of all', 'remain'), rows)}</section>"


def _changes(report: Report) -> Rows:
    return [(CHANGES.get(name, name), f"{count:,}") for name, count in sorted(report.changed.items()) if count]


def _splits(report: Report) -> Rows:
    documents = _totals(report)["documents"]
    named = [*report.splits.items(), *([("all", _totals(report))] if len(report.splits) > 1 else [])]
    for name, counts in named:
        ratio, tokens = bytes_per_token(counts), counts.get("tokens", 0)
        yield (
            name,
            f"{counts.get('documents', 0):,}",
            _share(counts.get("documents", 0), documents),
            f"{tokens:,}",
            _share(counts.get("target_tokens", tokens), tokens),
            f"{counts.get('bytes', 0):,}",
            "-" if ratio is None else f"{ratio:.3f}",
        )


def _lengths(report: Report) -> str:
    charts = (_histogram("Bytes in a document", report.document_bytes), _histogram("Tokens in a document", report.document_tokens))
    drawn = "".join(filter(None, charts))
    return f"<section><h2>Lengths</h2><p>Documents that were kept, by the power of two that their length reaches.</p>{drawn}</section>" if drawn else ""


def _histogram(title: str, counts: Mapping[str, int]) -> str:
    """Horizontal bars, one a power of two, the empty ones between the first and the last too."""
    known = {int(key): count for key, count in counts.items()}
    if not known:
        return ""
    bounds = [0, *(1 << power for power in range(max(known).bit_length()))]
    bounds = [bound for bound in bounds if bound >= min(known)]
    most, rows = max(known.values()), []
    for bound in bounds:
        count = known.get(bound, 0)
        name = f"{bound:,}" if bound < 2 else f"{bound:,} to {2 * bound - 1:,}"
        drawn = f'<i style="width:{100 * count / most:.2f}%"></i>' if count else ""
        rows.append(f"<tr><td>{name}</td><td>{drawn}</td><td>{count:,}</td></tr>")
    return f'<h3>{escape(title)}</h3><div class="wide all"><table class="histogram">{"".join(rows)}</table></div>'


def _samples(report: Report) -> str:
    figures = []
    for rule in _rules(report):
        examples = report.examples.get(rule, [])
        if examples:
            count = report.dropped.get(rule, len(examples))
            shown = f", the first {len(examples)}" if count > len(examples) else ""
            texts = "".join(f'<pre dir="auto">{escape(example)}</pre>' for example in examples)
            figures.append(f"<figure><figcaption>{escape(rule)}: {count:,}{shown}</figcaption>{texts}</figure>")
    return f"<section><h2>Samples of what was left out</h2>{''.join(figures)}</section>" if figures else ""


def _sources(report: Report) -> str:
    def cells(source: Mapping[str, object]) -> tuple[str, ...]:
        return tuple(_cell(source.get(key, "")) for key in ("name", "kind", "documents", "kept"))

    note = _more(len(report.sources), "sources")
    return _table(f"Sources: {len(report.sources):,}", ("name", "kind", "documents", "kept"), map(cells, report.sources[:SHOWN]), note)


def _left_out(report: Report) -> str:
    rows = (tuple(map(str, entry[:2])) for entry in report.left_out[:SHOWN])
    return _table(f"Files left out: {len(report.left_out):,}", ("name", "reason"), rows, _more(len(report.left_out), "files"))


def _more(count: int, what: str) -> str:
    return f"The first {SHOWN} {what}; report.json lists the {count - SHOWN:,} more." if count > SHOWN else ""


def _rules(report: Report) -> list[str]:
    return [*RULES, *sorted({*report.dropped, *report.examples} - set(RULES))]


def _totals(report: Report) -> dict[str, int]:
    names = ("documents", "tokens", "target_tokens", "bytes")
    return {name: sum(counts.get(name, 0) for counts in report.splits.values()) for name in names}


# ------------------------------------------------------------------------------------------------------------------------ parts


def _table(title: str, head: Sequence[str], rows: Rows, note: str = "") -> str:
    rows = list(rows)
    if not rows:
        return ""
    return f"<section><h2>{escape(title)}</h2>{f'<p>{escape(note)}</p>' if note else ''}{_wide(head, rows)}</section>"


def _wide(head: Sequence[str], rows: Rows) -> str:
    top = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table>{top}{body}</table></div>'


def _share(part: int, whole: int) -> str:
    """A percentage that is not rounded to none or to all.

    >>> _share(1, 3), _share(1, 10**6), _share(10**6 - 1, 10**6), _share(0, 0)
    ('33.3 %', '< 0.1 %', '> 99.9 %', '0 %')
    """
    if part in (0, whole):
        return "100 %" if part else "0 %"
    percent = 100 * part / whole
    return "< 0.1 %" if percent < 0.1 else "> 99.9 %" if percent > 99.9 else f"{percent:.1f} %"


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


_STYLE = """
:root { --r0: #b3423f; --r1: #8a8f98; --r2: #d9a31a; --r3: #7d5ba6; --r4: #d9731a; --r5: #2f8f8b; }
@media (prefers-color-scheme: dark) { :root { --r0: #e07b78; --r1: #7b828d; --r2: #e8c262; --r3: #b195d6; --r4: #f0a05a; --r5: #6cc5c1; } }
h3 { font-size: 14px; font-weight: 600; margin: 14px 0 4px; }
p { margin: 0 0 8px; color: var(--soft); font-size: 13.5px; }
.bar { display: flex; height: 22px; border-radius: 6px; overflow: hidden; }
.bar div { flex-basis: 0; min-width: 2px; }
.kept { --look: var(--blue); }
.r0 { --look: var(--r0); } .r1 { --look: var(--r1); } .r2 { --look: var(--r2); }
.r3 { --look: var(--r3); } .r4 { --look: var(--r4); } .r5 { --look: var(--r5); }
.bar div, .legend span::before { background: var(--look); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 6px 0 12px; color: var(--soft); font-size: 13px; }
.legend span::before { content: ""; display: inline-block; width: 10px; height: 10px; margin-right: 6px; border-radius: 2px; }
figure { margin: 0 0 14px; }
pre { margin: 4px 0 0; padding: 8px 14px; background: var(--card); border: 1px solid var(--rule); border-radius: 8px; max-height: 200px; overflow-y: auto; }
.histogram td { padding: 2px 14px; border: 0; vertical-align: middle; text-align: right; white-space: nowrap; }
.histogram td:nth-child(2) { width: 100%; padding: 2px 0; text-align: left; }
.histogram i { display: block; height: 12px; min-width: 1px; background: var(--blue); border-radius: 2px; }
.all { max-height: none; }
"""
