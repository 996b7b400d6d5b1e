"""Read the documents of a data source as token ids, with marks for the tokens to score."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from consyn_jax.data.preparation.cached_store import Prepared, prepare
from consyn_jax.data.preparation.preparation_spec import Progress
from consyn_jax.data.split import TRAIN, VALIDATION
from consyn_jax.data.store.manifest import GIVEN
from consyn_jax.data.store.store_split import StoreSplit
from consyn_jax.errors import UserError
from consyn_jax.inference.scoring.evaluation_options import EvaluateTextOptions
from consyn_jax.prepare_config import CorpusOptions
from consyn_jax.tokenization import BPETokenizer


class TokenDocument(NamedTuple):
    """The ids of a document, with BOS if the model's texts begin with it.

    `scored` is 1 for each token to score.
    """

    ids: Int32[np.ndarray, " n"]
    scored: Bool[np.ndarray, " n"]


@dataclass(frozen=True)
class Documents:
    """All documents that `--data` names, for one tokenizer.

    Attributes:
        num_bytes: Size of the documents' text in UTF-8 bytes; None if unknown, or if only a part is
            scored.
        notes: Notes for the report.
    """

    split: StoreSplit
    tokenizer: BPETokenizer
    score_end: bool
    num_bytes: int | None
    notes: tuple[str, ...]

    def __iter__(self) -> Iterator[TokenDocument]:
        starts = np.concatenate([np.asarray(part) for part in self.split.document_starts()])
        ends = [*starts[1:].tolist(), self.split.num_tokens]
        for start, end in zip(starts.tolist(), ends, strict=True):
            yield self._document(start, end)

    def _document(self, start: int, end: int) -> TokenDocument:
        self.split.verify([start], [end])
        ids, targets = np.empty(end - start, np.int32), np.ones(end - start, np.uint8)
        self.split.read(start, ids)
        if self.split.num_targets < self.split.num_tokens:
            self.split.read_targets(start, targets)
        brings_its_own = targets[0] == GIVEN
        scored = targets == 1
        is_text = bool(scored.all())
        if is_text and not self.score_end and ids[-1] == self.tokenizer.eos_token_id:
            ids, scored = ids[:-1], scored[:-1]
        if self.tokenizer.first_id is not None and not brings_its_own:
            ids = np.concatenate([np.array([self.tokenizer.first_id], np.int32), ids])
            scored = np.concatenate([np.zeros(1, bool), scored])
        return TokenDocument(ids, scored)


def find_documents(
    options: EvaluateTextOptions, tokenizer: BPETokenizer, progress: Progress | None = None
) -> Documents:
    """Tokenise the data, or load it from the cache.

    Texts are not cleaned: they are not normalised, no character is removed, and duplicates stay. In
    rows with prompts, only the answers are scored, as in training.

    Raises:
        UserError: The data is missing or unusable, or was tokenised with another tokenizer.
    """
    corpus = CorpusOptions(
        data=options.data,
        row_format=options.row_format,
        text_key=options.text_key,
        document_separator=options.document_separator,
        validation_fraction=0.0,
        normalize="none",
        control_characters="keep",
        deduplicate=False,
    )
    prepared = prepare(corpus, tokenizer, progress=progress)
    if prepared.store.holds_pairs:
        raise UserError(
            f"{prepared.used[0].name} contains pairs of answers, which cannot be evaluated as "
            "texts. Give texts, or rows with messages."
        )
    is_store = prepared.used[0].is_store
    if options.split != "auto" and not is_store:
        raise UserError(
            f"--split {options.split} is for a token store, but {prepared.used[0].name} is not "
            "one. Leave --split out to evaluate all of the data."
        )
    name = TRAIN if not is_store else options.split
    if name == "auto":
        name = TRAIN if prepared.validation_is_empty else VALIDATION
    split = prepared.store.split(name)
    if not split.num_tokens:
        raise UserError(
            f"The split {name} of {prepared.used[0].name} is empty. Choose another split."
        )
    is_whole = split.num_targets == split.num_tokens
    notes = [*([f"split {name}"] if is_store else []), *_notes(prepared, split)]
    return Documents(
        split,
        prepared.store.tokenizer,
        options.score_end,
        split.num_bytes if is_whole else None,
        tuple(notes),
    )


def _notes(prepared: Prepared, split: StoreSplit) -> Iterator[str]:
    dropped = sum(prepared.report.dropped.values())
    if dropped:
        yield f"{dropped:,} documents without text left out"
    if prepared.left_out:
        shown = ", ".join(f"{name} {reason}" for name, reason in prepared.left_out[:3])
        yield f"{len(prepared.left_out):,} files left out: {shown}"
    if unknown := prepared.report.changed.get("unknown"):
        yield f"{unknown:,} tokens are the unknown token"
    if split.num_targets < split.num_tokens:
        yield "in rows with prompts, only the answers are scored"
