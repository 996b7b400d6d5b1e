"""What preparation has to say: counts in and out per rule, samples of what was left out, lengths, and where tokens came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

EXAMPLES = 5
EXAMPLE_CHARS = 200
RULES = ("bad row", "empty", "too short", "too long", "duplicate", "near duplicate")
CHANGES = {
    "invalid_utf8": "places that were not UTF-8, replaced by U+FFFD",
    "normalized": "texts brought to the Unicode normal form",
    "control_characters": "control characters removed",
}


@dataclass
class Report:
    """Counts of one preparation, in reading order and without times, so that equal inputs give equal reports.

    Attributes:
        documents: documents read; those of `dropped` are among them.
        file_bytes: bytes of the files read, before decompression.
        dropped: documents left out, by the names of `RULES`.
        changed: by the names of `CHANGES`; a message of a chat and a part of a long document count by themselves as texts.
        examples: by rule, the first few as "place: beginning of the text".
        splits: by split: documents, tokens (each document's EOS among them), target_tokens, and bytes of text in UTF-8.
        document_bytes, document_tokens: of the documents kept; how many lie from a power of two (the key) to below the next.
        sources: name, kind, documents read and kept, for each input.
        left_out: files that were not read, each with the reason.
        rows_not_utf8: rows that were not, left out as bad ones or mended and kept.
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

    @property
    def kept(self) -> int:
        """Documents that came into the store."""
        return self.documents - sum(self.dropped.values())

    def drop(self, rule: str, place: str, text: str) -> None:
        """Count one document that is left out, and keep the first few as examples."""
        self.dropped[rule] = self.dropped.get(rule, 0) + 1
        shown = self.examples.setdefault(rule, [])
        if len(shown) < EXAMPLES:
            # what is said of a bad row goes on from its place; any other text is a quotation
            shown.append(f"{place} {text}" if rule == "bad row" else f"{place}: {text[:EXAMPLE_CHARS]}")

    def change(self, counts: Mapping[str, int]) -> None:
        """Add to `changed`."""
        for name, count in counts.items():
            self.changed[name] = self.changed.get(name, 0) + count

    def keep(self, num_bytes: np.ndarray, num_tokens: np.ndarray) -> None:
        """Count the lengths of documents that are kept: bytes and tokens of each, int [n]."""
        for lengths, histogram in ((num_bytes, self.document_bytes), (num_tokens, self.document_tokens)):
            # frexp gives the exponent e with 2**(e-1) <= length < 2**e, exactly for every length below 2**53
            exponents, counts = np.unique(np.frexp(lengths.astype(np.float64))[1], return_counts=True)
            for exponent, count in zip(exponents.tolist(), counts.tolist(), strict=True):
                key = str(1 << (exponent - 1) if exponent > 0 else 0)
                histogram[key] = histogram.get(key, 0) + count
