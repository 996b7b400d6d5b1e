"""Train while the corpus is still being tokenised, in an order that does not depend on timing.

The sequence at a position depends only on the position, the seed and the content of the finished
store. In the first epoch, windows are shuffled within blocks of `BLOCK_WINDOWS` consecutive
windows. A block is read when all of it is in the store. Later epochs are shuffled as a whole, as
without streaming. A run on a finished store therefore sees the same sequences. A resumed run
continues with the same sequences, whether or not the preparation is complete.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, Integer

from consyn_jax.data.mixture import part_seed
from consyn_jax.data.order import ids_at
from consyn_jax.data.packing import PackedDataset, Sequences
from consyn_jax.data.preparation.cached_store import Growing
from consyn_jax.data.split import TRAIN, VALIDATION
from consyn_jax.data.store.store_split import StoreSplit
from consyn_jax.errors import UserError

# Tokenising 1,024 windows of 1,024 tokens takes about a second, so training begins soon. Yet a
# batch is drawn from a million tokens and not from one or two neighbouring documents.
BLOCK_WINDOWS = 1024
VALIDATION_WINDOWS = 256


class Streamed:
    """An endless order (`loader.Order`) of the training sequences of a growing corpus.

    Args:
        block_size: number of tokens in a window.
    """

    def __init__(self, corpus: Growing, block_size: int, seed: int) -> None:
        self.corpus, self.block_size, self.seed = corpus, block_size, seed
        self._lock = threading.Lock()
        self._packed, self._complete = _pack(corpus, StoreSplit([]), block_size), False

    def at(self, positions: Int64[np.ndarray, " n"]) -> Sequences:
        """Read the sequences at the given positions, as arrays [n, block_size].

        The call waits until the corpus has these sequences, or is complete.

        Raises:
            UserError: the complete corpus has no training documents.
        """
        if not len(positions):
            return self._packed.rows(positions)
        blocks, offsets = np.divmod(positions, np.int64(BLOCK_WINDOWS))
        packed, complete = self._with((int(blocks.max()) + 1) * BLOCK_WINDOWS)
        # Windows within a block are shuffled like an epoch of BLOCK_WINDOWS samples.
        shuffled = ids_at(part_seed(self.seed, 0), positions, BLOCK_WINDOWS)
        if not complete:
            return packed.rows(blocks * BLOCK_WINDOWS + shuffled)
        n = len(packed)
        if not n:
            raise UserError(
                "All documents were assigned to the validation split, so none is left to train "
                "on. Lower --validation_fraction, or give more data."
            )
        last, rest = divmod(n, BLOCK_WINDOWS)
        if rest:
            in_last = np.flatnonzero(blocks == last)
            shuffled[in_last] = ids_at(
                part_seed(self.seed, 1), np.minimum(offsets[in_last], rest - 1), rest
            )
        first_epoch = blocks * BLOCK_WINDOWS + shuffled
        return packed.rows(np.where(positions < n, first_epoch, ids_at(self.seed, positions, n)))

    def passes(self, position: int) -> dict[str, int]:
        """Return the number of complete epochs before `position`, under the key "".

        The call waits until it is known whether the corpus continues after the position.
        """
        packed, complete = self._with(position, 1)
        return {"": position // len(packed) if complete and len(packed) else 0}

    def _with(self, windows: int, more_tokens: int = 0) -> tuple[PackedDataset, bool]:
        """Wait until the corpus has `windows` windows plus `more_tokens` tokens, or is complete.

        Returns:
            All windows so far, and whether the corpus is complete.
        """
        tokens = windows * self.block_size + more_tokens
        with self._lock:
            packed, complete = self._packed, self._complete
        if complete or packed.num_tokens >= tokens:
            return packed, complete
        # Release the lock while waiting, so that another thread can read existing windows.
        split, complete = self.corpus.split(TRAIN, tokens)
        packed = _pack(self.corpus, split, self.block_size)
        with self._lock:
            if packed.num_tokens >= self._packed.num_tokens:
                self._packed, self._complete = packed, complete
        return packed, complete


class FirstWindows:
    """The first `VALIDATION_WINDOWS` windows of the validation split, or all if there are fewer.

    The first use waits until these windows exist. The whole split exists only when the preparation
    ends, but all evaluations must use the same tokens, so that their losses can be compared.
    """

    def __init__(self, corpus: Growing, block_size: int) -> None:
        self.corpus, self.block_size = corpus, block_size
        self._lock = threading.Lock()
        self._packed: PackedDataset | None = None

    def __len__(self) -> int:
        return min(VALIDATION_WINDOWS, len(self._windows()))

    def rows(self, indices: Sequence[int] | Integer[np.ndarray, " n"]) -> Sequences:
        """Read the windows with the given `indices`, each in range(len): arrays [n, block_size]."""
        return self._windows().rows(indices)

    @property
    def num_bytes(self) -> int | None:
        """Size of the windows' text in bytes; None if the windows may end inside a document.

        The size is known only for complete documents.
        """
        packed = self._windows()
        is_whole_split = packed.num_tokens < VALIDATION_WINDOWS * self.block_size
        return packed.num_bytes if is_whole_split else None

    def _windows(self) -> PackedDataset:
        with self._lock:
            if self._packed is None:
                split, _ = self.corpus.split(VALIDATION, VALIDATION_WINDOWS * self.block_size)
                self._packed = _pack(self.corpus, split, self.block_size)
            return self._packed


def _pack(corpus: Growing, split: StoreSplit, block_size: int) -> PackedDataset:
    return PackedDataset(split, block_size, corpus.tokenizer.first_id, corpus.tokenizer.fill_id)
