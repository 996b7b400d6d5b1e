"""Pack documents into sequences of fixed length; a token is a label at most once per epoch.

At stream position p, the label is tokens[p] and the input is tokens[p - 1]. Where a document
begins, the input is BOS instead. So the model predicts the first token of a document from BOS, and
predicts its EOS. EOS is never an input.

Some tokenizers have no BOS (Qwen), and some documents already contain BOS (a chat rendered with a
model's template). In both cases, the first token of the document is not predicted: it is only the
input for the second token. The position that would have the first token as its label is masked
like padding, and is a segment of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer, UInt8

from consyn_jax.data.best_fit import best_fit_decreasing
from consyn_jax.data.store.manifest import GIVEN
from consyn_jax.data.store.store_split import StoreSplit
from consyn_jax.errors import UserError

CONTINUE = "continue"
Sequences = dict[str, np.ndarray]
"""Arrays [n, T]: "input_ids", "labels" and "segment_ids" in int32, and "loss_mask" in bool."""
# Number of documents that `WholeDocuments` packs together: enough to leave little padding, and few
# enough to pack quickly.
GROUP_DOCUMENTS = 65_536


class Pieces(NamedTuple):
    """Contiguous ranges of a split's token stream; each belongs to one sequence.

    Attributes:
        row: for each piece, the sequence that contains it, as an index into the requested
            sequences.
        start: for each piece, the stream position of its first token.
        length: for each piece, its number of tokens.
    """

    row: Int64[np.ndarray, " pieces"]
    start: Int64[np.ndarray, " pieces"]
    length: Int64[np.ndarray, " pieces"]


class PackedSequences(ABC):
    """A split of the data as sequences of equal length.

    The loss counts the labels where "loss_mask" is true: the targets in fine-tuning rows, and all
    tokens in other data. Tokens that are not targets are still inputs, so their "segment_ids"
    are above 0. Only padding has segment 0.

    Args:
        block_size: tokens in a sequence.
        bos_id: the input before the first token of each document; None if the tokenizer has no BOS.
        pad_id: id of inputs and labels at padding positions, where the mask is False and the
            segment is 0.

    Attributes:
        num_tokens: number of labels in an epoch.
        num_targets: number of labels that count in the loss.
        num_documents, num_bytes: number of documents in the split, and bytes of their text; None if
            unknown.
    """

    def __init__(self, split: StoreSplit, block_size: int, bos_id: int | None, pad_id: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {block_size}.")
        self.split, self.block_size, self.bos_id, self.pad_id = split, block_size, bos_id, pad_id
        self.num_tokens, self.num_targets = split.num_tokens, split.num_targets
        self.num_documents, self.num_bytes = split.num_documents, split.num_bytes
        if bos_id is None and self.num_targets == self.num_tokens:
            self.num_targets -= self.num_documents or 1  # first tokens are not targets

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def rows(self, indices: Sequence[int] | Integer[np.ndarray, " n"]) -> Sequences:
        """Read the sequences with the given `indices`, each in range(len).

        In each sequence, the segment ids number the documents, or pieces of documents, from 1.
        """

    @abstractmethod
    def pieces(self, indices: Sequence[int] | Integer[np.ndarray, " n"]) -> Pieces:
        """Return the pieces of the sequences with the given `indices`, without reading tokens."""

    def __getitem__(self, i: int) -> Sequences:
        """Read one sequence: int32 ids, labels and segments, and a bool mask, each [block_size]."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"Item {i} of {len(self)}.")
        return {name: values[0] for name, values in self.rows([i % len(self)]).items()}

    def _unpredicted(self, labels: np.ndarray) -> Bool[np.ndarray, "..."]:
        """Mark the labels that would not be predicted if they began a document.

        These are all labels if the tokenizer has no BOS; otherwise only labels that are BOS.
        """
        return np.full(labels.shape, True) if self.bos_id is None else labels == self.bos_id

    @property
    def padding_fraction(self) -> float:
        """Fraction of the positions of an epoch that are padding."""
        return 1 - self.num_tokens / (len(self) * self.block_size) if len(self) else 0.0


