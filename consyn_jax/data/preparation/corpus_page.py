"""`report.html` of a token store: `report.json` as a page to read.

The page needs no network and no script. It shows neither times nor the store's path, so equal
inputs give equal bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from consyn_jax.data.preparation.corpus_report import CHANGES, NOTICES, RULES, Report
from consyn_jax.pages import escape, html_page

PAGE = "report.html"
SHOWN = 200  # maximum number of sources, and of files left out, that the page lists

Rows = Iterable[tuple[object, ...]]


def page(report: Report, title: str, settings: Mapping[str, object]) -> str:
    """Make the HTML page: documents kept and left out, splits, lengths, examples, settings.

    Args:
        settings: values by flag name; only settings that determine the store's content, so that
            equal stores have equal pages.
    """
    sections = [
        _tiles(report),
        _documents(report),
        _table("Formats of the rows", ("format", "rows"), report.formats.items(), _FORMATS_NOTE),
        _table("Fields that are not read", ("key", "rows"), report.unread.items()),
        _example(report),
        _table("Noticed", ("what", "count"), _named(report.noticed, NOTICES)),
        _table("Changes to the text", ("change", "count"), _named(report.changed, CHANGES)),
        _table("Splits", _SPLIT_HEAD, _splits(report), _SPLIT_NOTE),
        _lengths(report),
        _samples(report),
        _sources(report),
        _left_out(report),
        _table("Settings", ("flag", "value"), settings.items()),
    ]
    text = html_page(title, _STYLE, "\n".join(filter(None, sections)), "report.json")
    return text.encode("utf-8", "backslashreplace").decode()  # names of files need not be UTF-8


def bytes_per_token(counts: Mapping[str, int]) -> float | None:
    """Bytes of text per token of a split; None if the split has no token of text.

    EOS tokens are not counted, because they have no text.

    >>> bytes_per_token({"documents": 1, "tokens": 11, "bytes": 42})
    4.2
    """
    tokens = counts.get("tokens", 0) - counts.get("documents", 0)
    return counts.get("bytes", 0) / tokens if tokens > 0 else None


def size(num_bytes: int | float) -> str:
    """A number of bytes with a decimal unit.

    >>> size(999), size(3_553_963), size(1e12)
    ('999 B', '3.6 MB', '1.0 TB')
    """
    value, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


_SPLIT_HEAD = ("split", "documents", "share", "tokens", "trained on", "bytes", "bytes per token")
_FORMATS_NOTE = "Rows by format, from --row_format or recognised by their keys."
_SPLIT_NOTE = (
    "Tokens include one EOS for each document; bytes per token are computed without EOS. "
    "Trained on: share of the tokens that count in the loss."
)


def _tiles(report: Report) -> str:
    totals, plural = _totals(report), "" if len(report.splits) == 1 else "s"
    read = f"{_share(report.kept, report.documents)} of {report.documents:,} read"
    tiles = [
        ("documents kept", f"{report.kept:,}", read),
        ("tokens", f"{totals['tokens']:,}", f"in {len(report.splits)} split{plural}"),
        ("text", size(totals["bytes"]), f"from files of {size(report.file_bytes)}"),
        ("bytes per token", _ratio(totals), "more means fewer tokens"),
    ]
    cells = (
        f"<div><span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>"
        for name, value, note in tiles
    )
    return f'<section class="tiles">{"".join(cells)}</section>'


def _documents(report: Report) -> str:
    """Make the section on documents: a bar and a table of the documents that each rule left out."""
    rows: list[tuple[object, ...]] = []
    parts, left = [("kept", report.kept, "kept")], report.documents
    for number, rule in enumerate(_rules(report)):
        dropped = report.dropped.get(rule, 0)
        rows.append((rule, left, dropped, _share(dropped, report.documents), left - dropped))
        parts.append((rule, dropped, f"r{number % 6}"))
        left -= dropped
    bar = "".join(
        f'<div class="{look}" style="flex-grow:{count}" '
        f'title="{escape(f"{name}: {count:,}")}"></div>'
        for name, count, look in parts
        if count
    )
    legend = "".join(
        f'<span class="{look}">{escape(name)} {_share(count, report.documents)}</span>'
        for name, count, look in parts
        if count
    )
    drawn = f'<div class="bar">{bar}</div><div class="legend">{legend}</div>' if bar else ""
    table = _wide(("rule", "documents in", "left out", "share of all", "documents out"), rows)
    return f"<section><h2>Documents</h2>{drawn}{table}</section>"


def _named(counts: Mapping[str, int], names: Mapping[str, str]) -> Rows:
    return [(names.get(name, name), n) for name, n in sorted(counts.items()) if n]


def _example(report: Report) -> str:
    """Make the section with the prompt and the target of the first row that has a prompt."""
    if not report.example:
        return ""
    _, prompt, target = report.example
    figures = "".join(
        f'<figure><figcaption>{name}</figcaption><pre dir="auto">{escape(text)}</pre></figure>'
        for name, text in (("prompt (its end)", prompt), ("target (its beginning)", target))
    )
    return f"<section><h2>The first row with a prompt</h2>{figures}</section>"


def _splits(report: Report) -> Rows:
    totals, splits = _totals(report), dict(report.splits)
    if len(splits) > 1:
        splits["all"] = totals
    for name, counts in splits.items():
        documents, tokens = counts.get("documents", 0), counts.get("tokens", 0)
        share = _share(documents, totals["documents"])
        trained_on = _share(counts.get("target_tokens", tokens), tokens)
        num_bytes = counts.get("bytes", 0)
        yield name, documents, share, tokens, trained_on, num_bytes, _ratio(counts)


def _lengths(report: Report) -> str:
    drawn = _histogram("Bytes in a document", report.document_bytes)
    drawn += _histogram("Tokens in a document", report.document_tokens)
    note = "<p>Kept documents by length; each range ends at twice its beginning.</p>"
    return f"<section><h2>Lengths</h2>{note}{drawn}</section>" if drawn else ""


def _histogram(title: str, counts: Mapping[str, int]) -> str:
    """Draw a histogram of lengths with horizontal bars.

    Each bar counts the lengths from one power of two up to the next. Empty bars between the
    shortest and the longest length are drawn as well.
    """
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
    table = f'<table class="histogram">{"".join(rows)}</table>'
    return f'<h3>{escape(title)}</h3><div class="wide all">{table}</div>'


def _samples(report: Report) -> str:
    figures = []
    for rule in _rules(report):
        examples = report.examples.get(rule, [])
        if examples:
            count = report.dropped.get(rule, len(examples))
            shown = f", the first {len(examples)} of them" if count > len(examples) else ""
            texts = "".join(f'<pre dir="auto">{escape(example)}</pre>' for example in examples)
            figures.append(
                f"<figure><figcaption>{escape(rule)}: {count:,}{shown}</figcaption>{texts}</figure>"
            )
    title = "Examples of documents that were left out"
    return f"<section><h2>{title}</h2>{''.join(figures)}</section>" if figures else ""


def _sources(report: Report) -> str:
    keys = ("name", "kind", "documents", "kept")
    rows = (tuple(source.get(key, "") for key in keys) for source in report.sources[:SHOWN])
    title, note = f"Sources: {len(report.sources):,}", _more(len(report.sources), "sources")
    return _table(title, ("name", "type", "documents", "kept"), rows, note)


def _left_out(report: Report) -> str:
    rows = (tuple(entry[:2]) for entry in report.left_out[:SHOWN])
    title, note = f"Files left out: {len(report.left_out):,}", _more(len(report.left_out), "files")
    return _table(title, ("name", "reason"), rows, note)


def _more(count: int, what: str) -> str:
    if count <= SHOWN:
        return ""
    return f"Only the first {SHOWN} {what} are shown; report.json lists all {count:,}."


def _rules(report: Report) -> list[str]:
    return [*RULES, *sorted({*report.dropped, *report.examples} - set(RULES))]


def _totals(report: Report) -> dict[str, int]:
    names = ("documents", "tokens", "target_tokens", "bytes")
    return {name: sum(counts.get(name, 0) for counts in report.splits.values()) for name in names}


def _table(title: str, head: Sequence[str], rows: Rows, note: str = "") -> str:
    rows = list(rows)
    if not rows:
        return ""
    text = f"<p>{escape(note)}</p>" if note else ""
    return f"<section><h2>{escape(title)}</h2>{text}{_wide(head, rows)}</section>"


def _wide(head: Sequence[str], rows: Rows) -> str:
    top = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(_cell(cell))}</td>' for cell in row)}</tr>" for row in rows
    )
    return f'<div class="wide"><table>{top}{body}</table></div>'


def _ratio(counts: Mapping[str, int]) -> str:
    ratio = bytes_per_token(counts)
    return "-" if ratio is None else f"{ratio:.3f}"


def _share(part: int, whole: int) -> str:
    """`part` of `whole` as a percentage; a proper part is never rounded to 0 % or 100 %.

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
@media (prefers-color-scheme: dark) {
  :root { --r0: #e07b78; --r1: #7b828d; --r2: #e8c262; }
  :root { --r3: #b195d6; --r4: #f0a05a; --r5: #6cc5c1; }
}
h3 { font-size: 14px; font-weight: 600; margin: 14px 0 4px; }
p { margin: 0 0 8px; color: var(--soft); font-size: 13.5px; }
.bar { display: flex; height: 22px; border-radius: 6px; overflow: hidden; }
.bar div { flex-basis: 0; min-width: 2px; }
.kept { --look: var(--blue); }
.r0 { --look: var(--r0); } .r1 { --look: var(--r1); } .r2 { --look: var(--r2); }
.r3 { --look: var(--r3); } .r4 { --look: var(--r4); } .r5 { --look: var(--r5); }
.bar div, .legend span::before { background: var(--look); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 6px 0 12px; }
.legend { color: var(--soft); font-size: 13px; }
.legend span::before { content: ""; display: inline-block; width: 10px; height: 10px; }
.legend span::before { margin-right: 6px; border-radius: 2px; }
figure { margin: 0 0 14px; }
pre { margin: 4px 0 0; padding: 8px 14px; max-height: 200px; overflow-y: auto; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
.histogram td { padding: 2px 14px; border: 0; vertical-align: middle; }
.histogram td { text-align: right; white-space: nowrap; }
.histogram td:nth-child(2) { width: 100%; padding: 2px 0; text-align: left; }
.histogram i { display: block; height: 12px; min-width: 1px; }
.histogram i { background: var(--blue); border-radius: 2px; }
.all { max-height: none; }
"""
