"""Run the tasks of the phases: the interface of all engines, and a plain loop."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from consyn_jax.data.preparation.segments.job import Job
from consyn_jax.data.preparation.segments.phases import Answer, work, work_on_file
from consyn_jax.errors import UserError


class Tasks(AbstractContextManager["Tasks"]):
    """Runs the tasks of a phase, in any order and in any number of processes."""

    @abstractmethod
    def run(
        self, job: Job, phase: str, numbers: Sequence[int], done: Callable[[int], None]
    ) -> None:
        """Run the tasks `numbers` of a phase; call `done` with the number of finished tasks so far.

        Raises:
            UserError: tasks have failed; the message is about the failed task with the lowest
                number.
        """

    @abstractmethod
    def hashes(self, paths: Sequence[Path], done: Callable[[int], None]) -> list[Any]:
        """Return the size, time stamp and SHA-256 of each file.

        Args:
            done: function that is called with the number of finished tasks so far.

        Raises:
            UserError: a file cannot be read.
        """

    @abstractmethod
    def close(self) -> None:
        """End the processes; tasks in progress are lost."""

    def __exit__(self, *_: object) -> None:
        self.close()


class TasksHere(Tasks):
    """Runs the tasks one after another in this process, for tests and measurements."""

    def run(
        self, job: Job, phase: str, numbers: Sequence[int], done: Callable[[int], None]
    ) -> None:
        """Run the tasks in order."""
        for count, number in enumerate(numbers, 1):
            _taken(work(str(job.root), job.identity, phase, number))
            done(count)

    def hashes(self, paths: Sequence[Path], done: Callable[[int], None]) -> list[Any]:
        """Hash the files in order."""
        return [_taken(work_on_file(str(path.resolve()))) for path in paths]

    def close(self) -> None:
        """Do nothing, because there are no processes."""


def _taken(answer: Answer) -> Any:
    fault, result = answer
    if fault:
        raise UserError(fault)
    return result
