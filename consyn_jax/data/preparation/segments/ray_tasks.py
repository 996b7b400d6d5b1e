"""Tasks of many writers as tasks of Ray.

Ray only decides where a task runs: a task gets its phase and number, and all else is in files that
all nodes see. If a worker or a node is lost, Ray runs its tasks again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from consyn_jax.data.preparation.segments.job import Job
from consyn_jax.data.preparation.segments.many_writers import Tasks
from consyn_jax.data.preparation.workers.ray_cluster import (
    Processors,
    connect,
    disconnect,
    errors_as_sentences,
    other_versions,
    strangers,
)
from consyn_jax.data.preparation.workers.ray_worker import versions
from consyn_jax.errors import UserError

RETRIES = 5  # of a task, each after its worker or its node was lost


class RayTasks(Tasks):
    """Runs tasks on a Ray cluster.

    Args:
        count: number of tasks that run at a time; None for one on each processor of the cluster.
        address: value of `--ray_address`; None for the cluster of RAY_ADDRESS, or else a Ray that
            is started on this machine.

    Raises:
        UserError: Ray is not installed or cannot be reached.
    """

    def __init__(self, count: int | None, address: str | None) -> None:
        self._ray = connect(address, count)
        try:
            task = _task(strangers())
            self._task = self._ray.remote(num_cpus=1, max_retries=RETRIES)(task)
            self._processors = Processors(self._ray, count)
        except BaseException:
            self.close()
            raise

    def run(
        self, job: Job, phase: str, numbers: Sequence[int], done: Callable[[int], None]
    ) -> None:
        """Run tasks of one phase, in about the order of their numbers.

        After a fault, only tasks with lower numbers are waited for, so that the message is about
        the first fault of the corpus.
        """
        running: dict[Future[Any], int] = {}
        faults: dict[int, Exception] = {}
        waiting, count = list(reversed(numbers)), 0
        while waiting or running:
            # A few tasks wait in the queues of nodes, so that no processor does.
            most = self._processors.count() * 5 // 4 + 1
            while waiting and len(running) < most:
                number = waiting.pop()
                running[self._start(job, phase, number)] = number
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                number, count = running.pop(future), count + 1
                try:
                    self._finish(future)
                except UserError as error:
                    faults[number] = error
                    waiting.clear()
            if faults and not any(number < min(faults) for number in running.values()):
                raise faults[min(faults)]
            done(count)

    def close(self) -> None:
        """Leave the cluster, which ends all tasks; stop Ray if this process started it."""
        disconnect(self._ray)

    def _start(self, job: Job, phase: str, number: int) -> Future[Any]:
        with errors_as_sentences(self._ray, RETRIES, "task"):
            started = self._task.remote(versions(), str(job.root), job.identity, phase, number)
            future: Future[Any] = started.future()
        return future

    def _finish(self, future: Future[Any]) -> None:
        with errors_as_sentences(self._ray, RETRIES, "task"):
            fault, node, differences = future.result()
        if differences:
            raise other_versions(node, differences)
        if fault:
            raise UserError(fault)


def _task(left_out: list[str]) -> Callable[..., tuple[str, str, dict[str, str]]]:
    """Make the function that Ray runs for each task.

    Ray sends the code of a local function to the nodes. So a node that lacks this package can
    still start the function, and fails with an import error that names the package.

    Args:
        left_out: directories from which workers must not import.
    """

    def work(
        expected: dict[str, str], root: str, identity: str, phase: str, number: int
    ) -> tuple[str, str, dict[str, str]]:
        import socket
        import sys

        sys.path[:] = [place for place in sys.path if place not in left_out]
        from consyn_jax.data.preparation.segments import phases
        from consyn_jax.data.preparation.workers import ray_worker

        node = socket.gethostname()
        if differences := ray_worker.differences(expected):
            return "", node, differences
        return phases.work(root, identity, phase, number), node, {}

    return work
