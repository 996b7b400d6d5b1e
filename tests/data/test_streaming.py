import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from consyn_jax.data import streaming
from consyn_jax.data.loader import BatchLoader, prefetch
from consyn_jax.data.order import ids_at
from consyn_jax.data.packing import PackedDataset
from consyn_jax.data.store.shards import MemoryShard
from consyn_jax.data.store.store_split import StoreSplit
from consyn_jax.data.streaming import FirstWindows, Streamed
from consyn_jax.errors import UserError
from consyn_jax.tokenization import BPETokenizer

TOKENIZER = BPETokenizer.bytes()
BLOCK, WIDTH, VALIDATION = 8, 4, 6


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "BLOCK_WINDOWS", BLOCK)
        patch.setattr(streaming, "VALIDATION_WINDOWS", VALIDATION)
        yield


class Corpus:
    """Stands in for `cached_store.Growing`: grows when told to, and records what is waited for."""

    def __init__(self) -> None:
        self.tokenizer, self.key = TOKENIZER, "key"
        self.shards: dict[str, list[MemoryShard]] = {"train": [], "validation": []}
        self.changed = threading.Condition()
        self.complete, self.error = False, None
        self.asked: list[int | None] = []

    def add(self, documents: list[np.ndarray], name: str = "train") -> None:
        with self.changed:
            self.shards[name].append(MemoryShard(documents, TOKENIZER.eos_token_id))
            self.changed.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        with self.changed:
            self.complete, self.error = error is None, error
            self.changed.notify_all()

    def split(self, name: str, tokens: int | None) -> tuple[StoreSplit, bool]:
        with self.changed:
            self.asked.append(tokens)
            while True:
                found = StoreSplit(self.shards[name])
                if self.complete or (tokens is not None and found.num_tokens >= tokens):
                    return found, self.complete
                if self.error is not None:
                    raise self.error
                self.changed.wait()

    def close(self) -> None:
        if not self.complete:
            self.end(RuntimeError("closed"))


def documents(seed: int, count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 250, rng.integers(1, 15)) for _ in range(count)]


def complete(docs: list[np.ndarray]) -> Corpus:
    corpus = Corpus()
    if docs:
        corpus.add(docs)
    corpus.end()
    return corpus


def rows(order: Streamed, first: int, last: int) -> np.ndarray:
    return np.stack(list(order.at(np.arange(first, last)).values()))


