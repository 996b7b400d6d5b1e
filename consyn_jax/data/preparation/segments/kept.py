"""Phase "kept": decide which documents of a segment are kept, and write the segment's report."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from consyn_jax.data.preparation.corpus_report import EXAMPLE_CHARS, EXAMPLES, RULES, Report
from consyn_jax.data.preparation.segments.encode import PART, SegmentTokens
from consyn_jax.data.preparation.segments.job import (
    Job,
    among,
    document_ids,
    edges,
    of_segment,
    rows_of,
    segment_of,
)
from consyn_jax.data.preparation.segments.long_documents import NO_RULE
from consyn_jax.data.split import SPLITS

DROPPED = 255  # for a dropped row, in place of the number of a split


def write_kept(job: Job, segment: int) -> None:
    """Write the split of each row, or `DROPPED`, and count what is kept and dropped."""
    with job.writing("kept", segment) as draft:
        decisions = _Decisions(job, segment)
        draft.save(splits=decisions.splits)
        draft.result = decisions.result()


class _Decisions:
    """The decisions about the rows of a segment.

    Attributes:
        splits: the split of each row, or `DROPPED`.
    """

    def __init__(self, job: Job, segment: int) -> None:
        self._job, self._segment = job, segment
        self._rule: dict[int, str] = {}  # by row; a long document is listed by its last row
        # A missing array is an error, not a corpus without duplicates.
        phases = {"duplicate": "dropped-exact"} if job.drops_duplicates else {}
        if job.threshold is not None:
            phases["near duplicate"] = "dropped-near"
        dropped = {rule: job.array(phase, 0, "dropped") for rule, phase in phases.items()}
        self._duplicates = list(dropped.values())
        for rule, ids in dropped.items():
            self._rule |= dict.fromkeys(of_segment(ids, segment).tolist(), rule)
        self.splits: UInt8[np.ndarray, " rows"] = np.array(self._column("splits"))
        self._whole = self._column("flags") & PART == 0
        self.splits[np.array(list(self._rule), np.int64)] = DROPPED
        self._long = self._decide_long()

    def _column(self, name: str) -> np.ndarray:
        return self._job.array("segments", self._segment, name)

    def _decide_long(self) -> Int64[np.ndarray, " long"]:
        """Set the split of all rows of long documents.

        Returns:
            Indices of the long documents whose last row is in this segment.
        """
        begin, end, splits, rules = (
            self._job.array("long", 0, name) for name in ("begin", "end", "splits", "rules")
        )
        here, after = edges(self._segment)
        for long in range(np.searchsorted(end, here), np.searchsorted(begin, after)):
            start = int(rows_of(begin[long])) if begin[long] >= here else 0
            ends = end[long] < after
            stop = int(rows_of(end[long])) + 1 if ends else len(self.splits)
            is_dropped = rules[long] != NO_RULE or self._is_duplicate(end[long])
            self.splits[start:stop] = DROPPED if is_dropped else splits[long]
            if ends and rules[long] != NO_RULE:
                self._rule[stop - 1] = RULES[rules[long]]
        return np.arange(*np.searchsorted(end, (here, after)))

    def _is_duplicate(self, document: np.uint64) -> bool:
        return any(among(np.array([document]), ids)[0] for ids in self._duplicates)

    # ------------------------------------------------------------------------------- counts

    def result(self) -> dict[str, Any]:
        """Return the counts of the segment, for `result.json`.

        "tokens" has the number of tokens in each split. "sources" has a list for each source: the
        source's index, the number of documents read, and the number of documents kept.
        """
        saved = self._job.result("segments", self._segment)
        report = Report(**saved["report"])
        self._report_dropped(report, saved["drops"])
        long = self._long[self.splits[rows_of(self._of_long("end"))] != DROPPED]
        kept = self._whole & (self.splits != DROPPED)
        report.keep(
            np.r_[self._column("num_bytes")[kept], self._of_long("num_bytes", long)],
            np.r_[self._column("lengths")[kept], self._of_long("num_tokens", long)],
        )
        rows = np.r_[np.flatnonzero(kept), rows_of(self._of_long("end", long))]
        sources, counts = np.unique(self._column("origins")[rows, 0], return_counts=True)
        kept_of = dict(zip(sources.tolist(), counts.tolist(), strict=True))
        tokens = np.bincount(self.splits, self._column("lengths"), DROPPED + 1)
        return {
            "tokens": tokens[: len(SPLITS)].astype(np.int64).tolist(),
            "report": vars(report),
            "sources": [
                [int(source), read, kept_of.get(int(source), 0)]
                for source, read in saved["sources"].items()
            ],
        }

    def _of_long(self, name: str, numbers: np.ndarray | None = None) -> np.ndarray:
        chosen = self._long if numbers is None else numbers
        return np.asarray(self._job.array("long", 0, name)[chosen])

    def _report_dropped(self, report: Report, drops: list[list[Any]]) -> None:
        """Count the dropped rows, and show the first few of each rule in the order of the corpus.

        Args:
            drops: documents that workers dropped, each as [rows before the document, rule, place,
                text].
        """
        for rule in self._rule.values():
            report.dropped[rule] = report.dropped.get(rule, 0) + 1
        shown: list[tuple[int, str, str | None, str]] = []
        for rule in set(self._rule.values()):
            rows = sorted(row for row, of_row in self._rule.items() if of_row == rule)
            shown += [(2 * row, rule, None, "") for row in rows[:EXAMPLES]]
        shown += [(2 * before - 1, rule, place, text) for before, rule, place, text in drops]
        for at, rule, place, text in sorted(shown, key=lambda each: each[0]):
            if place is None:
                place, text = self._example(at // 2)
            report.show(rule, place, text)

    def _example(self, row: int) -> tuple[str, str]:
        """Return the place and the beginning of the document whose last row is `row`."""
        job, at = self._job, document_ids(self._segment, np.array([row]))
        if not self._whole[row]:
            long = int(np.searchsorted(job.array("long", 0, "end"), at[0]))
            at = np.array(job.array("long", 0, "begin")[long : long + 1])
        segment, row = int(segment_of(at)[0]), int(rows_of(at)[0])
        tokens = SegmentTokens(job, segment)
        ids = tokens.ids[tokens.starts[row] : tokens.ends[row]][:EXAMPLE_CHARS]
        source = int(job.array("segments", segment, "origins")[row, 0])
        number = int(job.array("segments", segment, "numbers")[row])
        return f"{job.sources[source].name}:{number}", job.tokenizer.decode(ids.tolist())
