"""Training while the corpus is still being tokenised, in an order that does not know how far that has come.

What stands at a position is a function of the position, the seed and the finished store. In the first epoch windows are shuffled
within blocks of `BLOCK_WINDOWS` consecutive ones, and a block is given out once all of it is in the store; later epochs are
shuffled whole, as without streaming. So a run on a store that is complete from the start sees the same sequences, and a
resumed run goes on exactly, however far the preparation was when it was stopped.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64, Integer

from consyn_jax.config import UserError
from consyn_jax.data.mixture import part_seed
from consyn_jax.data.order import ids_at
from consyn_jax.data.packing import Batch, PackedDataset
from consyn_jax.data.shards import StoreSplit
from consyn_jax.data.split import TRAIN, VALIDATION

if TYPE_CHECKING:
    from consyn_jax.data.prepare import Growing

# 1,024 windows of 1,024 tokens are about a second of tokenising, so training soon begins; and a batch is drawn from a million
# tokens, not from the one or two documents that stand next to each other.
BLOCK_WINDOWS = 1024
VALIDATION_WINDOWS = 256


class Streamed:
    """The training sequences of a growing corpus, an endless order (`loader.Order`).

    Args:
        block_size: tokens in a window.
    """

    def __init__(self, corpus: Growing, block_size: int, seed: int) -> None:
        self.corpus, self.block_size, self.seed = corpus, block_size, seed
        self._lock = threading.Lock()
        self._packed, self._complete = _pack(corpus, StoreSplit([]), block_size), False

    def at(self, positions: Int64[np.ndarray, " n"]) -> Batch:
        """The sequences at any positions, each array [n, block_size]; waits for those that are still to come.

        Raises:
            UserError: the corpus has no training documents at all.
        """
        if not len(positions):
            return self._packed.rows(positions)
        blocks, offsets = np.divmod(positions, np.int64(BLOCK_WINDOWS))
        packed, complete = self._with((int(blocks.max()) + 1) * BLOCK_WINDOWS)
        shuffled = ids_at(part_seed(self.seed, 0), positions, BLOCK_WINDOWS)  # a block is an epoch of an order of its own
        if complete:
            n = len(packed)
            if not n:
                raise UserError("All documents fell on the validation side and none is left to train on. Lower --validation_fraction, or give more data.")
            last, rest = divmod(n, BLOCK_WINDOWS)
            if rest:
                in_last = np.flatnonzero(blocks == last)
                shuffled[in_last] = ids_at(part_seed(self.seed, 1), np.minimum(offsets[in_last], rest - 1), rest)
            indices = np.where(positions < n, blocks * BLOCK_WINDOWS + shuffled, ids_at(self.seed, positions, n))
        else:
            indices = blocks * BLOCK_WINDOWS + shuffled
        return packed.rows(indices)

    def passes(self, position: int) -> dict[str, int]:
        """Whole epochs in front of `position`, under the name "".

        This waits until it is known whether the corpus goes on behind the position.
        """
        packed, complete = self._with(position, 1)
        return {"": position // len(packed) if complete and len(packed) else 0}

    def _with(self, windows: int, more_tokens: int = 0) -> tuple[PackedDataset, bool]:
        """The windows, at least so many and some tokens or all there are, and whether they are all."""
        tokens = windows * self.block_size + more_tokens
        with self._lock:
            packed, complete = self._packed, self._complete
        if complete or packed.num_tokens >= tokens:
            return packed, complete
        # Not under the lock: one thread may wait for the next block while another only asks about what is there.
        split, complete = self.corpus.split(TRAIN, tokens)
        packed = _pack(self.corpus, split, self.block_size)
        with self._lock:
            if packed.num_tokens >= self._packed.num_tokens:
                self._packed, self._complete = packed, complete
        return packed, complete


class FirstWindows:
    """The first windows of the validation split, `VALIDATION_WINDOWS` or all if there are fewer, waited for when first asked for.

    Not all of it: the split is whole only when the preparation ends, and a loss that is compared between evaluations must always
    be over the same tokens.
    """

    def __init__(self, corpus: Growing, block_size: int) -> None:
        self.corpus, self.block_size = corpus, block_size
        self._lock = threading.Lock()
        self._packed: PackedDataset | None = None

    def __len__(self) -> int:
        return min(VALIDATION_WINDOWS, len(self._windows()))

    def rows(self, indices: Sequence[int] | Integer[np.ndarray, " n"]) -> Batch:
        """The windows `indices` (each in range(len)), each array [n, block_size]."""
        return self._windows().rows(indices)

    @property
    def num_bytes(self) -> int | None:
        """Bytes of the windows' text; None where windows were left out, as nobody counts the bytes of a part of a document."""
        packed = self._windows()
        return packed.num_bytes if packed.num_tokens < VALIDATION_WINDOWS * self.block_size else None

    def _windows(self) -> PackedDataset:
        with self._lock:
            if self._packed is None:
                split, _ = self.corpus.split(VALIDATION, VALIDATION_WINDOWS * self.block_size)
                self._packed = _pack(self.corpus, split, self.block_size)
            return self._packed


def _pack(corpus: Growing, split: StoreSplit, block_size: int) -> PackedDataset:
    return PackedDataset(split, block_size, corpus.tokenizer.bos_token_id, corpus.tokenizer.pad_token_id)
