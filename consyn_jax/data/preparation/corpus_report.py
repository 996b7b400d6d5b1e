"""The report of a preparation: counts and lengths of documents, and examples of dropped ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from consyn_jax.data.saved_values import check_types
from consyn_jax.errors import UserError, with_urls
from consyn_jax.prepare_config import CorpusOptions

REPORT = "report.json"
EXAMPLES = 5
EXAMPLE_CHARS = 200
UNREAD_KEYS = 100
RULES = ("bad row", "empty", "too short", "too long", "duplicate", "near duplicate")
CHANGES = {
    "invalid_utf8": "places that were not UTF-8, replaced by U+FFFD",
    "normalized": "texts converted to the Unicode normal form",
    "control_characters": "control characters removed",
    "unknown": "places that the tokenizer cannot encode, replaced by its unknown token",
}
NOTICES = {
    "unwritten": "conversations with messages, tool calls or tools that the chat template leaves "
    "out",
    "equal": "pairs whose chosen and rejected answers are equal, so that nothing is learned",
    "prompt_end": "pairs in which the last tokens of the prompt change when an answer follows; "
    "these tokens count as part of the answers",
    "markers": "rows with a chat model's markers, which are read as plain text; give such rows as "
    "messages",
}


class Counts(Protocol):
    """Counts that `Report.take` adds to a report; the attributes are described in `Report`."""

    rows_not_utf8: int
    changed: dict[str, int]
    noticed: dict[str, int]
    formats: dict[str, int]
    unread: dict[str, int]
    example: list[str]


@dataclass
class Report:
    """Counts of one preparation. It has no times, so that equal inputs give equal reports.

    Attributes:
        documents: number of documents read, including those in `dropped`.
        file_bytes: bytes of the files read, before decompression.
        dropped: number of documents left out, by the names of `RULES`.
        changed: number of changes, by the names of `CHANGES`. In "normalized", each message
            of a chat and each part of a long document counts separately.
        noticed: number of documents with an unusual feature, by the names of `NOTICES`.
        formats: number of documents by the format of their rows.
        unread: number of rows with a key that their format does not use, by key; at most
            `UNREAD_KEYS` keys.
        example: three strings about the first row with a prompt: its format, the end of the prompt,
            and the beginning of the target. Empty if no row has a prompt.
        examples: by rule, the first few documents left out, as "place: beginning of the text".
        splits: for each split, its number of documents, tokens (including each document's EOS),
            target_tokens, and bytes of text in UTF-8.
        document_bytes, document_tokens: histograms of the lengths of kept documents; the bin with
            key n (a power of two, or 0) counts lengths from n to below 2 n.
        sources: for each source, its name, its kind, and its numbers of documents read and kept.
        left_out: files that were not read, each with the reason.
        rows_not_utf8: number of rows that were not UTF-8, repaired ones included.
    """

    documents: int = 0
    file_bytes: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    splits: dict[str, dict[str, int]] = field(default_factory=dict)
    document_bytes: dict[str, int] = field(default_factory=dict)
    document_tokens: dict[str, int] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[list[str]] = field(default_factory=list)
    rows_not_utf8: int = 0
    noticed: dict[str, int] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)
    example: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, saved: Any) -> Report:
        """Restore a report from its JSON.

        Raises:
            TypeError, ValueError, KeyError: the content is damaged.
        """
        report = cls(**saved)
        check_types(report)
        report.in_order()  # raises an error for unknown names in the tables
        for source in report.sources:
            for name in ("documents", "kept"):
                if type(source[name]) is not int:
                    raise TypeError(f"{name} is {source[name]!r:.50}")
        return report

    @property
    def kept(self) -> int:
        """Number of documents that were kept."""
        return self.documents - sum(self.dropped.values())

    def drop(self, rule: str, place: str, text: str) -> None:
        """Count a dropped document; the first few of each rule are also recorded as examples."""
        self.dropped[rule] = self.dropped.get(rule, 0) + 1
        self.show(rule, place, text)

    def show(self, rule: str, place: str, text: str) -> None:
        """Record a dropped document as an example, unless the rule has enough examples already."""
        shown = self.examples.setdefault(rule, [])
        if len(shown) < EXAMPLES:
            # A message about a bad row follows the place directly; other text is quoted after a
            # colon.
            place = with_urls(place)
            shown.append(
                f"{place} {text}" if rule == "bad row" else f"{place}: {text[:EXAMPLE_CHARS]}"
            )

    def take(self, result: Counts, most_unread: float = UNREAD_KEYS) -> None:
        """Add the counts of later documents.

        Args:
            most_unread: largest number of keys in the table "unread".
        """
        self.rows_not_utf8 += result.rows_not_utf8
        for name in ("changed", "noticed", "formats", "unread"):
            self.add(name, getattr(result, name), most_unread)
        self.example = self.example or result.example

    def join(self, later: Report) -> None:
        """Add the counts and the examples of a report about later documents."""
        self.take(later)
        self.documents += later.documents
        for name in ("dropped", "document_bytes", "document_tokens"):
            self.add(name, getattr(later, name))
        for rule, shown in later.examples.items():
            named = map(with_urls, shown)  # a worker of another machine knows no URLs
            self.examples[rule] = [*self.examples.get(rule, []), *named][:EXAMPLES]

    def add(self, name: str, counts: Mapping[str, int], most_unread: float = UNREAD_KEYS) -> None:
        """Add counts to the table `name`."""
        table = getattr(self, name)
        for key, count in counts.items():
            if name == "unread" and key not in table and len(table) >= most_unread:
                continue  # each row may have new keys
            table[key] = table.get(key, 0) + count

    def keep(self, num_bytes: np.ndarray, num_tokens: np.ndarray) -> None:
        """Add kept documents to the histograms of lengths.

        Args:
            num_bytes: length of each document in bytes, int [n].
            num_tokens: length of each document in tokens, int [n].
        """
        for lengths, histogram in (
            (num_bytes, self.document_bytes),
            (num_tokens, self.document_tokens),
        ):
            # frexp gives the exponent e with 2**(e-1) <= length < 2**e, exact below 2**53.
            exponents, counts = np.unique(
                np.frexp(lengths.astype(np.float64))[1], return_counts=True
            )
            for exponent, count in zip(exponents.tolist(), counts.tolist(), strict=True):
                key = str(1 << (exponent - 1) if exponent > 0 else 0)
                histogram[key] = histogram.get(key, 0) + count

    def in_order(self) -> Report:
        """A copy of the report with sorted tables.

        Unsorted tables would depend on where blocks end, and resuming a preparation changes where
        blocks end.
        """
        orders: dict[str, Callable[[str], Any]] = {
            "dropped": RULES.index,
            "changed": list(CHANGES).index,
            "noticed": list(NOTICES).index,
            "formats": str,
            "unread": str,
            "examples": RULES.index,
            "document_bytes": int,
            "document_tokens": int,
        }
        tables: dict[str, Any] = {
            name: dict(sorted(getattr(self, name).items(), key=lambda item: order(item[0])))
            for name, order in orders.items()
        }
        splits = {split: dict(sorted(counts.items())) for split, counts in self.splits.items()}
        return replace(self, **tables, splits=splits)


def read_report(directory: Path) -> Report:
    """The report of a finished store.

    Raises:
        OSError, ValueError, TypeError, KeyError: the report is missing or damaged.
    """
    return Report.of(json.loads((directory / REPORT).read_text(encoding="utf-8")))


def check_leniency(report: Report, options: CorpusOptions) -> None:
    """Refuse a store in which bad rows were skipped or repaired, if `options` make them an error.

    Raises:
        UserError: there were such rows. The message quotes the first row that was skipped, or says
            how many places are not UTF-8.
    """
    if options.on_bad_rows == "error" and report.dropped.get("bad row"):
        raise UserError(f"{report.examples['bad row'][0]} Fix the row, or give --on_bad_rows skip.")
    if options.invalid_utf8 == "error" and report.changed.get("invalid_utf8"):
        raise UserError(
            f"{report.changed['invalid_utf8']:,} places in the data are not UTF-8. Convert the "
            "files, or give --invalid_utf8 replace."
        )


def is_as_lenient(report: Report, options: CorpusOptions) -> bool:
    """Whether `options` agree with the preparation of `report` on rows that are not UTF-8.

    The answer is also true if there were no such rows, or if `options` make such rows an error,
    because `check_leniency` then raises the error.
    """
    repaired = "invalid_utf8" in report.changed
    stops = options.on_bad_rows == options.invalid_utf8 == "error"
    return not report.rows_not_utf8 or stops or repaired == (options.invalid_utf8 == "replace")
