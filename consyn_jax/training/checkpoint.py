"""Checkpoints of the whole training state: asynchronous, atomic, rotated, restored onto whatever mesh the run has now."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from consyn_jax.config import UserError
from consyn_jax.training.step import TrainState

logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax reports every phase of every save


class Checkpoints:
    """The checkpoints of one run, as `directory/STEP/`.

    Args:
        keep_last: how many of the newest stay.
        keep_every: checkpoints whose step is a multiple of it stay, too.
    """

    def __init__(self, directory: Path, keep_last: int = 3, keep_every: int | None = None) -> None:
        self.directory = directory.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep_last, keep_period=keep_every, cleanup_tmp_directories=True)
        handlers = {"state": ocp.StandardCheckpointHandler(), "run": ocp.JsonCheckpointHandler()}
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        registry.add("state", ocp.args.StandardSave, handlers["state"])
        registry.add("state", ocp.args.StandardRestore, handlers["state"])
        registry.add("run", ocp.args.JsonSave, handlers["run"])
        registry.add("run", ocp.args.JsonRestore, handlers["run"])
        self._manager = ocp.CheckpointManager(self.directory, options=options, handler_registry=registry)

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, run: dict[str, Any]) -> None:
        """Begin to save; returns once the state is copied and writing goes on in the background.

        Args:
            run: what else the run needs to go on, as JSON: tokens trained, selection, tracker ids.
        """
        self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run)), force=True)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """State and run record of `step`.

        Args:
            like: shapes, dtypes and shardings that the state shall have.

        Raises:
            UserError: no such checkpoint, damaged, or of another model.
        """
        if step not in self.steps():
            known = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"{self.directory} has no checkpoint of step {step}; there are: {known}.")
        report = sys.unraisablehook
        sys.unraisablehook = _without_abandoned_reads(report)
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like), run=ocp.args.JsonRestore()))
        except (ValueError, KeyError, FileNotFoundError, json.JSONDecodeError) as error:  # what Orbax raises for damage and for other shapes
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{self.directory / str(step)} cannot be restored: it is damaged or of another model. {reason}") from error
        sys.unraisablehook = report
        return restored["state"], restored["run"]

    def record(self, step: int) -> dict[str, Any]:
        """The run record of `step` without its state.

        Raises:
            UserError: it is damaged.
        """
        try:
            return dict(self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"])
        except (ValueError, KeyError, FileNotFoundError, json.JSONDecodeError) as error:
            raise UserError(f"{self.directory / str(step)} cannot be read: it is damaged.") from error

    def delete_after(self, step: int) -> None:
        """Remove the checkpoints later than `step`: a run that goes on from an earlier one takes another way."""
        for later in [s for s in self.steps() if s > step]:
            self._manager.delete(later)

    def wait(self) -> None:
        """Return when everything begun is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and stop the background threads."""
        self._manager.close()


def _without_abandoned_reads(report: Callable[[Any], None]) -> Callable[[Any], None]:
    """A `sys.unraisablehook` that is silent about the reads which Orbax had begun when one array turned out to be damaged.

    They end at any later time, each with a traceback on stderr, so after a failure the hook stays.
    """

    def hook(unraisable: Any) -> None:
        if "_read_array_index" not in repr(unraisable.object) and "Event loop is closed" not in str(unraisable.exc_value):
            report(unraisable)

    return hook
