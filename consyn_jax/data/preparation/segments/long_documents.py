"""Phase "long": join the parts of long documents; the parts may be in several segments.

The result is arrays with one row for each long document, in the order of the corpus:

    begin, end    ids of the first and of the last part (`job.document_ids`)
    splits        index of the split in `SPLITS`
    rules         index in `RULES` of the rule that drops the document, or NO_RULE
    num_bytes     size of the text in bytes
    num_tokens    number of tokens
    offset        byte offset of the text in its source
    signatures    signature for the search for near duplicates; `EMPTY` without that search
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64, UInt64

from consyn_jax.data.preparation.corpus_report import RULES
from consyn_jax.data.preparation.encoded_documents import EncodedDocuments
from consyn_jax.data.preparation.journal import LongDocument
from consyn_jax.data.preparation.near_duplicates import EMPTY, PERMUTATIONS
from consyn_jax.data.preparation.segments.encode import (
    BEGINS,
    BLANK,
    PART,
    TABLE,
    signatures_of,
)
from consyn_jax.data.preparation.segments.job import Draft, Job, document_ids
from consyn_jax.data.preparation.segments.partitions import save_compared
from consyn_jax.data.split import DIGEST_BYTES, SPLITS, joined_digest

NO_RULE = 255


def write_long(job: Job, number: int) -> None:
    """Write the long documents of all segments."""
    documents: list[LongDocument] = []
    begin, end = list[int](), list[int]()
    for segment in range(job.num_segments):
        flags = np.asarray(job.array("segments", segment, "flags"))
        rows = np.flatnonzero(flags & PART)
        if not len(rows):
            continue
        parts, offsets = _parts(job, segment, rows)
        ids = document_ids(segment, rows).tolist()
        for at, flag in enumerate(flags[rows].tolist()):
            if flag & BEGINS:
                split = SPLITS[parts.splits[at]]
                documents.append(LongDocument(split, "", "", begin=int(offsets[at])))
                begin.append(ids[at])
                end.append(ids[at])
            documents[-1].add(parts, at, bool(flag & BLANK))
            end[-1] = ids[at]
    with job.writing("long", number) as draft:
        draft.save(begin=np.array(begin, np.uint64), end=np.array(end, np.uint64))
        _save_table(job, draft, documents, np.array(end, np.uint64))


def _parts(
    job: Job, segment: int, rows: Int64[np.ndarray, " n"]
) -> tuple[EncodedDocuments, Int64[np.ndarray, " n"]]:
    """The parts in these rows, without their tokens, and the byte offset of each part's text."""
    none = np.zeros(0, np.uint8)
    columns = {name: job.array("segments", segment, name)[rows] for name in TABLE}
    signatures = none if job.threshold is None else signatures_of(job, segment)[rows]
    parts = EncodedDocuments(
        **columns, signatures=signatures, have_prompts=none, ids=none, targets=none
    )
    return parts, job.array("segments", segment, "origins")[rows, 1]


def _save_table(
    job: Job, draft: Draft, documents: list[LongDocument], ids: UInt64[np.ndarray, " n"]
) -> None:
    rules = [long.rule(job.settings.options) for long in documents]
    kept = np.array([not rule for rule in rules], bool)
    digests = b"".join(joined_digest(long.digests) for long in documents)
    signatures = np.full((len(documents), PERMUTATIONS), EMPTY, np.uint32)
    for signature, long in zip(signatures, documents, strict=True):
        if long.signature is not None:
            signature[:] = long.signature
    draft.save(
        splits=np.array([SPLITS.index(long.split) for long in documents], np.uint8),
        rules=np.array([RULES.index(rule) if rule else NO_RULE for rule in rules], np.uint8),
        num_bytes=np.array([long.num_bytes for long in documents], np.int64),
        num_tokens=np.array([long.num_tokens for long in documents], np.int64),
        offset=np.array([long.begin for long in documents], np.int64),
        signatures=signatures,
    )
    save_compared(
        job,
        draft,
        ids[kept],
        np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES)[kept],
        lambda some: signatures[kept][some],
        np.zeros(int(kept.sum()), bool),
    )
