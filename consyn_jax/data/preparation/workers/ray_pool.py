"""Workers as tasks of Ray, on this machine or on all nodes of a cluster.

A task gets the bytes of its block, because the main process has read them to find the ends of
documents. So a node needs neither the files nor a shared file system; it needs the same packages.
If a worker or node is lost, Ray runs its tasks again, including those whose results were lost.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from consyn_jax.data.preparation.workers.messages import (
    WorkerSettings,
    block_head,
    result_from,
)
from consyn_jax.data.preparation.workers.ordered_results import Workers, in_order
from consyn_jax.data.preparation.workers.ray_cluster import connect, disconnect
from consyn_jax.data.preparation.workers.ray_worker import Answer, versions
from consyn_jax.data.preparation.workers.worker import Result
from consyn_jax.data.sources.reader import Block
from consyn_jax.errors import UserError, brief, listed

RETRIES = 5  # retries of a task whose worker or node was lost
MOST_BYTES = 512 << 20  # size of all blocks in progress, in the object store of this node
LOOK_SECONDS = 10.0  # time between two counts of the cluster's processors

_INSTALL = "Install the versions of this machine on all nodes, and run the same command again."


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
        self._settings, self._count = settings, count
        self._looked_s, self._processors = -LOOK_SECONDS, 0
        shared = json.dumps({"settings": settings.to_json(), "versions": versions()}).encode()
        self._key = hashlib.sha256(shared).hexdigest()
        self._ray = connect(address, count)
        try:
            with self._errors_as_sentences():
                # As an array, each worker reads it in place; bytes would be copied for each task.
                self._shared = self._ray.put(np.frombuffer(shared, np.uint8))
            task = _task(_strangers())
            self._task = self._ray.remote(num_cpus=1, max_retries=RETRIES)(task)
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
        disconnect(self._ray)

    def _submit(self, block: Block) -> _Task:
        head = json.dumps(block_head(block))
        with self._errors_as_sentences():
            # The future fetches the result as soon as there is one, while others are written.
            future = self._task.remote(self._key, self._shared, head, block.data).future()
        return _Task(future, lambda answer: self._result(block, answer))

    def _most(self) -> int:
        if self._count is not None:
            return 2 * self._count + 1
        if time.monotonic() - self._looked_s > LOOK_SECONDS:
            self._looked_s = time.monotonic()
            self._processors = int(self._ray.cluster_resources().get("CPU", 0))
        return 2 * max(self._processors, 1) + 1

    def _result(self, block: Block, future: Future[Answer]) -> Result:
        with self._errors_as_sentences():
            head, arrays = future.result()
        if "differ" in head:
            found = listed([f"{name} {value}" for name, value in head["differ"].items()])
            raise UserError(f"Node {head['node']} of the Ray cluster has {found}. {_INSTALL}")
        if not head["fault"]:
            return result_from(head, arrays)
        # A fault ends the preparation. Process the block again on this machine, because a message
        # with the line of the fault needs the file, which a node may not have.
        return self._settings.worker().work(block)

    @contextmanager
    def _errors_as_sentences(self) -> Iterator[None]:
        errors = self._ray.exceptions
        try:
            yield
        except ImportError as error:
            missing = getattr(error, "cause", error)
            raise UserError(
                f"A node of the Ray cluster cannot import {missing.name or brief(missing)}. "
                f"{_INSTALL}"
            ) from error
        except (errors.WorkerCrashedError, errors.OutOfMemoryError) as error:
            raise UserError(
                f"A worker process on the Ray cluster was killed {RETRIES + 1} times at the same "
                "block; running out of memory is the usual cause. Give Ray fewer CPUs on each "
                "node, or lower --num_workers, and run the command again."
            ) from error
        except errors.RayTaskError:
            raise  # a defect, with the traceback of the worker
        except errors.RayError as error:  # nodes lost, a full object store or disk
            raise UserError(
                f"The Ray cluster lost a block: {brief(error)}. Look at `ray status`, and run the "
                "same command again; it continues."
            ) from error


class _Task:
    """The result of a Ray task that may still be running; implements `Pending`."""

    def __init__(self, future: Future[Answer], result: Callable[[Future[Answer]], Result]) -> None:
        self._future, self._result = future, result

    def done(self) -> bool:
        """Whether the task has ended."""
        return self._future.done()

    def result(self) -> Result:
        """Wait for the result of the task."""
        return self._result(self._future)


def _strangers() -> list[str]:
    """Directories on Ray's import path from which workers must not import.

    This is the current directory, unless it contains this package. Otherwise a user's json.py in
    the current directory would replace Python's module json.
    """
    here = str(Path.cwd())
    return [] if here == str(Path(__file__).parents[4]) else [here]


def _task(strangers: list[str]) -> Callable[[str, np.ndarray, str, bytes], Answer]:
    """Make the function that Ray runs for each block.

    Ray sends the code of a local function to the nodes. So a node that lacks this package can
    still start the function, and fails with an import error that names the package.
    """

    def work(key: str, shared: np.ndarray, head: str, data: bytes) -> Answer:
        import sys

        sys.path[:] = [place for place in sys.path if place not in strangers]
        from consyn_jax.data.preparation.workers import ray_worker

        return ray_worker.work(key, shared, head, data)

    return work
