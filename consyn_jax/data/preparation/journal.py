"""The journal of a preparation: how far the files of an unfinished store are valid."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from consyn_jax.data.preparation.corpus_report import Report
from consyn_jax.data.preparation.encoded_documents import EncodedDocuments
from consyn_jax.data.preparation.preparation_spec import Spec
from consyn_jax.data.saved_values import check_types
from consyn_jax.data.sources.reader import START, Position
from consyn_jax.data.store import TokenStoreWriter
from consyn_jax.files import write_whole
from consyn_jax.prepare_config import CorpusOptions

JOURNAL = "journal.json"


@dataclass
class LongDocument:
    """The state of a document that is read in parts, after the newest part.

    Attributes:
        split: the split that the document is written to.
        place: source and number of the document, for the report.
        beginning: first characters of the document, for the report.
        digests: digests of the parts.
        signature: element-wise minimum of the parts' signatures; None if near duplicates are not
            searched for.
        begin: offset of the document's text in the source, in bytes.
    """

    split: str
    place: str
    beginning: str
    digests: list[bytes] = field(default_factory=list)
    signature: np.ndarray | None = None
    is_blank: bool = True
    num_bytes: int = 0
    num_chars: int = 0
    num_tokens: int = 0
    begin: int = 0

    def add(self, parts: EncodedDocuments, at: int, is_blank: bool) -> None:
        """Add the next part, which is number `at` of `parts`."""
        self.digests.append(parts.digests[at].tobytes())
        self.is_blank = self.is_blank and is_blank
        self.num_bytes += int(parts.num_bytes[at])
        self.num_chars += int(parts.num_chars[at])
        self.num_tokens += int(parts.lengths[at])
        if len(parts.signatures):
            of_part = parts.signatures[at]
            self.signature = (
                of_part if self.signature is None else np.minimum(self.signature, of_part)
            )

    def rule(self, options: CorpusOptions) -> str:
        """The rule that drops this document, or "" if none does."""
        if self.is_blank:
            return "empty"
        if self.num_chars < options.min_chars:
            return "too short"
        too_long = options.max_chars is not None and self.num_chars > options.max_chars
        return "too long" if too_long else ""


@dataclass
class Journal:
    """The state of a data preparation after a block of input, from which it can be resumed.

    Attributes:
        key: hash of the store's content (`preparation_spec.key_of`).
        single: whether the corpus is one document, which is split by position.
        source: number of the source in which reading continues.
        position: position in that source at which reading continues.
        long: the long document that the next block continues; None if there is none.
        writer: the `state` of the `TokenStoreWriter`.
        seen: number of valid records in the file `digests`.
        near: number of valid records in the file `signatures`.
    """

    key: str
    single: bool
    source: int
    position: Position
    report: Report
    long: LongDocument | None
    writer: dict[str, Any]
    seen: int
    near: int

    @classmethod
    def begin(cls, spec: Spec, key: str, single: bool) -> Journal:
        """The state before the first block."""
        sources = [
            {"name": source.shown, "kind": source.kind, "documents": 0, "kept": 0}
            for source in spec.sources
        ]
        report = Report(sources=sources, left_out=[list(item) for item in spec.left_out])
        return cls(key, single, 0, START, report, None, {"shards": {}, "open": {}}, 0, 0)

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Journal:
        """Parse a journal that `write` encoded.

        Raises:
            KeyError, TypeError, ValueError, OverflowError, AttributeError: the journal is damaged.
        """
        long = saved["long"]
        if long is not None:
            signature = long["signature"]
            long = LongDocument(
                **{
                    **long,
                    "digests": [bytes.fromhex(digest) for digest in long["digests"]],
                    "signature": None if signature is None else np.array(signature, np.uint32),
                }
            )
            check_types(long)
        decoded = {
            "position": tuple(saved["position"]),
            "report": Report.of(saved["report"]),
            "long": long,
        }
        journal = cls(**{**saved, **decoded})
        check_types(journal)
        TokenStoreWriter.check_state(journal.writer)
        if journal.source >= len(journal.report.sources):
            raise ValueError(f"source is {journal.source}")
        return journal

    def write(self, path: Path) -> None:
        """Write the journal as JSON; the files that it describes must already be on the disk."""
        long = self.long and {
            **vars(self.long),
            "digests": [digest.hex() for digest in self.long.digests],
            "signature": None if self.long.signature is None else self.long.signature.tolist(),
        }
        content = {**vars(self), "report": vars(self.report), "long": long}
        write_whole(path, json.dumps(content))
