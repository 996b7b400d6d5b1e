"""Batches for training and for evaluation, and a thread that prefetches them.

A batch is a function of (seed, step). With A micro-batches of B sequences, step s takes the global
positions s * A * B .. (s + 1) * A * B. Micro-batch a takes positions a * B .. (a + 1) * B of the
step. Each process reads only its own rows of a micro-batch. The global batch is the same for any
number of processes.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from queue import Empty, Queue
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
from jaxtyping import Int64

from consyn_jax.data.order import ids_at
from consyn_jax.data.packing import Sequences

Batch = dict[str, np.ndarray]
"""A batch in host memory, the input of a training step: "input_ids", "labels" and "segment_ids" in
int32, and "loss_mask" in bool. Their shape is [accumulation_steps, sequences, T] in training, and
[sequences, T] in evaluation.
"""
Rows = slice | np.ndarray
POLL_S = 0.2  # seconds between two calls of `interrupted` while waiting
In = TypeVar("In")
Out = TypeVar("Out")


@runtime_checkable
class Dataset(Protocol):
    """A collection of training sequences, read by index."""

    def __len__(self) -> int: ...

    def rows(self, indices: Any) -> Sequences:
        """Read the sequences with the given indices, as arrays [n, T]."""


@runtime_checkable
class Order(Protocol):
    """An endless order of training sequences. The position alone determines the sequence."""

    def at(self, positions: Int64[np.ndarray, " n"]) -> Sequences:
        """Read the sequences at the given positions (at least 0), as arrays [n, T]."""

    def passes(self, position: int) -> dict[str, int]:
        """Return the number of complete passes over each source before `position`.

        The keys are the names of the sources. The name of a single source is "".
        """


class Shuffled:
    """The order of a run on one dataset, which is repeated endlessly and shuffled in each epoch.

    Args:
        shuffle: False keeps the order of the dataset.

    Raises:
        ValueError: the dataset has no samples.
    """

    def __init__(self, dataset: Dataset, seed: int, shuffle: bool = True) -> None:
        if not len(dataset):
            raise ValueError("The dataset has no samples.")
        self.dataset, self.seed, self.shuffle = dataset, seed, shuffle

    def at(self, positions: Int64[np.ndarray, " n"]) -> Sequences:
        """Read the sequences at the given positions (at least 0), as arrays [n, T]."""
        return self.dataset.rows(ids_at(self.seed, positions, len(self.dataset), self.shuffle))

    def passes(self, position: int) -> dict[str, int]:
        """Return the number of complete epochs before `position`; the only key is ""."""
        return {"": position // len(self.dataset)}


class BatchLoader:
    """An endless iterator over batches from `start_step` on; a batch may span two epochs.

    It yields (step, batch). The arrays of a batch are [accumulation_steps, b, T], where b is the
    number of `rows`.

    Args:
        batch_size: number of rows of a micro-batch, over all processes.
        rows: the rows of each global micro-batch that this process reads.
    """

    def __init__(
        self,
        order: Order,
        batch_size: int,
        accumulation_steps: int = 1,
        rows: Rows = slice(None),
        start_step: int = 0,
    ) -> None:
        self.order, self.start_step = order, start_step
        self.batch_size, self.accumulation_steps = batch_size, accumulation_steps
        held = np.arange(batch_size)[rows]
        self._held = (np.arange(accumulation_steps)[:, None] * batch_size + held).astype(np.int64)

    def batch(self, step: int) -> Batch:
        """Build the batch of a step; it does not depend on earlier calls."""
        positions = step * self.accumulation_steps * self.batch_size + self._held
        rows = self.order.at(positions.reshape(-1))
        return {
            name: values.reshape(*self._held.shape, *values.shape[1:])
            for name, values in rows.items()
        }

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        for step in itertools.count(self.start_step):
            yield step, self.batch(step)


def evaluation_batches(
    dataset: Dataset, batch_size: int, rows: Rows = slice(None)
) -> Iterator[Batch]:
    """Iterate over a dataset once, in order, in batches of equal shape [b, T].

    The last batch is padded with rows whose mask is False and whose segment is 0.

    Args:
        batch_size: number of rows of a batch, over all processes.
        rows: the rows of each batch that this process reads.
    """
    held = np.arange(batch_size)[rows]
    for first in range(0, len(dataset), batch_size):
        indices = first + held
        beyond = indices >= len(dataset)
        batch = dataset.rows(np.where(beyond, 0, indices))
        for name in ("loss_mask", "segment_ids"):
            batch[name][beyond] = 0
        yield batch


class _End:
    """The last item in the queue: the exception that ended the thread, or None."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class prefetch(Generic[Out]):
    """Iterate with a background thread that keeps up to `depth` items ready.

    If the thread raises an exception, the consumer gets the earlier items and then the exception.
    The thread ends on `close()`, at the end of a `with` block, when this object is
    garbage-collected, and at exit.

    Args:
        transform: function applied to each item in the thread.
        interrupted: function called while the consumer waits for an item. If it returns true, the
            iteration ends.

    Attributes:
        wait_s: total seconds that the consumer has waited for items.
    """

    def __init__(
        self,
        iterable: Iterable[In],
        depth: int = 2,
        transform: Callable[[In], Out] | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.wait_s = 0.0
        self._interrupted = interrupted
        # Do not use SimpleQueue. If a signal handler runs longer than the timeout, CPython's
        # SimpleQueue waits for ever, because it treats the negative remaining time as no timeout.
        self._ready: Queue[Any] = Queue()
        self._free = threading.Semaphore(depth)
        self._stop = threading.Event()
        self._ended = False
        # The thread must not refer to this object, or it would never be garbage-collected.
        arguments = (iter(iterable), transform, self._ready, self._free, self._stop)
        thread = threading.Thread(target=_produce, args=arguments, name="prefetch", daemon=True)
        self._finalizer = weakref.finalize(self, _end_thread, thread, self._free, self._stop)
        thread.start()

    def __iter__(self) -> Iterator[Out]:
        return self

    def __next__(self) -> Out:
        if self._ended:
            raise StopIteration
        began = time.perf_counter()
        try:
            item = self._next_item()
        finally:
            self.wait_s += time.perf_counter() - began
        if isinstance(item, _End):
            self.close()
            if item.error is not None:
                raise item.error
            raise StopIteration
        self._free.release()
        return cast(Out, item)

    def _next_item(self) -> Any:
        while True:
            try:
                return self._ready.get(timeout=POLL_S)
            except Empty:
                if self._interrupted():
                    raise StopIteration from None

    def close(self) -> None:
        """End the thread after the item in progress, and discard the items that are ready."""
        self._ended = True
        self._finalizer()

    def __enter__(self) -> prefetch[Out]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _produce(
    items: Iterator[Any],
    transform: Callable[[Any], Any] | None,
    ready: Queue[Any],
    free: threading.Semaphore,
    stop: threading.Event,
) -> None:
    error: BaseException | None = None
    try:
        while True:
            free.acquire()
            if stop.is_set():
                return
            try:
                item = next(items)
            except StopIteration:
                break
            ready.put(item if transform is None else transform(item))
    except BaseException as caught:  # noqa: BLE001 (whatever it is, the consumer raises it)
        error = caught
    ready.put(_End(error))


def _end_thread(thread: threading.Thread, free: threading.Semaphore, stop: threading.Event) -> None:
    stop.set()
    free.release()
    if thread is not threading.current_thread():  # garbage collection may run in this thread
        thread.join()
