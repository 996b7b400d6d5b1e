"""Phase "segments": clean and tokenise the documents of a segment.

Every array has one row for each document that the workers keep, and one for each part of a long
document, in the order of the corpus. The arrays are named like the fields of `EncodedDocuments`.
There are two more:

    origins  origin of each row, as in `store/manifest.py`
    flags    PART, BEGINS, LAST and BLANK

`partitions.py` describes further arrays, which are used to find duplicates. Large data is written
to separate files while the segment is encoded:

    ids.bin         token ids
    targets.bin     whether each token is a target; no such file if all tokens are targets
    signatures.bin  signature of each row; no such file if near duplicates are kept
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Bool, UInt32

from consyn_jax.data.preparation.corpus_report import EXAMPLES, Report
from consyn_jax.data.preparation.document_origins import document_origins
from consyn_jax.data.preparation.encoded_documents import EncodedDocuments
from consyn_jax.data.preparation.near_duplicates import PERMUTATIONS
from consyn_jax.data.preparation.segments.job import Job, document_ids
from consyn_jax.data.preparation.segments.partitions import save_compared
from consyn_jax.data.preparation.segments.spans import segment_blocks
from consyn_jax.data.preparation.workers.worker import Result
from consyn_jax.data.sources.reader import Block
from consyn_jax.data.split import DIGEST_BYTES
from consyn_jax.errors import UserError

PART, BEGINS, LAST, BLANK = 1, 2, 4, 8
IDS, TARGETS, SIGNATURES = "ids.bin", "targets.bin", "signatures.bin"
TABLE = ("numbers", "lengths", "num_bytes", "num_chars", "digests", "splits")
_EMPTY: dict[str, np.ndarray] = {
    **{name: np.zeros(0, np.int64) for name in ("numbers", "lengths", "num_bytes", "num_chars")},
    "digests": np.zeros((0, DIGEST_BYTES), np.uint8),
    "splits": np.zeros(0, np.uint8),
    "origins": np.zeros((0, 3), np.int64),
    "flags": np.zeros(0, np.uint8),
}


def write_segment(job: Job, segment: int) -> None:
    """Tokenise a segment, and write its rows.

    Raises:
        UserError: a source cannot be read, or has a fault.
    """
    worker = job.settings.worker()
    with job.writing("segments", segment) as draft:
        rows = _Rows(job, draft.path)
        with rows.files:
            for index, block in segment_blocks(job, segment):
                rows.add(index, block, worker.work(block))
        table = rows.table()
        whole = np.flatnonzero(table["flags"] & PART == 0)
        draft.save(**table)
        save_compared(
            job,
            draft,
            document_ids(segment, whole),
            table["digests"][whole],
            lambda some: _signatures(draft.path)[whole[some]],
            rows.may_repeat()[whole],
        )
        draft.result = rows.result()


class _Rows:
    """The rows and counts of a segment so far."""

    def __init__(self, job: Job, place: Path) -> None:
        self.files = _Files(place, has_signatures=job.threshold is not None)
        self._job = job
        self._columns = {name: [empty] for name, empty in _EMPTY.items()}
        self._prompts = [np.zeros(0, bool)]
        self._count = 0
        self._report = Report()
        self._drops: list[tuple[int, str, str, str]] = []
        self._shown: dict[str, int] = {}
        self._sources: dict[int, int] = {}

    def add(self, index: int, block: Block, result: Result) -> None:
        """Add the result of a block; `index` is the number of the source."""
        if result.fault:
            raise UserError(result.fault)
        self._report.take(result, most_unread=float("inf"))
        self._drop(result)
        kept, whole = result.kept, block.begins and block.last
        documents = result.documents if whole else int(block.last)
        self._report.documents += documents
        self._sources[index] = self._sources.get(index, 0) + documents
        if whole:
            origins = document_origins(block, kept.numbers, index, self._job.spec)
        else:
            origins = np.array([[index, block.offset, block.offset + len(block.data)]])
        flags = BEGINS * block.begins | LAST * block.last | PART * (not whole)
        flags |= BLANK * result.is_blank
        columns: dict[str, np.ndarray] = {
            **{name: getattr(kept, name) for name in TABLE},
            "origins": origins,
            "flags": np.full(len(kept.numbers), flags, np.uint8),
        }
        for name, column in columns.items():
            self._columns[name].append(column)
        self._prompts.append(kept.have_prompts.astype(bool))
        self._count += len(kept.numbers)
        self.files.add(kept)

    def _drop(self, result: Result) -> None:
        """Count the dropped documents by rule, and keep the first few of each rule as examples."""
        dropped = self._report.dropped
        for rule, place, text in result.dropped:
            dropped[rule] = dropped.get(rule, 0) + 1
            if self._shown.setdefault(rule, 0) < EXAMPLES:
                self._shown[rule] += 1
                self._drops.append((self._count, rule, place, text))

    def table(self) -> dict[str, np.ndarray]:
        """The columns of all rows."""
        return {name: np.concatenate(columns) for name, columns in self._columns.items()}

    def may_repeat(self) -> Bool[np.ndarray, " n"]:
        """Whether each row is kept even if it equals an earlier row."""
        if self._job.settings.options.deduplicate is not None:
            return np.zeros(self._count, bool)
        return np.concatenate(self._prompts)

    def result(self) -> dict[str, Any]:
        """The counts of the segment, for `result.json`."""
        return {
            "report": vars(self._report),
            "drops": self._drops,
            "sources": self._sources,
            "rows": self._count,
        }


class _Files:
    """Writes the files `ids.bin`, `targets.bin` and `signatures.bin` of a segment."""

    def __init__(self, place: Path, has_signatures: bool) -> None:
        self._place = place
        self._ids = (place / IDS).open("xb")
        self._signatures = (place / SIGNATURES).open("xb") if has_signatures else None
        self._targets: BinaryIO | None = None
        self._count = 0

    def add(self, documents: EncodedDocuments) -> None:
        """Append the token ids, targets and signatures of documents."""
        ids, targets = documents.ids, documents.targets
        if self._signatures is not None:
            self._signatures.write(np.ascontiguousarray(documents.signatures, np.uint32).data)
        self._ids.write(np.ascontiguousarray(ids).data)
        if len(targets) and self._targets is None:
            self._targets = (self._place / TARGETS).open("xb")
            self._targets.write(b"\1" * self._count)
        if self._targets is not None:
            marks = targets if len(targets) else np.ones(len(ids), np.uint8)
            self._targets.write(np.ascontiguousarray(marks).data)
        self._count += len(ids)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, *_: object) -> None:
        for file in filter(None, (self._ids, self._signatures, self._targets)):
            if kind is None:
                file.flush()
                os.fsync(file.fileno())
            file.close()


class SegmentTokens:
    """The tokens and targets of a finished segment."""

    def __init__(self, job: Job, segment: int) -> None:
        place = job.place("segments", segment)
        self.ids = _mapped(place / IDS, job.dtype)
        has_targets = (place / TARGETS).exists()
        self.targets = _mapped(place / TARGETS, np.dtype(np.uint8)) if has_targets else None
        lengths = job.array("segments", segment, "lengths")
        self.ends = np.cumsum(lengths)
        self.starts = self.ends - lengths


def signatures_of(job: Job, segment: int) -> UInt32[np.ndarray, "rows 128"]:
    """The signatures of the rows of a finished segment, as a memory map."""
    return _signatures(job.place("segments", segment))


def _signatures(place: Path) -> UInt32[np.ndarray, "rows 128"]:
    return _mapped(place / SIGNATURES, np.dtype(np.uint32)).reshape(-1, PERMUTATIONS)


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    if not path.stat().st_size:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, "r").view(np.ndarray)