class PackedDataset(PackedSequences):
    """A split cut into windows of `block_size` tokens; documents may span several windows.

    Item i covers stream positions i * block_size .. (i + 1) * block_size. Only the last window may
    be padded.
    """

    def __len__(self) -> int:
        return -(-self.num_tokens // self.block_size)

    def rows(self, indices: Sequence[int] | Integer[np.ndarray, " n"]) -> Sequences:
        """Read the windows with the given `indices`, each in range(len)."""
        first = np.asarray(indices, np.int64) * self.block_size
        tokens, begins, targets = self.split.windows(first, self.block_size)
        labels, inputs = tokens[:, 1:].astype(np.int32), tokens[:, :-1].astype(np.int32)
        empty = begins & self._unpredicted(labels)
        if targets is not None:
            empty |= begins & (targets == GIVEN)
        inputs[begins] = self.pad_id if self.bos_id is None else self.bos_id
        inputs[empty] = self.pad_id
        opens = begins.copy()
        opens[:, 1:] |= empty[:, :-1]
        segments = np.cumsum(opens, axis=1, dtype=np.int32)
        # Segments start at 1, even in a window that begins inside a document.
        segments += 1 - begins[:, :1]
        mask = ~empty if targets is None else (targets == 1) & ~empty
        for row in np.flatnonzero(first + self.block_size > self.num_tokens):
            padding = slice(self.num_tokens - int(first[row]), None)
            labels[row, padding] = inputs[row, padding] = self.pad_id
            segments[row, padding] = mask[row, padding] = 0
        return {"input_ids": inputs, "labels": labels, "segment_ids": segments, "loss_mask": mask}

    def pieces(self, indices: Sequence[int] | Integer[np.ndarray, " n"]) -> Pieces:
        """Return one piece per window; a piece may contain several documents."""
        first = np.asarray(indices, np.int64) * self.block_size
        lengths = np.minimum(self.block_size, self.num_tokens - first)
        return Pieces(np.arange(len(first)), first, lengths)


class _Places(NamedTuple):
    """Places of pieces in a batch: piece i fills columns left[i] to right[i] - 1 of row row[i]."""

    row: np.ndarray
    left: np.ndarray
    right: np.ndarray


class WholeDocuments(PackedSequences):
    """Sequences of whole documents: a document that fits in a sequence is never cut.

    Each group of `GROUP_DOCUMENTS` consecutive documents is packed by best-fit-decreasing (Ding et
    al. 2024, "Fewer Truncations Improve Language Modeling"). Free positions are padded. A document
    longer than `block_size` is cut into full sequences and a remainder. The remainder is packed
    like a document, as a segment of its own. It begins with the last token of the last full
    sequence, because that token's target is the next one.

    The packing depends only on the lengths of the documents. The constructor computes it without
    reading tokens, except for raw token files: they have no index, so they are searched for
    document starts. The packing takes 13 bytes per document or remainder, and 8 bytes per sequence.
    """

    def __init__(
        self,
        split: StoreSplit,
        block_size: int,
        bos_id: int | None,
        pad_id: int,
        on_long: str = CONTINUE,
    ) -> None:
        """Assign the documents to sequences.

        Args:
            on_long: what to do with a document longer than `block_size`. With "continue", further
                sequences contain the rest. With "truncate", the rest is cut off. With "drop", the
                document is left out. With "error", UserError is raised.

        Raises:
            UserError: a document is too long, and `on_long` is "error".
        """
        super().__init__(split, block_size, bos_id, pad_id)
        self.on_long, self.num_long = on_long, 0
        self.lost_tokens, self.lost_targets = 0, 0
        groups = (self._shortened(*group) for group in document_groups(split))
        plans = [_plan(starts, lengths, block_size) for starts, lengths in groups]
        self._starts = np.concatenate([np.empty(0, np.int64), *(plan[0] for plan in plans)])
        self._lengths = np.concatenate([np.empty(0, np.int32), *(plan[1] for plan in plans)])
        self._begins = np.concatenate([np.empty(0, bool), *(plan[2] for plan in plans)])
        sizes = np.concatenate([np.empty(0, np.int64), *(plan[3] for plan in plans)])
        # Sequence i consists of the pieces from self._pieces[i] up to self._pieces[i + 1].
        self._pieces = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def _shortened(
        self, starts: Int64[np.ndarray, " n"], lengths: Int64[np.ndarray, " n"]
    ) -> tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"]]:
        """Truncate or drop documents that are too long; return the new starts and lengths."""
        size, long = self.block_size, np.flatnonzero(lengths > self.block_size)
        if len(long) and self.on_long == "error":
            raise UserError(
                f"A row has {int(lengths[long[0]]):,} tokens, more than the {size:,} tokens of a "
                "sequence, which --on_long_rows error forbids. Raise --max_tokens, or give "
                "--on_long_rows truncate or drop."
            )
        self.num_long += len(long)
        if self.on_long == CONTINUE:
            return starts, lengths
        kept = size if self.on_long == "truncate" else 0
        for start, length in zip(starts[long].tolist(), lengths[long].tolist(), strict=True):
            lost = np.empty(length - kept, np.uint8)
            self.split.read_targets(start + kept, lost)
            lost_targets = int(np.count_nonzero(lost == 1))
            self.num_targets -= lost_targets
            self.lost_targets += lost_targets
            self.num_tokens -= len(lost)
            self.lost_tokens += len(lost)
            self.num_bytes = None
        if kept:
            return starts, np.minimum(lengths, size)
        if self.num_documents is not None:
            self.num_documents -= len(long)
        return np.delete(starts, long), np.delete(lengths, long)

    def __len__(self) -> int:
        return len(self._pieces) - 1

    def rows(self, indices: Sequence[int] | Integer[np.ndarray, " n"]) -> Sequences:
        """Read the sequences with the given `indices`, each in range(len)."""
        pieces, places = self._layout(np.asarray(indices, np.int64))
        starts, begins = self._starts[pieces], self._begins[pieces]
        shape = len(indices), self.block_size
        self.split.verify(starts.tolist(), (starts + self._lengths[pieces]).tolist())
        tokens = np.zeros(shape, self.split.dtype)
        spans = list(zip(*(values.tolist() for values in (*places, starts)), strict=True))
        for row, left, right, start in spans:
            self.split.read(start, tokens[row, left:right])
        used = np.zeros(len(indices), np.int64)
        np.maximum.at(used, places.row, places.right)
        mask = np.arange(self.block_size) < used[:, None]
        labels = np.where(mask, tokens, np.int32(self.pad_id)).astype(np.int32, copy=False)
        inputs = np.full_like(labels, self.pad_id)
        inputs[:, 1:] = labels[:, :-1]
        inputs[places.row, places.left] = self.pad_id if self.bos_id is None else self.bos_id
        empty = begins & self._unpredicted(labels[places.row, places.left])
        targets = self._read_targets(spans, shape)
        if targets is not None:
            empty |= begins & (targets[places.row, places.left] == GIVEN)
        inputs[places.row[empty], places.left[empty]] = self.pad_id
        before = np.empty(1, self.split.dtype)
        for i in np.flatnonzero(~begins):
            self.split.read(int(starts[i]) - 1, before)
            inputs[places.row[i], places.left[i]] = before[0]
        inputs[~mask] = self.pad_id
        opens = np.zeros(shape, np.int32)
        opens[places.row, places.left] = 1
        follow = empty & (places.left + 1 < places.right)
        opens[places.row[follow], places.left[follow] + 1] = 1
        segments = np.cumsum(opens, axis=1, dtype=np.int32)
        segments[~mask] = 0
        mask = mask if targets is None else targets == 1
        mask[places.row[empty], places.left[empty]] = False
        return {"input_ids": inputs, "labels": labels, "segment_ids": segments, "loss_mask": mask}

    def pieces(self, indices: Sequence[int] | Integer[np.ndarray, " n"]) -> Pieces:
        """Return the documents, or pieces of long documents, in the given sequences."""
        which, places = self._layout(np.asarray(indices, np.int64))
        return Pieces(places.row, self._starts[which], self._lengths[which].astype(np.int64))

    def _read_targets(
        self, spans: Sequence[tuple[int, ...]], shape: tuple[int, int]
    ) -> UInt8[np.ndarray, "n T"] | None:
        """Read the target values of a batch; None if all tokens are targets.

        Args:
            spans: (row, left, right, stream position) of each piece; see `_Places`.
        """
        if self.split.num_targets == self.split.num_tokens:
            return None
        targets = np.zeros(shape, np.uint8)
        for row, left, right, start in spans:
            self.split.read_targets(start, targets[row, left:right])
        return targets

    def _layout(self, which: Int64[np.ndarray, " n"]) -> tuple[np.ndarray, _Places]:
        """Return the indices of the pieces of sequences `which`, and their places in the batch."""
        low, counts = self._pieces[which], self._pieces[which + 1] - self._pieces[which]
        row, nth = _numbered(counts)
        pieces = low[row] + nth
        lengths = self._lengths[pieces].astype(np.int64)
        ends = np.cumsum(lengths)
        used = np.bincount(row, lengths, len(which)).astype(np.int64)
        left = ends - lengths - (np.cumsum(used) - used)[row]
        return pieces, _Places(row, left, left + lengths)


def _numbered(counts: Int64[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
    """For groups of sizes `counts`, return the group and the rank of each member.

    >>> _numbered(np.array([2, 0, 3]))
    (array([0, 0, 2, 2, 2]), array([0, 1, 0, 1, 2]))
    """
    group = np.repeat(np.arange(len(counts)), counts)
    return group, np.arange(len(group)) - np.repeat(np.cumsum(counts) - counts, counts)


def document_groups(
    split: StoreSplit,
) -> Iterator[tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]]:
    """Yield (starts, lengths) of the documents of a split, `GROUP_DOCUMENTS` documents at a time.

    In raw token files, a document may continue in the next file. So the length of a document is
    known only when the next document starts.
    """
    waiting = np.empty(0, np.int64)
    for starts in split.document_starts():
        waiting = np.concatenate([waiting, starts])
        while len(waiting) > GROUP_DOCUMENTS:
            yield waiting[:GROUP_DOCUMENTS], np.diff(waiting[: GROUP_DOCUMENTS + 1])
            waiting = waiting[GROUP_DOCUMENTS:]
    if len(waiting):
        yield waiting, np.diff(waiting, append=split.num_tokens)


def _plan(
    starts: Int64[np.ndarray, " n"], lengths: Int64[np.ndarray, " n"], size: int
) -> tuple[
    Int64[np.ndarray, " pieces"],
    Int32[np.ndarray, " pieces"],
    Bool[np.ndarray, " pieces"],
    Int64[np.ndarray, " sequences"],
]:
    """Pack documents into sequences of `size` tokens.

    Returns:
        Four arrays. For each piece, in the order of the sequences: its stream position, its length,
        and whether it begins a document. For each sequence: its number of pieces.
    """
    document, nth = _numbered(-(-lengths // size))
    piece_starts = starts[document] + nth * size
    piece_lengths = np.minimum(lengths[document] - nth * size, size)
    sequence = best_fit_decreasing(piece_lengths, size)
    order = np.lexsort((piece_starts, sequence))
    return (
        piece_starts[order],
        piece_lengths[order].astype(np.int32),
        nth[order] == 0,
        np.bincount(sequence).astype(np.int64),
    )


def pack(
    split: StoreSplit,
    block_size: int,
    bos_id: int | None,
    pad_id: int,
    packing: str | None = None,
    on_long: str | None = None,
) -> PackedSequences:
    """Pack a split into sequences.

    By default, rows with a prompt are never cut in two, because an answer without its prompt
    teaches nothing; rows that are too long are truncated. Other documents are joined and cut into
    sequences.

    Args:
        packing: "cut" (`PackedDataset`), "whole" (`WholeDocuments`), or None for the default.
        on_long: what happens to long documents if `packing` is "whole", as in `WholeDocuments`;
            None for the default.

    Raises:
        UserError: a document is too long, and `on_long` is "error".
    """
    have_prompts = split.num_targets < split.num_tokens
    if packing is None:
        packing = "whole" if have_prompts else "cut"
    if packing == "cut":
        return PackedDataset(split, block_size, bos_id, pad_id)
    on_long = on_long or ("truncate" if have_prompts else CONTINUE)
    return WholeDocuments(split, block_size, bos_id, pad_id, on_long)
