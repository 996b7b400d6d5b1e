"""Run the tasks of a preparation with many writers as Ray tasks.

Ray only decides where a task runs. A task gets its phase and its number, and reads everything else
from files that all nodes see. If a worker or a node is lost, Ray runs its tasks again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

from consyn_jax.data.preparation.segments import phases
from consyn_jax.data.preparation.segments.job import Job
from consyn_jax.data.preparation.segments.tasks import Tasks
from consyn_jax.data.preparation.workers.ray_calls import RayCalls
from consyn_jax.errors import UserError


class RayTasks(Tasks):
    """Runs tasks on a Ray cluster.

    Args:
        count: number of tasks that run at a time; None for one on each processor of the cluster.
        address: value of `--ray_address`. If it is None, Ray connects to the cluster in RAY_ADDRESS
            or, if that is not set, starts on this machine.

    Raises:
        UserError: Ray is not installed or cannot be reached.
    """

    def __init__(self, count: int | None, address: str | None) -> None:
        self._calls = RayCalls(count, address, "task")

    def run(
        self, job: Job, phase: str, numbers: Sequence[int], done: Callable[[int], None]
    ) -> None:
        """Run tasks of one phase, in about the order of their numbers."""
        calls = [("work", str(job.root), job.identity, phase, number) for number in numbers]
        self._results(calls, done)

    def hashes(self, paths: Sequence[Path], done: Callable[[int], None]) -> list[Any]:
        """Hash each file in a task of its own."""
        return self._results([("work_on_file", str(path.resolve())) for path in paths], done)

    def _results(self, calls: Sequence[tuple[Any, ...]], done: Callable[[int], None]) -> list[Any]:
        """Run one Ray task for each call, and return the results in the order of the calls.

        If a task fails, no further task is started. Earlier calls are still awaited, so that the
        error is about the earliest fault in the corpus.

        Args:
            calls: for each task, the name of a function of `phases`, and its arguments.
        """
        running: dict[Future[Any], int] = {}
        results: dict[int, Any] = {}
        faults: dict[int, UserError] = {}
        waiting = list(reversed(range(len(calls))))
        while waiting or running:
            while waiting and len(running) < self._most():
                number = waiting.pop()
                running[self._calls.start(phases.__name__, *calls[number])] = number
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                number = running.pop(future)
                try:
                    results[number] = self._result(future)
                except UserError as error:
                    faults[number] = error
                    waiting.clear()
            if faults and not any(number < min(faults) for number in running.values()):
                raise faults[min(faults)]
            done(len(results))
        return [results[number] for number in range(len(calls))]

    def close(self) -> None:
        """Leave the cluster, which ends all tasks; stop Ray if this process started it."""
        self._calls.close()

    def _most(self) -> int:
        """Largest number of tasks in progress.

        By default, there are more tasks than processors, so that no processor waits for a task.
        """
        return self._calls.count or self._calls.processors * 5 // 4 + 1

    def _result(self, future: Future[Any]) -> Any:
        fault, result = self._calls.result(future)
        if fault:
            raise UserError(fault)
        return result