@given(
    seed=st.integers(0, 2**64 - 1),
    count=st.integers(1, 60),
    taken=st.integers(1, 30),
    pauses=st.lists(st.integers(0, 3), min_size=1, max_size=8),
)
@examples(max_examples=15)
def test_the_order_does_not_depend_on_the_progress_of_the_preparation(
    seed: int, count: int, taken: int, pauses: list[int]
) -> None:
    docs = documents(seed % 1000, count)
    whole = Streamed(complete(docs), WIDTH, seed)
    n = -(-sum(len(d) + 1 for d in docs) // WIDTH)
    expected, passes = rows(whole, 0, 3 * n), [whole.passes(p) for p in range(3 * n + 1)]
    growing = Corpus()

    def grow() -> None:
        for number, first in enumerate(range(0, count, 5)):
            time.sleep(pauses[number % len(pauses)] / 2000)
            growing.add(docs[first : first + 5])
        time.sleep(pauses[-1] / 2000)
        growing.end()

    thread = threading.Thread(target=grow)
    thread.start()
    order = Streamed(growing, WIDTH, seed)
    for first in range(0, 3 * n, taken):
        last = min(first + taken, 3 * n)
        np.testing.assert_array_equal(rows(order, first, last), expected[:, first:last])
        assert order.passes(last) == passes[last]
    thread.join()


@pytest.mark.slow
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 80))
def test_every_window_occurs_once_an_epoch(seed: int, count: int) -> None:
    corpus = complete(documents(seed, count))
    split, _ = corpus.split("train", None)
    packed = PackedDataset(split, WIDTH, TOKENIZER.bos_token_id, TOKENIZER.pad_token_id)
    n, order = len(packed), Streamed(corpus, WIDTH, seed)
    windows = list(packed.rows(np.arange(n)).values())
    for epoch in range(3):
        found = order.at(np.arange(epoch * n, (epoch + 1) * n))
        keys = [
            sorted(map(bytes, np.concatenate([v.astype(np.int32) for v in values], axis=1)))
            for values in (windows, found.values())
        ]
        assert keys[0] == keys[1]
    for block in range(n // BLOCK):
        at = np.arange(block * BLOCK, (block + 1) * BLOCK)
        assert sorted(map(bytes, order.at(at)["labels"])) == sorted(
            map(bytes, packed.rows(at)["labels"])
        ), "shuffled within the block"
    later = packed.rows(ids_at(seed, np.arange(n, 2 * n), n))["labels"]
    np.testing.assert_array_equal(
        order.at(np.arange(n, 2 * n))["labels"],
        later,
        "the second epoch is as without streaming",
    )


def test_every_block_is_shuffled_differently() -> None:
    docs = [np.arange(3, 250)] * 10
    order = Streamed(complete(docs), WIDTH, 5)
    labels = order.at(np.arange(10 * BLOCK))["labels"].reshape(10, BLOCK, WIDTH)
    split, _ = order.corpus.split("train", None)
    packed = PackedDataset(split, WIDTH, 0, 0)
    stored = packed.rows(np.arange(10 * BLOCK))["labels"].reshape(10, BLOCK, WIDTH)
    places = [
        [int(np.flatnonzero((stored[b] == row).all(1))[0]) for row in labels[b]] for b in range(10)
    ]
    assert all(sorted(p) == list(range(BLOCK)) for p in places)
    assert len({tuple(p) for p in places}) > 8


def test_a_block_is_read_as_soon_as_it_is_complete() -> None:
    corpus = Corpus()
    order = Streamed(corpus, WIDTH, 1)
    corpus.add([np.full(BLOCK * WIDTH - 2, 7)])
    with ThreadPoolExecutor() as pool:
        first = pool.submit(order.at, np.array([0]))
        time.sleep(0.05)
        assert not first.done()
        corpus.add([np.array([9])])
        assert first.result(120)["labels"].shape == (1, WIDTH)
        assert order.passes(BLOCK - 1) == {"": 0}
        asked = len(corpus.asked)
        order.at(np.arange(BLOCK))
        assert len(corpus.asked) == asked, "windows that exist are not asked for again"
        end = pool.submit(order.passes, BLOCK + 1)
        time.sleep(0.05)
        assert not end.done(), "it is not known yet whether the data ends there"
        corpus.end()
        assert end.result(120) == {"": 1}


@given(stop=st.integers(0, 12), accumulation=st.sampled_from([1, 2, 4]))
@examples(max_examples=15)
def test_a_resume_at_any_step_continues_exactly(stop: int, accumulation: int) -> None:
    docs = documents(3, 40)
    batch = 4 // accumulation
    whole = BatchLoader(Streamed(complete(docs), WIDTH, 9), 4)
    resumed = iter(
        BatchLoader(Streamed(complete(docs), WIDTH, 9), batch, accumulation, start_step=stop)
    )
    for _ in range(3):
        step, found = next(resumed)
        np.testing.assert_array_equal(
            found["labels"].reshape(4, WIDTH), whole.batch(step)["labels"][0]
        )


# ----------------------------------------------------------------------------------- how it can end


def consume(corpus: Corpus) -> prefetch:
    return prefetch(BatchLoader(Streamed(corpus, WIDTH, 1), 4))


def test_an_error_of_the_preparation_is_raised_in_the_consumer() -> None:
    corpus = Corpus()
    corpus.add([np.full(BLOCK * WIDTH, 7)])
    read = consume(corpus)
    assert [next(read)[0], next(read)[0]] == [0, 1]
    threading.Timer(0.5, corpus.end, [UserError("corpus.jsonl:7 is broken JSON.")]).start()
    with pytest.raises(UserError, match=r"corpus\.jsonl:7"):
        next(read)
    assert 0.02 < read.wait_s < 60, "waiting for the corpus is waiting for data"


def test_close_ends_waiting() -> None:
    corpus = Corpus()
    before = threading.active_count()
    read = consume(corpus)
    time.sleep(0.02)
    corpus.close()
    began = time.monotonic()
    read.close()
    assert time.monotonic() - began < 60
    assert threading.active_count() == before


def test_a_corpus_without_training_documents_is_refused() -> None:
    with pytest.raises(UserError, match="none is left to train on"):
        Streamed(complete([]), WIDTH, 1).at(np.array([0]))


# --------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("tokens", "windows", "counted"),
    [
        (VALIDATION * WIDTH * 3, VALIDATION, False),
        (VALIDATION * WIDTH - 5, VALIDATION - 1, True),
        (0, 0, True),
    ],
)
def test_validation_is_the_first_windows(tokens: int, windows: int, counted: bool) -> None:
    corpus = Corpus()
    dataset = FirstWindows(corpus, WIDTH)
    assert corpus.asked == [], "nothing is waited for before the first use"
    ids = np.arange(tokens - 1) % 200 + 3 if tokens else None

    def grow(end: Callable[[], None]) -> None:
        time.sleep(0.02)
        if ids is not None:
            corpus.add([ids], "validation")
        end()

    thread = threading.Thread(target=grow, args=[corpus.end if counted else lambda: None])
    thread.start()
    assert len(dataset) == windows
    thread.join()
    if ids is not None:
        found = dataset.rows(np.arange(windows))
        flat = found["labels"][found["loss_mask"]]
        np.testing.assert_array_equal(
            flat, np.append(ids, TOKENIZER.eos_token_id)[: windows * WIDTH]
        )
    assert corpus.asked == [VALIDATION * WIDTH]


def test_bytes_are_known_for_whole_splits_only() -> None:
    for tokens, num_bytes in ((VALIDATION * WIDTH - 1, 17), (VALIDATION * WIDTH, None)):
        corpus = complete([])
        corpus.add([np.full(tokens - 1, 7)], "validation")
        corpus.shards["validation"][0].num_bytes = 17
        assert FirstWindows(corpus, WIDTH).num_bytes == num_bytes
