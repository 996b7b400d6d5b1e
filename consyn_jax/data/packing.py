"""Documents packed into windows of fixed length without loss: every token of a split is a label exactly once an epoch.

At stream position p the label is tokens[p]; the input is tokens[p - 1], or BOS where a document begins. So the first token of a
document is predicted from BOS, its EOS is predicted, and EOS is never an input: nothing of one document is in the next one's input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int64, Integer

from consyn_jax.data.shards import MemoryShard, StoreSplit

Batch = dict[str, np.ndarray]


class PackedDataset:
    """The windows of a split, in store order.

    Item i covers stream positions i * block_size .. (i + 1) * block_size. Only the last window may be padded: there the input and
    label are `pad_id`, the mask False and the segment 0.

    Args:
        block_size: tokens in a window.
        bos_id: the input in front of each document.
    """

    def __init__(self, split: StoreSplit, block_size: int, bos_id: int, pad_id: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {block_size}.")
        self.split, self.block_size, self.bos_id, self.pad_id = split, block_size, bos_id, pad_id
        self.num_tokens, self.num_documents, self.num_bytes = split.num_tokens, split.num_documents, split.num_bytes

    def __len__(self) -> int:
        return -(-self.num_tokens // self.block_size)

    def __getitem__(self, i: int) -> Batch:
        """{"input_ids", "labels", "segment_ids"}: int32 [block_size]; "loss_mask": bool [block_size]."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"Item {i} of {len(self)}.")
        return {name: values[0] for name, values in self.rows([i % len(self)]).items()}

    def rows(self, indices: Sequence[int] | Integer[np.ndarray, " n"]) -> Batch:
        """The windows `indices` (each in range(len)) at once: the keys of an item, each [n, block_size].

        Segments count the documents of a window from 1; 0 is padding.
        """
        first = np.asarray(indices, np.int64) * self.block_size
        n, width = len(first), self.block_size
        labels = np.full((n, width), self.pad_id, np.int32)
        inputs = np.full((n, width), self.pad_id, np.int32)
        begins = np.zeros((n, width), np.int32)
        offsets = self.split.offsets
        shard_of = np.searchsorted(offsets, first, "right") - 1
        whole = first + width <= offsets[np.minimum(shard_of + 1, len(offsets) - 1)]
        for number in np.unique(shard_of[whole]):
            at = np.flatnonzero(whole & (shard_of == number))
            self._fill(int(number), at, first[at], labels, inputs, begins)
        for row in np.flatnonzero(~whole):
            for number, start, stop, column in self._pieces(int(first[row])):
                view = slice(row, row + 1), slice(column, column + stop - start)
                self._fill(number, np.array([0]), np.array([start]), labels[view], inputs[view], begins[view])
        mask = first[:, None] + np.arange(width) < self.num_tokens
        # A window that begins inside a document has its first segment there all the same.
        segments = np.cumsum(begins, axis=1, dtype=np.int32) + (1 - begins[:, :1])
        return {"input_ids": inputs, "labels": labels, "segment_ids": np.where(mask, segments, np.int32(0)), "loss_mask": mask}

    def _pieces(self, first: int) -> Iterator[tuple[int, int, int, int]]:
        """(shard, start, stop, column) of the parts of a window that several shards, or the end of the stream, cut."""
        offsets, position = self.split.offsets, first
        end = min(first + self.block_size, self.num_tokens)
        while position < end:
            number = int(np.searchsorted(offsets, position, "right")) - 1
            stop = min(end, int(offsets[number + 1]))
            yield number, position, stop, position - first
            position = stop

    def _fill(
        self, number: int, at: Int64[np.ndarray, " k"], first: Int64[np.ndarray, " k"], labels: np.ndarray, inputs: np.ndarray, begins: np.ndarray
    ) -> None:
        """Write rows `at` of the outputs from stream positions first .. first + width, all of them within shard `number`."""
        shard, width = self.split.shards[number], labels.shape[1]
        first = first - self.split.offsets[number]
        tokens, starts = shard.tokens, shard.starts
        labels[at] = np.lib.stride_tricks.sliding_window_view(tokens, width)[first]
        inputs[at, 1:] = labels[at, :-1]
        # A shard begins with a document, so what stands before its first token is never needed.
        inputs[at, 0] = tokens[np.maximum(first - 1, 0)]
        low, high = np.searchsorted(starts, first), np.searchsorted(starts, first + width)
        counts = high - low
        row = np.repeat(np.arange(len(at)), counts)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        column = starts[low[row] + nth] - first[row]
        begins[at[row], column] = 1
        inputs[at[row], column] = self.bos_id


def memory_split(documents: Sequence[Int64[np.ndarray, " _"]], eos_id: int) -> StoreSplit:
    """Documents in memory as a split; EOS is put behind each that lacks it, and the bytes of their text are not known.

    Args:
        documents: the ids of each, without BOS.
    """
    return StoreSplit([MemoryShard(documents, eos_id)])
