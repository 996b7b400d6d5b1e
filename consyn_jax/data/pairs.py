"""Build rows of equal length from preference pairs: the chosen sequence, then the rejected one.

A row has two halves of `block_size` positions. Each half is a segment of its own, so the two
sequences do not attend to each other. Inputs and labels are shifted as in `packing.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int64, Integer

from consyn_jax.data.packing import PackedSequences, Pieces, Sequences, document_groups
from consyn_jax.data.store.manifest import BETWEEN, GIVEN, PREPARE_ANEW
from consyn_jax.data.store.store_split import StoreSplit
from consyn_jax.errors import UserError

CHOSEN_REFERENCE, REJECTED_REFERENCE = "chosen_reference", "rejected_reference"


class _Halves(NamedTuple):
    """The chosen and rejected sequences of some pairs; each array has an entry per sequence.

    Attributes:
        starts: Stream position of the first token.
        lengths: Number of tokens.
        skipped: 1 if the first token is only an input and not a label, otherwise 0.
        answers: Position of the answer's first token in the labels.
    """

    starts: Int64[np.ndarray, "n 2"]
    lengths: Int64[np.ndarray, "n 2"]
    skipped: Int64[np.ndarray, "n 2"]
    answers: Int64[np.ndarray, "n 2"]

    @property
    def labels(self) -> Int64[np.ndarray, "n 2"]:
        """Number of labels of each sequence."""
        return self.lengths - self.skipped

    def where(self, kept: Bool[np.ndarray, " n"]) -> _Halves:
        """Select the pairs where `kept` is true."""
        return _Halves(*(values[kept] for values in self))


class PairDataset(PackedSequences):
    """A split of pairs, one pair per row.

    Args:
        block_size: number of labels of a sequence; a row has twice as many.
        on_long: what to do with a pair that has a longer sequence. "truncate" cuts off the end of
            the sequence, as TRL's `keep_start` does. "drop" leaves the pair out. "error" raises an
            error. A pair is also dropped if truncation would remove a whole answer.

    Attributes:
        num_long: number of pairs with a sequence longer than `block_size`.
        num_without_answer: number of pairs dropped because truncation would remove a whole answer.
        lost_tokens: number of labels that were truncated or dropped.
        reference: log-probabilities [pairs, 2] of the chosen and the rejected answers under the
            initial model; None until they are computed.

    Raises:
        UserError: a sequence is too long and `on_long` is "error", or a document is not a pair.
    """

    def __init__(
        self,
        split: StoreSplit,
        block_size: int,
        bos_id: int | None,
        pad_id: int,
        on_long: str | None = None,
    ) -> None:
        super().__init__(split, block_size, bos_id, pad_id)
        self.on_long = on_long or "truncate"
        self.reference: Float32[np.ndarray, "n 2"] | None = None
        found = [_halves(split, *group, bos_id is None) for group in document_groups(split)]
        empty = np.empty((0, 2), np.int64)
        parts = zip(*found, strict=True) if found else [[empty]] * len(_Halves._fields)
        halves = _Halves(*(np.concatenate(part) for part in parts))
        is_long = (halves.labels > block_size).any(1)
        if is_long.any() and self.on_long == "error":
            longest = int(halves.labels[np.argmax(is_long)].max())
            raise UserError(
                f"A pair has a sequence of {longest:,} tokens, more than the {block_size:,} of "
                "--max_tokens, which --on_long_rows error forbids. Raise --max_tokens, or give "
                "--on_long_rows truncate or drop."
            )
        has_answers = (halves.answers < np.minimum(halves.labels, block_size)).all(1)
        self.num_long = int(is_long.sum())
        self.num_without_answer = int((~has_answers & (self.on_long == "truncate")).sum())
        before = int(halves.labels.sum())
        self._halves = halves.where(has_answers & ~(is_long & (self.on_long == "drop")))
        self._sizes = np.minimum(self._halves.labels, block_size)
        self.num_tokens, self.num_documents = int(self._sizes.sum()), len(self)
        self.lost_tokens = before - self.num_tokens
        self.num_targets = int((self._sizes - self._halves.answers).sum())
        self.num_bytes = None

    def __len__(self) -> int:
        return len(self._halves.starts)

    @property
    def padding_fraction(self) -> float:
        """Share of the positions of an epoch that are padding."""
        positions = 2 * len(self) * self.block_size
        return 1 - self.num_tokens / positions if positions else 0.0

    def pieces(self, indices: Sequence[int] | Integer[np.ndarray, " n"]) -> Pieces:
        """Return the pieces of the pairs with the given `indices`, two per pair."""
        which = np.asarray(indices, np.int64)
        row = np.repeat(np.arange(len(which)), 2)
        lengths = (self._sizes + self._halves.skipped)[which]
        return Pieces(row, self._halves.starts[which].reshape(-1), lengths.reshape(-1))

    def rows(self, indices: Sequence[int] | Integer[np.ndarray, " n"]) -> Sequences:
        """Read the pairs with the given `indices` (at least 0), as arrays [n, 2 * block_size].

        Once `reference` is computed, there are two more arrays [n]: the log-probabilities of the
        chosen answers and of the rejected answers.
        """
        which = np.asarray(indices, np.int64)
        starts, skipped, answers = (
            values[which].reshape(-1)
            for values in (self._halves.starts, self._halves.skipped, self._halves.answers)
        )
        sizes = self._sizes[which].reshape(-1)
        self.split.verify(starts.tolist(), (starts + skipped + sizes).tolist())
        shape = len(starts), self.block_size
        ids = np.zeros((shape[0], shape[1] + 1), self.split.dtype)
        for row, start, skip, size in zip(ids, starts, skipped, sizes, strict=True):
            self.split.read(int(start), row[1 - skip : 1 + size])
        column = np.arange(self.block_size)
        is_token = column < sizes[:, None]
        labels = np.where(is_token, ids[:, 1:], np.int32(self.pad_id)).astype(np.int32)
        inputs = np.where(is_token, ids[:, :-1], np.int32(self.pad_id)).astype(np.int32)
        if self.bos_id is not None:
            inputs[skipped == 0, 0] = self.bos_id
        segments = np.tile(np.array([1, 2], np.int32), len(which))[:, None] * is_token
        mask = is_token & (column >= answers[:, None])
        named = {
            "input_ids": inputs,
            "labels": labels,
            "segment_ids": segments.astype(np.int32),
            "loss_mask": mask,
        }
        found = {name: values.reshape(len(which), -1) for name, values in named.items()}
        if self.reference is not None:
            found[CHOSEN_REFERENCE], found[REJECTED_REFERENCE] = self.reference[which].T
        return found


def longer_sequences(split: StoreSplit) -> Int64[np.ndarray, " n"]:
    """Return the number of tokens in the longer sequence of each pair."""
    found = [_halves(split, *group, False).lengths.max(1) for group in document_groups(split)]
    return np.concatenate([np.empty(0, np.int64), *found])


def _halves(
    split: StoreSplit,
    starts: Int64[np.ndarray, " n"],
    lengths: Int64[np.ndarray, " n"],
    has_no_bos: bool,
) -> _Halves:
    """Find the chosen and rejected sequences in consecutive documents."""
    marks = np.empty(int(lengths.sum()), np.uint8)
    split.read_targets(int(starts[0]), marks)
    first, ends = starts - starts[0], starts - starts[0] + lengths
    between = np.flatnonzero(marks == BETWEEN)
    if len(between) != len(first) or not ((first < between) & (between + 1 < ends)).all():
        raise UserError(
            f"The token store is damaged: one of its documents is not a pair. {PREPARE_ANEW}"
        )
    begins = np.stack([first, between + 1], 1)
    stops = np.stack([between, ends], 1)
    targets = np.append(np.flatnonzero(marks == 1), len(marks))
    at = targets[np.searchsorted(targets, begins)]
    skipped = ((marks[begins] == GIVEN) | has_no_bos).astype(np.int64)
    answers = np.maximum(np.minimum(at, stops) - begins - skipped, 0)
    return _Halves(begins + starts[0], stops - begins, skipped, answers)
