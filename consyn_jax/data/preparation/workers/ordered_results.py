"""The interface of all kinds of workers: results in the order of the blocks."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from consyn_jax.data.preparation.workers.worker import Result
from consyn_jax.data.sources.reader import Block


class Workers(AbstractContextManager["Workers"]):
    """Processes that work on blocks.

    The result is a function of the block, so a store does not depend on the kind of the workers.
    """

    @abstractmethod
    def results(self, blocks: Iterable[tuple[Any, Block]]) -> Iterator[tuple[Any, Block, Result]]:
        """Process (tag, block) pairs; yield (tag, block, result) in the same order.

        Raises:
            UserError: a block cannot be processed, or its worker was killed or lost.
        """

    @abstractmethod
    def close(self) -> None:
        """End the workers; blocks in progress are lost."""

    def __exit__(self, *_: object) -> None:
        self.close()


class Pending(Protocol):
    """A result that may still be computed, such as a `concurrent.futures.Future`."""

    def done(self) -> bool:
        """Whether `result` returns at once."""

    def result(self) -> Result:
        """Wait for the result, or raise what its computation raised."""


def in_order(
    blocks: Iterable[tuple[Any, Block]],
    submit: Callable[[Block], Pending],
    most: Callable[[], int],
    most_bytes: int,
) -> Iterator[tuple[Any, Block, Result]]:
    """Yield (tag, block, result) in the order of the blocks.

    Args:
        most: function that returns the maximum number of blocks in progress. It is called for each
            block.
        most_bytes: maximum total size of the blocks in progress, in bytes. A larger block is
            processed alone.
    """
    pending: deque[tuple[Any, Block, Pending]] = deque()
    size = 0
    for tag, block in blocks:
        pending.append((tag, block, submit(block)))
        size += len(block.data)
        limit = most()
        while pending and (len(pending) > limit or size > most_bytes or pending[0][2].done()):
            tag, block, future = pending.popleft()
            size -= len(block.data)
            yield tag, block, future.result()
    while pending:
        tag, block, future = pending.popleft()
        yield tag, block, future.result()
