"""The interface that the loop and the evaluation read data through."""

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
        order: the order of training sequences; None if the data has no positions.
        fingerprint: equal for equal data.
        content_is_known: whether the fingerprint covers all of the data.
        packing: how documents became sequences, as `--packing`; None for the caller's sequences.
        description: for the header; empty for data that the header describes otherwise.
        warn: called with a sentence about data that turns out to be unusual.
        requests: requests that evaluations also score; None without requests.
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
        """Sequences in an epoch; None if unknown."""
        return None

    @property
    def tokens(self) -> int | None:
        """Tokens in an epoch, without padding; None if unknown."""
        return None

    @property
    def num_bytes(self) -> int | None:
        """Bytes of the text of these tokens, for bits per byte; None if unknown."""
        return None

    @abstractmethod
    def training(
        self, start_step: int, batch_size: int, accumulation: int, rows: np.ndarray
    ) -> Iterator[Batch]:
        """Batches [accumulation, b, T] from step `start_step` on.

        A store seeks; batches that a caller made are read again and skipped up to that step.

        Args:
            batch_size: sequences of a micro-batch over all processes.
            rows: which of them this process holds.
        """

    @abstractmethod
    def evaluation(self, batch_size: int, rows: np.ndarray) -> Iterator[Batch]:
        """All data once, in batches [b, T]."""

    @abstractmethod
    def close(self) -> None:
        """Stop reading. A thread that waits for data gets an exception."""


def described(**sources: BatchSource | None) -> list[tuple[str, str]]:
    """Rows for the header about the sources that describe themselves, and their requests."""
    found = []
    for name, source in sources.items():
        if source is not None and source.description:
            found.append((name, source.description))
        if source is not None and source.requests is not None:
            found.append(("requests", source.requests.description))
    return found
