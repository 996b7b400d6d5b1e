"""Call functions of this package on the nodes of a Ray cluster, as tasks of Ray."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from consyn_jax.data.preparation.workers.ray_cluster import (
    Processors,
    connect,
    disconnect,
    errors_as_sentences,
    other_versions,
    strangers,
)
from consyn_jax.data.preparation.workers.ray_worker import versions

RETRIES = 5  # retries of a task whose worker or node was lost


class RayCalls:
    """A connection to a Ray cluster.

    Args:
        count: number of tasks that run at the same time; None for one on each processor.
        address: value of `--ray_address`. If it is None, Ray connects to the cluster in RAY_ADDRESS
            or, if that is not set, starts on this machine.
        work: name of a task's unit of work in messages, such as "block".

    Attributes:
        count: the argument `count`.

    Raises:
        UserError: Ray is not installed or cannot be reached.
    """

    def __init__(self, count: int | None, address: str | None, work: str) -> None:
        self.count, self._work = count, work
        self._ray = connect(address, count)
        try:
            task = _task(strangers())
            self._task = self._ray.remote(num_cpus=1, max_retries=RETRIES)(task)
            self._processors = Processors(self._ray, count)
        except BaseException:
            self.close()
            raise

    @property
    def processors(self) -> int:
        """Number of tasks that can run at the same time now."""
        return self._processors.count()

    def put(self, value: Any) -> Any:
        """Store a value for all tasks; return a reference that tasks take as an argument."""
        with errors_as_sentences(self._ray, RETRIES, self._work):
            return self._ray.put(value)

    def start(self, module: str, name: str, *arguments: Any) -> Future[Any]:
        """Start a task that calls a function; pass the future to `result`.

        The future fetches the result as soon as the function has returned.

        Args:
            module, name: the module of the function in this package, and its name.
        """
        with errors_as_sentences(self._ray, RETRIES, self._work):
            call = self._task.remote(versions(), module, name, *arguments)
            future: Future[Any] = call.future()
        return future

    def result(self, future: Future[Any]) -> Any:
        """Wait for a task, and return the result of its function.

        Raises:
            UserError: the node has other versions of packages, or the worker process of the task
                was killed too often.
        """
        with errors_as_sentences(self._ray, RETRIES, self._work):
            node, differences, result = future.result()
        if differences:
            raise other_versions(node, differences)
        return result

    def close(self) -> None:
        """Leave the cluster, which ends all tasks; stop Ray if this process started it."""
        disconnect(self._ray)


def _task(left_out: list[str]) -> Callable[..., tuple[str, dict[str, str], Any]]:
    """Make the function that Ray runs for each task.

    Ray sends the code of a local function to the nodes. So a node that lacks this package can
    still start the function, and fails with an import error that names the package.

    Args:
        left_out: directories from which workers must not import.
    """

    def work(expected: dict[str, str], module: str, name: str, *arguments: Any) -> Any:
        import importlib
        import socket
        import sys

        sys.path[:] = [place for place in sys.path if place not in left_out]
        from consyn_jax.data.preparation.workers import ray_worker

        differences = ray_worker.differences(expected)
        if differences:
            return socket.gethostname(), differences, None
        return "", {}, getattr(importlib.import_module(module), name)(*arguments)

    return work
