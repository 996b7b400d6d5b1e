"""Workers as tasks of Ray, on this machine or on all nodes of a cluster.

A task gets the bytes of its block, because the main process has read them to find the ends of
documents. So a node needs neither the files nor a shared file system; it needs the same packages.
If a worker or node is lost, Ray runs its tasks again, including those whose results were lost.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np

from consyn_jax.data.preparation.workers import ray_worker
from consyn_jax.data.preparation.workers.messages import (
    WorkerSettings,
    block_head,
    result_from,
)
from consyn_jax.data.preparation.workers.ordered_results import Workers, in_order
from consyn_jax.data.preparation.workers.ray_calls import RayCalls
from consyn_jax.data.preparation.workers.ray_worker import Answer
from consyn_jax.data.preparation.workers.worker import Result
from consyn_jax.data.sources.reader import Block

MOST_BYTES = 512 << 20  # size of all blocks in progress, in the object store of this node


class RayPool(Workers):
    """Workers that are tasks of Ray.

    Args:
        count: number of tasks that run at a time; None for one on each processor of the cluster.
        address: value of `--ray_address`. If it is None, Ray connects to the cluster in RAY_ADDRESS
            or, if that is not set, starts on this machine.

    Raises:
        UserError: Ray is not installed or cannot be reached, a node has other versions of packages,
            or the worker process of a task was killed too often.
    """

    def __init__(self, count: int | None, settings: WorkerSettings, address: str | None) -> None:
        self._settings = settings
        shared = json.dumps(settings.to_json()).encode()
        self._key = hashlib.sha256(shared).hexdigest()
        self._calls = RayCalls(count, address, "block")
        try:
            # Each worker reads an array in place; bytes would be copied for each task.
            self._shared = self._calls.put(np.frombuffer(shared, np.uint8))
        except BaseException:
            self.close()
            raise

    def results(self, blocks: Iterable[tuple[Any, Block]]) -> Iterator[tuple[Any, Block, Result]]:
        """Process (tag, block) pairs; yield (tag, block, result) in the same order.

        About two blocks per processor are in progress at a time.
        """
        yield from in_order(blocks, self._submit, self._most, MOST_BYTES)

    def close(self) -> None:
        """Leave the cluster, which ends all tasks; stop Ray if this process started it."""
        self._calls.close()

    def _submit(self, block: Block) -> _Task:
        head = json.dumps(block_head(block))
        given = (self._key, self._shared, head, block.data)
        future = self._calls.start(ray_worker.__name__, "work", *given)
        return _Task(future, lambda answer: self._result(block, answer))

    def _most(self) -> int:
        return 2 * self._calls.processors + 1

    def _result(self, block: Block, future: Future[Any]) -> Result:
        answer: Answer = self._calls.result(future)
        head, arrays = answer
        if not head["fault"]:
            return result_from(head, arrays)
        # A fault ends the preparation. Process the block again on this machine, because a message
        # with the line of the fault needs the file, which a node may not have.
        return self._settings.worker().work(block)


class _Task:
    """The result of a Ray task that may still be running; implements `Pending`."""

    def __init__(self, future: Future[Any], result: Callable[[Future[Any]], Result]) -> None:
        self._future, self._result = future, result

    def done(self) -> bool:
        """Whether the task has ended."""
        return self._future.done()

    def result(self) -> Result:
        """Wait for the result of the task."""
        return self._result(self._future)
