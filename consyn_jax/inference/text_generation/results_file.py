"""Write `--output` as JSON Lines, in the order of the prompts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from consyn_jax.errors import UserError
from consyn_jax.files import PARTIAL, flush


class ResultsFile:
    """Collects rows in any order, and writes them in order.

    A row is written to `NAME.partial` when all earlier rows are written. The file becomes `NAME`
    when all rows are written, so an interruption leaves only `NAME.partial`.
    """

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path, self._file = path, file
        self._next, self._waiting = 0, dict[int, dict[str, Any]]()

    def add(self, number: int, row: dict[str, Any]) -> None:
        """Add row `number`, counted from 0.

        Raises:
            UserError: The disk is full, or the file cannot be written.
        """
        self._waiting[number] = row
        with _refusals(self.path):
            while self._next in self._waiting:
                line = json.dumps(self._waiting.pop(self._next), ensure_ascii=False)
                self._file.write(line + "\n")
                self._file.flush()
                self._next += 1


@contextmanager
def results_file(path: Path) -> Iterator[ResultsFile]:
    """Open `--output`, and rename it at the end of the block if there was no error.

    Raises:
        UserError: The disk is full, or the file cannot be written.
    """
    partial = path.with_name(path.name + PARTIAL)
    with _refusals(path):
        if path.is_dir():
            raise UserError(f"--output {path} is a directory. Give the path of a file.")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)  # a link of that name is not followed
        file = partial.open("x", encoding="utf-8")
    results = ResultsFile(path, file)
    try:
        yield results
        assert not results._waiting
        with _refusals(path):
            file.flush()
            os.fsync(file.fileno())
            partial.replace(path)
            flush(path.parent)
    finally:
        _close(file)


def _close(file: TextIO) -> None:
    try:
        file.close()
    except OSError:
        # A full disk was already reported when the rows were written.
        return


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--output {path} cannot be written: {error.strerror}. Finished texts are in "
            f"{path.name}{PARTIAL}."
        ) from error
