"""`BatchSource` for sequences that can be read by position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from consyn_jax.data.loader import Batch, BatchLoader, Dataset, Order, evaluation_batches
from consyn_jax.data.packing import PackedDataset, WholeDocuments
from consyn_jax.data.streaming import Streamed
from consyn_jax.errors import UserError
from consyn_jax.training.inputs.batch_source import BatchSource


class IndexedBatches(BatchSource):
    """Batches of sequences that can be read by position, so that training can start at any step.

    Args:
        order: Order of the training sequences; None for data that is used only for evaluation.
        dataset: Sequences of an epoch or of an evaluation; None if they are not known yet.
        close: Function that the method `close` calls.
    """

    def __init__(
        self,
        order: Order | None,
        dataset: Dataset | None,
        fingerprint: str,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.order, self.dataset, self.fingerprint, self._close = order, dataset, fingerprint, close
        self.packing = _packing(order if dataset is None else dataset)

    @property
    def sequences(self) -> int | None:
        """Number of sequences in the dataset; None if there is no dataset yet."""
        return None if self.dataset is None else len(self.dataset)

    @property
    def tokens(self) -> int | None:
        """Number of tokens in the dataset; None if it is unknown."""
        return getattr(self.dataset, "num_tokens", None)

    @property
    def num_bytes(self) -> int | None:
        """Bytes of the dataset's text; None if only a part of the text is a target of the loss."""
        if getattr(self.dataset, "num_targets", self.tokens) != self.tokens:
            return None
        return getattr(self.dataset, "num_bytes", None) or None

    def training(
        self, start_step: int, batch_size: int, accumulation: int, rows: np.ndarray
    ) -> Iterator[Batch]:
        """Yield batches in training order, beginning with the one for step `start_step`."""
        if self.order is None:
            raise UserError(
                "The training data has no sequences, or is the validation data of a corpus "
                "(FirstWindows). Pass other data as train_dataloader."
            )
        loader = BatchLoader(self.order, batch_size, accumulation, rows, start_step)
        return (batch for _, batch in loader)

    def evaluation(self, batch_size: int, rows: np.ndarray) -> Iterator[Batch]:
        """Yield batches of the dataset once, in its own order."""
        if self.dataset is None:
            raise UserError(
                "The evaluation data is a corpus that is still being prepared, so it has no end "
                "yet. Pass consyn_jax.data.streaming.FirstWindows(corpus, block_size)."
            )
        return evaluation_batches(self.dataset, batch_size, rows)

    def close(self) -> None:
        """Stop the preparation of a corpus that is still being prepared, if there is one."""
        self._close()


def _packing(data: Any) -> str | None:
    """Return the packing of the data; for a mixture, "whole" if any source has that packing."""
    mixed = getattr(data, "sources", None)
    found = [one.packed for one in mixed.values()] if isinstance(mixed, Mapping) else [data]
    if any(isinstance(packed, WholeDocuments) for packed in found):
        return "whole"
    is_cut = all(isinstance(packed, PackedDataset | Streamed) for packed in found)
    return "cut" if is_cut else None
