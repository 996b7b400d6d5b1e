import itertools
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consyn_jax.data import loader
from consyn_jax.data.loader import Batch, BatchLoader, Shuffled, evaluation_batches, prefetch
from consyn_jax.data.packing import PackedDataset, PackedSequences, Sequences, WholeDocuments
from consyn_jax.data.store.shards import MemoryShard
from consyn_jax.data.store.store_split import StoreSplit


class Numbers:
    """A dataset whose rows hold their index."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def rows(self, indices: np.ndarray) -> Sequences:
        ids = np.repeat(np.asarray(indices)[:, None], 3, axis=1)
        return {
            "labels": ids,
            "segment_ids": np.ones_like(ids),
            "loss_mask": np.ones_like(ids, bool),
        }


def indices(batch: Batch) -> list[int]:
    return batch["labels"][..., 0].reshape(-1).tolist()


def take(loader: BatchLoader, steps: int) -> list[tuple[int, Batch]]:
    return list(itertools.islice(loader, steps))


PROCESSES = (1, 2, 3, 4, 8)


def shares(batch_size: int, processes: int) -> list[np.ndarray]:
    """The rows of each process, split as evenly as possible."""
    return np.array_split(np.arange(batch_size), processes)


@given(
    n=st.integers(1, 100),
    seed=st.integers(0, 2**32 - 1),
    accumulation=st.integers(1, 4),
    start=st.integers(0, 10**9),
    batch_size=st.integers(8, 24),
)
def test_any_number_of_processes_reads_the_same_global_batch(
    n: int, seed: int, accumulation: int, start: int, batch_size: int
) -> None:
    order = Shuffled(Numbers(n), seed)
    whole = BatchLoader(order, batch_size, accumulation).batch(start)["labels"]
    for processes in PROCESSES:
        parts = [
            BatchLoader(order, batch_size, accumulation, rows).batch(start)["labels"]
            for rows in shares(batch_size, processes)
        ]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
        for p in range(processes):
            strided = BatchLoader(order, batch_size, accumulation, slice(p, None, processes)).batch(
                start
            )["labels"]
            np.testing.assert_array_equal(strided, whole[:, p::processes])


@given(
    documents=st.lists(
        st.lists(st.lists(st.integers(0, 255), max_size=12), min_size=1, max_size=6),
        min_size=1,
        max_size=4,
    ),
    kind=st.sampled_from([PackedDataset, WholeDocuments]),
    split=st.sampled_from([(24, 1), (12, 2), (8, 3)]),
    seed=st.integers(0, 2**32 - 1),
    stop=st.integers(0, 3),
)
def test_packed_documents_have_one_order_for_any_processes_and_stops(
    documents: list[list[list[int]]],
    kind: type[PackedSequences],
    split: tuple[int, int],
    seed: int,
    stop: int,
) -> None:
    batch_size, accumulation = split
    store = StoreSplit(
        [MemoryShard([np.array(ids, np.int64) for ids in shard], 258) for shard in documents]
    )
    order = Shuffled(kind(store, 8, 257, 256), seed)
    expected = [batch for _, batch in take(BatchLoader(order, 24), 3)]
    for processes in PROCESSES:
        for rows in shares(batch_size, processes):
            mine = [
                *take(BatchLoader(order, batch_size, accumulation, rows), stop),
                *take(BatchLoader(order, batch_size, accumulation, rows, stop), 3 - stop),
            ]
            for (_, batch), whole in zip(mine, expected, strict=True):
                for name, values in batch.items():
                    np.testing.assert_array_equal(
                        values, whole[name].reshape(accumulation, batch_size, 8)[:, rows]
                    )


@given(
    n=st.integers(1, 60),
    seed=st.integers(0, 2**32 - 1),
    split=st.sampled_from([(12, 1), (6, 2), (4, 3), (3, 4), (2, 6), (1, 12)]),
    stop=st.integers(0, 9),
)
def test_samples_depend_on_batch_size_times_accumulation_and_not_on_stops(
    n: int, seed: int, split: tuple[int, int], stop: int
) -> None:
    batch_size, accumulation = split
    order = Shuffled(Numbers(n), seed)
    reference = [i for _, batch in take(BatchLoader(order, 12), 10) for i in indices(batch)]
    before = take(BatchLoader(order, batch_size, accumulation), stop)
    after = take(BatchLoader(order, batch_size, accumulation, start_step=stop), 10 - stop)
    assert [step for step, _ in before + after] == list(range(10))
    assert [i for _, batch in before + after for i in indices(batch)] == reference


def test_shapes_and_epochs() -> None:
    order = Shuffled(Numbers(10), 1)
    step, batch = take(BatchLoader(order, 4, 5), 1)[0]
    assert step == 0
    assert batch["labels"].shape == (5, 4, 3)
    assert sorted(indices(batch)) == sorted([*range(10), *range(10)])
    assert sorted(indices(batch)[:10]) == list(range(10))
    assert indices(batch)[:10] != indices(batch)[10:]
    assert indices(BatchLoader(Shuffled(Numbers(10), 1, shuffle=False), 4, 5).batch(0)) == [
        *range(10),
        *range(10),
    ]
    assert [order.passes(position) for position in (0, 9, 10, 25)] == [
        {"": 0},
        {"": 0},
        {"": 1},
        {"": 2},
    ]


def test_a_dataset_without_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        Shuffled(Numbers(0), 1)


@given(
    n=st.integers(0, 30), batch_size=st.sampled_from([2, 4, 6]), processes=st.sampled_from([1, 2])
)
def test_evaluation_reads_everything_once_in_batches_of_one_shape(
    n: int, batch_size: int, processes: int
) -> None:
    share = batch_size // processes
    parts = [
        list(evaluation_batches(Numbers(n), batch_size, slice(p * share, (p + 1) * share)))
        for p in range(processes)
    ]
    assert {len(part) for part in parts} == {-(-n // batch_size)}
    found = []
    for batches in zip(*parts, strict=True):
        for batch in batches:
            assert batch["labels"].shape == (share, 3)
            assert ((batch["segment_ids"] > 0) == batch["loss_mask"]).all()
            found += batch["labels"][batch["loss_mask"][:, 0], 0].tolist()
    assert found == list(range(n))


# ----------------------------------------------------------------------------------------- prefetch


def wait_until(condition: "object", seconds: float = 120.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.005)
    return False


def prefetch_threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_items_are_transformed_in_order() -> None:
    assert list(prefetch(range(100), 3, lambda i: i * i)) == [i * i for i in range(100)]
    assert list(prefetch([])) == []
    assert wait_until(lambda: prefetch_threads() == 0)


def test_it_reads_ahead_exactly_by_its_depth() -> None:
    started: list[int] = []
    items = prefetch(itertools.count(), 3, lambda i: started.append(i) or i)
    assert wait_until(lambda: len(started) == 3)
    time.sleep(0.05)
    assert started == [0, 1, 2]
    assert next(items) == 0
    assert wait_until(lambda: len(started) == 4)
    items.close()


def test_a_signal_handler_that_outlasts_the_poll_does_not_block_the_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CPython's SimpleQueue would wait for ever."""
    monkeypatch.setattr(loader, "POLL_S", 0.1)
    came, gone = [], threading.Event()
    before = signal.signal(signal.SIGUSR2, lambda *_: (time.sleep(0.2), came.append(True)))
    try:
        items = prefetch((gone.wait() for _ in range(1)), interrupted=lambda: bool(came))
        threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGUSR2]).start()
        assert list(items) == []
    finally:
        signal.signal(signal.SIGUSR2, before)
        gone.set()
    assert came


