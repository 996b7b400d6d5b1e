"""Documents packed into sequences of fixed length without loss: every token of a split is a label exactly once an epoch.

At stream position p the label is tokens[p]; the input is tokens[p - 1], or BOS where a document begins. So the first token of a
document is predicted from BOS, its EOS is predicted, and EOS is never an input: nothing of one document is in the next one's input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer

from consyn_jax.data.shards import StoreSplit

Batch = dict[str, np.ndarray]
# Documents planned together in `WholeDocuments`: enough to find a match for every gap, few enough to plan in a moment.
GROUP_DOCUMENTS = 65_536


class PackedSequences(ABC):
    """What both packings have in common.

    The loss counts a label where "loss_mask" is true: at the targets of fine-tuning rows, everywhere else in other data. "segment_ids"
    are above 0 also where a token is no target, because it is read all the same; only padding is 0.

    Args:
        block_size: tokens in a sequence.
        bos_id: the input in front of each document.
        pad_id: input and label where a sequence is padded; the mask is False there and the segment 0.

    Attributes:
        num_tokens: labels in an epoch, of which `num_targets` are counted.
        num_documents, num_bytes: of the split; None where nobody knows.
        padding_fraction: share of the positions of an epoch that are padding.
    """

    def __init__(self, split: StoreSplit, block_size: int, bos_id: int, pad_id: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {block_size}.")
        self.split, self.block_size, self.bos_id, self.pad_id = split, block_size, bos_id, pad_id
        self.num_tokens, self.num_targets = split.num_tokens, split.num_targets
        self.num_documents, self.num_bytes = split.num_documents, split.num_bytes

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def rows(self, indices: Sequence[int] | Integer[np.ndarray, " n"]) -> Batch:
        """The sequences `indices` (each in range(len)) at once: the keys of an item, each [n, block_size].

        Segments count the documents of a sequence from 1; 0 is padding.
        """

    def __getitem__(self, i: int) -> Batch:
        """{"input_ids", "labels", "segment_ids"}: int32 [block_size]; "loss_mask": bool [block_size]."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"Item {i} of {len(self)}.")
        return {name: values[0] for name, values in self.rows([i % len(self)]).items()}

    @property
    def padding_fraction(self) -> float:
        return 1 - self.num_tokens / (len(self) * self.block_size) if len(self) else 0.0


class PackedDataset(PackedSequences):
    """The windows of a split, in store order: a document goes on in the next window where one ends.

    Item i covers stream positions i * block_size .. (i + 1) * block_size. Only the last window may be padded.
    """

    def __len__(self) -> int:
        return -(-self.num_tokens // self.block_size)

    def rows(self, indices: Sequence[int] | Integer[np.ndarray, " n"]) -> Batch:
        """The windows `indices` (each in range(len)) at once: the keys of an item, each [n, block_size].

        Segments count the documents of a window from 1; 0 is padding.
        """
        first = np.asarray(indices, np.int64) * self.block_size
        tokens, begins, targets = self.split.windows(first, self.block_size)
        labels, inputs = tokens[:, 1:].astype(np.int32), tokens[:, :-1].astype(np.int32)
        inputs[begins] = self.bos_id
        segments = np.cumsum(begins, axis=1, dtype=np.int32)
        # A window that begins inside a document has its first segment there all the same.
        segments += 1 - begins[:, :1]
        mask = np.ones(begins.shape, bool) if targets is None else targets.view(bool)
        for row in np.flatnonzero(first + self.block_size > self.num_tokens):
            padding = slice(self.num_tokens - int(first[row]), None)
            labels[row, padding] = inputs[row, padding] = self.pad_id
            segments[row, padding] = mask[row, padding] = 0
        return {"input_ids": inputs, "labels": labels, "segment_ids": segments, "loss_mask": mask}


class WholeDocuments(PackedSequences):
    """Sequences of whole documents: none is cut that fits, and padding stands only where no document fits.

    Best-fit-decreasing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling") within groups of `GROUP_DOCUMENTS`
    consecutive documents. A document longer than `block_size` is cut into full sequences and a rest that is packed like a document;
    the first input of the rest is the token in front of it, and it is its own segment. The plan is a function of the document lengths
    alone, is made when this object is, and takes 13 bytes a document (or piece of a long one) and 8 bytes a sequence. Tokens are not
    read for it, except where a split has no index (raw token files) and document starts have to be looked for.
    """

    def __init__(self, split: StoreSplit, block_size: int, bos_id: int, pad_id: int) -> None:
        super().__init__(split, block_size, bos_id, pad_id)
        plans = [_plan(starts, lengths, block_size) for starts, lengths in _groups(split)]
        self._starts = np.concatenate([np.empty(0, np.int64), *(plan[0] for plan in plans)])
        self._lengths = np.concatenate([np.empty(0, np.int32), *(plan[1] for plan in plans)])
        self._begins = np.concatenate([np.empty(0, bool), *(plan[2] for plan in plans)])
        sizes = np.concatenate([np.empty(0, np.int64), *(plan[3] for plan in plans)])
        self._pieces = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)  # of sequence i: pieces [i] .. [i + 1]

    def __len__(self) -> int:
        return len(self._pieces) - 1

    def rows(self, indices: Sequence[int] | Integer[np.ndarray, " n"]) -> Batch:
        """The sequences `indices` (each in range(len)) at once: the keys of an item, each [n, block_size].

        Segments count the pieces of a sequence from 1; 0 is padding.
        """
        which = np.asarray(indices, np.int64)
        low, counts = self._pieces[which], self._pieces[which + 1] - self._pieces[which]
        row = np.repeat(np.arange(len(which)), counts)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        piece = low[row] + nth
        starts, lengths, begins = self._starts[piece], self._lengths[piece].astype(np.int64), self._begins[piece]
        behind = np.cumsum(lengths)
        used = np.bincount(row, lengths, len(which)).astype(np.int64)
        column = behind - lengths - (np.cumsum(used) - used)[row]
        positions = starts.tolist()
        self.split.verify(positions, (starts + lengths).tolist())
        tokens = np.zeros((len(which), self.block_size), self.split.dtype)
        places = list(zip(row.tolist(), column.tolist(), (column + lengths).tolist(), positions, strict=True))
        for r, left, right, start in places:
            self.split.read(start, tokens[r, left:right])
        mask = np.arange(self.block_size) < used[:, None]
        labels = np.where(mask, tokens, np.int32(self.pad_id)).astype(np.int32, copy=False)
        inputs = np.full_like(labels, self.pad_id)
        inputs[:, 1:] = labels[:, :-1]
        inputs[row, column] = self.bos_id
        before = np.empty(1, self.split.dtype)
        for i in np.flatnonzero(~begins):
            self.split.read(positions[i] - 1, before)
            inputs[row[i], column[i]] = before[0]
        inputs[~mask] = self.pad_id
        opens = np.zeros(mask.shape, np.int32)
        opens[row, column] = 1
        segments = np.cumsum(opens, axis=1, dtype=np.int32)
        segments[~mask] = 0
        if self.num_targets < self.num_tokens:
            targets = np.zeros(mask.shape, np.uint8)
            for r, left, right, start in places:
                self.split.read_targets(start, targets[r, left:right])
            mask = targets.view(bool)
        return {"input_ids": inputs, "labels": labels, "segment_ids": segments, "loss_mask": mask}


