"""Data whose sequences have positions, so that any step can be read at once."""

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
    """Sequences in an arithmetic order, so any step can be read at once.

    Args:
        order: the order of training; None for data that is only evaluated on.
        dataset: the sequences of an epoch or evaluation; None if they are not known yet.
        close: called by `close`.
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
        """Length of the dataset; None if there is none yet."""
        return None if self.dataset is None else len(self.dataset)

    @property
    def tokens(self) -> int | None:
        """Tokens of the dataset, if it counts them."""
        return getattr(self.dataset, "num_tokens", None)

    @property
    def num_bytes(self) -> int | None:
        """Bytes of the dataset's text; None if it is only partly a target of the loss."""
        if getattr(self.dataset, "num_targets", self.tokens) != self.tokens:
            return None
        return getattr(self.dataset, "num_bytes", None) or None

    def training(
        self, start_step: int, batch_size: int, accumulation: int, rows: np.ndarray
    ) -> Iterator[Batch]:
        """Batches from the order's position at `start_step` on."""
        if self.order is None:
            raise UserError(
                "The training data has no sequences, or is a FirstWindows, which is for "
                "evaluation. Pass other data as train_dataloader."
            )
        loader = BatchLoader(self.order, batch_size, accumulation, rows, start_step)
        return (batch for _, batch in loader)

    def evaluation(self, batch_size: int, rows: np.ndarray) -> Iterator[Batch]:
        """The dataset once, in its own order."""
        if self.dataset is None:
            raise UserError(
                "The evaluation data is a corpus that is still being prepared, which has no end "
                "yet. Pass its consyn_jax.data.streaming.FirstWindows."
            )
        return evaluation_batches(self.dataset, batch_size, rows)

    def close(self) -> None:
        """Stop a corpus that is still being prepared."""
        self._close()


def _packing(data: Any) -> str | None:
    """The packing of the documents; "whole" if any of several datasets is packed that way."""
    mixed = getattr(data, "sources", None)
    found = [one.packed for one in mixed.values()] if isinstance(mixed, Mapping) else [data]
    if any(isinstance(packed, WholeDocuments) for packed in found):
        return "whole"
    is_cut = all(isinstance(packed, PackedDataset | Streamed) for packed in found)
    return "cut" if is_cut else None