def test_an_exception_is_raised_at_its_place_in_the_sequence() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("disk gone")

    read = prefetch(items(), 4)
    assert [next(read), next(read)] == [1, 2]
    with pytest.raises(OSError, match="disk gone"):
        next(read)
    assert list(read) == []
    with pytest.raises(ZeroDivisionError):
        list(prefetch([1, 0], 2, lambda i: 1 // i))
    assert wait_until(lambda: prefetch_threads() == 0)


def test_no_thread_survives_an_early_end() -> None:
    with prefetch(itertools.count(), 2) as items:
        assert next(items) == 0
    assert prefetch_threads() == 0
    assert list(items) == []
    for i in prefetch(itertools.count(), 2):
        if i == 3:
            break
    assert wait_until(lambda: prefetch_threads() == 0)
    dropped = prefetch(itertools.count(), 2)
    gone = weakref.ref(dropped)
    del dropped
    assert wait_until(lambda: gone() is None and prefetch_threads() == 0)


def test_waiting_time_is_measured() -> None:
    slow = prefetch(range(4), 1, lambda i: time.sleep(0.2) or i)
    assert list(slow) == [0, 1, 2, 3]
    assert 0.2 < slow.wait_s < 60
    ready = prefetch(range(4), 4)
    assert wait_until(lambda: ready._ready.qsize() == 4)
    next(ready)
    assert ready.wait_s < 0.2
    ready.close()
