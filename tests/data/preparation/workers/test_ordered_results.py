"""Results in the order of the blocks, with a bounded number in progress."""

import random
from concurrent.futures import Future

import pytest

from consyn_jax.data.preparation.encoded_documents import EncodedDocuments
from consyn_jax.data.preparation.workers.ordered_results import in_order
from consyn_jax.data.preparation.workers.worker import Result
from consyn_jax.data.sources.reader import Block


def block(number: int, size: int = 1) -> Block:
    return Block("text", "a.txt", b"x" * size, number, 0, (number, number), 0)


class Farm:
    """Workers that end in any order: when their result is asked for, or some time before."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.running, self.most, self.most_bytes = rng, {}, 0, 0

    def submit(self, given: Block) -> "Future[Result]":
        farm = self

        class Waited(Future):
            def result(self, timeout: float | None = None) -> Result:
                farm.end(given.first)
                return super().result(timeout)

        future = self.running[given.first] = Waited()
        future.size = len(given.data)
        self.most = max(self.most, len(self.running))
        self.most_bytes = max(self.most_bytes, sum(f.size for f in self.running.values()))
        for number in list(self.running):
            if self.rng.random() < 0.2:
                self.end(number)
        return future

    def end(self, number: int) -> None:
        if number in self.running:
            done = Result(EncodedDocuments.none(), rows_not_utf8=number)
            self.running.pop(number).set_result(done)


@pytest.mark.parametrize("seed", range(5))
def test_results_come_in_the_order_of_the_blocks(seed: int) -> None:
    farm = Farm(random.Random(seed))
    blocks = [(f"tag {n}", block(n)) for n in range(100)]
    found = list(in_order(blocks, farm.submit, lambda: 5, 1 << 30))
    assert [(tag, given) for tag, given, _ in found] == blocks
    assert [result.rows_not_utf8 for _, _, result in found] == list(range(100))
    assert farm.most <= 6


def test_the_limit_of_blocks_may_change() -> None:
    """As a cluster grows."""
    farm, limits = Farm(random.Random(0)), iter([1] * 50 + [20] * 50)
    farm.rng.random = lambda: 1.0  # type: ignore[method-assign]  # none ends before it is asked for
    seen = []
    for _ in in_order([(n, block(n)) for n in range(100)], farm.submit, lambda: next(limits), 999):
        seen.append(farm.most)
    assert max(seen[:40]) == 2
    assert seen[-1] == 21


def test_the_bytes_in_progress_are_bounded() -> None:
    farm = Farm(random.Random(1))
    farm.rng.random = lambda: 1.0  # type: ignore[method-assign]
    blocks = [(n, block(n, 300 if n % 7 == 0 else 10)) for n in range(60)]
    assert len(list(in_order(blocks, farm.submit, lambda: 50, 400))) == 60
    assert farm.most_bytes <= 700  # one more than the limit, while the oldest is waited for


def test_an_error_comes_in_its_place() -> None:
    failed: Future[Result] = Future()
    failed.set_exception(ZeroDivisionError("a defect"))
    whole: Future[Result] = Future()
    whole.set_result(Result(EncodedDocuments.none()))
    futures = iter([whole, failed])
    found = in_order([(1, block(1)), (2, block(2))], lambda _: next(futures), lambda: 9, 9)
    assert next(found)[0] == 1
    with pytest.raises(ZeroDivisionError, match="a defect"):
        next(found)
