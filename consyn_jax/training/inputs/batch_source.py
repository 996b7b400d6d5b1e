"""`BatchSource`: the interface through which training and evaluation read data."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import numpy as np

from consyn_jax.data.loader import Batch, Order
from consyn_jax.training.inputs.request_evaluation import EvalRequests


class BatchSource(ABC):
    """Training or evaluation data as batches.

    Attributes:
        order: Order of the training sequences; None if the data cannot be read by position.
        fingerprint: Text that is equal for equal data.
        content_is_known: Whether the fingerprint covers the content of all data.
        packing: How documents were packed into sequences, as in `--packing`; None if the caller
            made the sequences.
        description: Description of the data for the header; empty if the header has one already.
        warn: Function for warnings about unusual data.
        requests: Requests with known answers that evaluations also score; None if there are none.
    """

    order: Order | None
    fingerprint: str
    content_is_known: bool = True
    packing: str | None = None
    description: str = ""
    warn: Callable[[str], None] = staticmethod(warnings.warn)
    requests: EvalRequests | None = None

    @property
    def sequences(self) -> int | None:
        """Number of sequences in an epoch; None if unknown."""
        return None

    @property
    def tokens(self) -> int | None:
        """Number of tokens in an epoch, without padding; None if unknown."""
        return None

    @property
    def num_bytes(self) -> int | None:
        """Bytes of the text in an epoch, for the metric bits per byte; None if unknown."""
        return None

    @abstractmethod
    def training(
        self, start_step: int, batch_size: int, accumulation: int, rows: np.ndarray
    ) -> Iterator[Batch]:
        """Yield batches [accumulation, b, T], beginning with the one for step `start_step`.

        Data in a store is read from the position of this step. Batches that were passed in Python
        are read from the beginning, and those before this step are skipped.

        Args:
            batch_size: Sequences per micro-batch, over all processes.
            rows: Indices of the rows of a micro-batch that this process holds.
        """

    @abstractmethod
    def evaluation(self, batch_size: int, rows: np.ndarray) -> Iterator[Batch]:
        """Yield all data once, in batches [b, T]."""

    @abstractmethod
    def close(self) -> None:
        """Stop reading; a thread that waits for data gets an exception."""


def described(**sources: BatchSource | None) -> list[tuple[str, str]]:
    """Describe sources and their evaluation requests, in rows of the run's header."""
    found = []
    for name, source in sources.items():
        if source is not None and source.description:
            found.append((name, source.description))
        if source is not None and source.requests is not None:
            found.append(("requests", source.requests.description))
    return found