def _groups(split: StoreSplit) -> Iterator[tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]]:
    """(starts, lengths) of `GROUP_DOCUMENTS` consecutive documents at a time; a document may go on in the next shard."""
    waiting = np.empty(0, np.int64)
    for starts in split.document_starts():
        waiting = np.concatenate([waiting, starts])
        while len(waiting) > GROUP_DOCUMENTS:  # more, because a document ends where the next one starts
            yield waiting[:GROUP_DOCUMENTS], np.diff(waiting[: GROUP_DOCUMENTS + 1])
            waiting = waiting[GROUP_DOCUMENTS:]
    if len(waiting):
        yield waiting, np.diff(waiting, append=split.num_tokens)


def _plan(
    starts: Int64[np.ndarray, " n"], lengths: Int64[np.ndarray, " n"], size: int
) -> tuple[Int64[np.ndarray, " pieces"], Int32[np.ndarray, " pieces"], Bool[np.ndarray, " pieces"], Int64[np.ndarray, " sequences"]]:
    """Pieces by sequence: (stream position, length, whether a document begins there), and the number of pieces of each sequence."""
    counts = -(-lengths // size)
    document = np.repeat(np.arange(len(starts)), counts)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    piece_starts = starts[document] + nth * size
    piece_lengths = np.minimum(lengths[document] - nth * size, size)
    sequence = best_fit_decreasing(piece_lengths, size)
    order = np.lexsort((piece_starts, sequence))
    return piece_starts[order], piece_lengths[order].astype(np.int32), nth[order] == 0, np.bincount(sequence).astype(np.int64)


def best_fit_decreasing(lengths: Int64[np.ndarray, " n"], size: int) -> Int64[np.ndarray, " n"]:
    """A bin for each item, the longest first, each in the fullest bin that has room for it, or in a new one; bins count from 0.

    Items of one length go together: the fullest bin with room takes as many of them as it can hold, then the next fullest. Which
    spaces there are is kept in the bits of one integer, so the smallest that suffices is a shift and a lowest bit away. The time
    goes with the distinct lengths and not with the items.

    Args:
        lengths: each in 1 .. size.

    >>> best_fit_decreasing(np.array([5, 3, 4, 6, 2]), 10)
    array([1, 1, 0, 0, 1])
    """
    with_space: defaultdict[int, list[int]] = defaultdict(list)
    spaces, bins = 0, 0  # bit r of `spaces`: there are bins with room for r more
    chosen: list[int] = []
    values, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            fitting = spaces >> length
            space = length + (fitting & -fitting).bit_length() - 1 if fitting else size
            each = space // length
            if not fitting:
                with_space[size] = list(range(bins, bins := bins + -(-count // each)))
                spaces |= 1 << size
            candidates = with_space[space]
            # The fullest bin takes what it holds, or all that are left.
            each = min(each, count)
            filled = min(len(candidates), count // each)
            taken = candidates[-filled:]
            del candidates[-filled:]
            chosen += taken if each == 1 else [number for number in taken for _ in range(each)]
            count -= filled * each
            if not candidates:
                spaces &= ~(1 << space)
            if space > each * length:
                with_space[space - each * length] += taken
                spaces |= 1 << (space - each * length)
    result = np.empty(len(lengths), np.int64)
    result[np.argsort(-lengths, kind="stable")] = chosen
    return result
