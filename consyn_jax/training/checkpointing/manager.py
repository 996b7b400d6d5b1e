"""`Checkpoints`: asynchronous, atomic, verified checkpoints, which can be restored to any mesh.

Orbax writes and reads the arrays; `commit` turns the written files into a checkpoint
(docs/design/checkpoints.md).
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
from etils import epath  # type: ignore[import-untyped]

from consyn_jax.errors import UserError, brief, counted
from consyn_jax.training.checkpointing.checkpoint_files import STATE, damage, saved_steps
from consyn_jax.training.checkpointing.commit import (
    RECORD,
    Written,
    WrittenPart,
    deleted,
    discard,
    give_name,
    kept_steps,
    merge_parts,
    prepare,
    remove,
    rotate,
    unfinished,
    write_part,
)
from consyn_jax.training.checkpointing.exchange import Exchange
from consyn_jax.training.checkpointing.orbax_writes import (
    WithoutAbandonedWork,
    is_left_alone,
    outlast_abandoned_work,
    refusal,
    run_coroutine,
    writing_thread,
)
from consyn_jax.training.checkpointing.ownership import RunRecord, check_checkpoint, record_in
from consyn_jax.training.checkpointing.restoring import OTHER, read_record, read_state
from consyn_jax.training.step import TrainState

SPARE_BYTES = 1 << 20  # of a checkpoint, besides its arrays


class Checkpoints:
    """The checkpoints of one run, in `directory/STEP/`.

    Every process of the run must make the same calls in the same order.

    If the operating system refuses to write a checkpoint, for example on a full disk, the run
    continues, and only the first failure in a row calls `warn`. The next `save`, `wait` or `close`
    raises any other error of the background thread.

    Args:
        keep_last: Number of newest checkpoints to keep.
        keep_every: Also keep checkpoints whose step is a multiple of this number.
        warn: Called in the caller's thread with warnings about damaged or unwritten checkpoints.
        owner: The run to which the checkpoints must belong; None if any run is accepted.
        before_commit: Function that flushes other files of the run before each commit, in process
            0's background thread. It raises `UserError` if another run has the directory.

    Attributes:
        provenance: Function that makes the content of provenance.json from a step and the hashes of
            the state's files; None for checkpoints without this file.
        written: The last two writes of this process.
        damaged: Fault of each damaged checkpoint that `newest` has found, by step. `delete_after`
            renames these checkpoints.

    Raises:
        UserError: The directory cannot be read.
    """

    def __init__(
        self,
        directory: Path,
        keep_last: int = 3,
        keep_every: int | None = None,
        warn: Callable[[str], None] = warnings.warn,
        owner: RunRecord | None = None,
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        self.directory = directory.absolute()
        self.damaged: dict[int, str] = {}
        self.written: tuple[Written, ...] = ()
        self._keep_last, self._keep_every, self._warn = keep_last, keep_every, warn
        self._owner, self.before_commit = owner, before_commit
        self.provenance: Callable[[int, dict[str, str]], str] | None = None
        # Part of temporary names, so that another start does not mistake these files for its own.
        self._mark = "" if owner is None else f"-{owner.start[:12]}"
        self._verified: set[int] = set()
        self._half_removed: set[int] = set()  # the last removal failed part way
        self._is_failing = False  # the last save failed
        self._has_abandoned_work = False  # Orbax may still be busy with a write that failed
        self._attempts = 0
        self._thread: threading.Thread | None = None
        self._outcome: str | BaseException | None = None  # the error of the background thread
        self._exchange = Exchange()
        self._hook = WithoutAbandonedWork.install(self)
        found: list[int] = []
        if reason := self._exchange.on_first(lambda: found.extend(saved_steps(self.directory))):
            raise UserError(f"{self.directory} cannot be read: {reason}. Check the permissions.")
        # All processes use the list of process 0: other hosts may see an old, cached directory.
        self._steps: list[int] = json.loads(self._exchange.gather(json.dumps(found))[0])

    @cached_property
    def _handler(self) -> Any:
        # The import takes a second, and a new run needs it only for its first checkpoint.
        import orbax.checkpoint as ocp

        # Weights hardly compress: level 1 saves 7 % of the size for ten times the CPU time.
        return ocp.PyTreeCheckpointHandler(use_compression=False)

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""
        return list(self._steps)

    # -------------------------------------------------------------------------------------- writing

    def save(
        self,
        step: int,
        state: TrainState,
        run: dict[str, Any],
        begun: Callable[[], None] = lambda: None,
    ) -> bool:
        """Copy the state, and write the checkpoint in the background.

        Args:
            run: The run record: JSON values that a resumed run needs besides the state.
            begun: Called after the state is copied and before the checkpoint is committed.

        Returns:
            Whether the checkpoint exists or is being written. False if the disk has too little
            space, or the directory cannot be written.

        Raises:
            UserError: The directory has a checkpoint of another run, or a checkpoint whose name
                is not its step.
        """
        self.wait()
        self._forget_deleted()
        self._refuse_strangers()
        if step in self._steps:  # a signal came right after that save
            return True
        assert step > max(self._steps, default=-1), self._steps
        # Every attempt has its own directory, because a failed one may still be writing.
        self._attempts += 1
        target = self.directory / unfinished(step, f"{self._mark}-{self._attempts}")
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + SPARE_BYTES
        if reason := self._exchange.on_first(lambda: prepare(target, size)):
            self._report(self._not_written(step, reason))
            return False
        import orbax.checkpoint as ocp

        futures, error = [], None
        try:
            arguments = ocp.args.PyTreeSave(state)
            futures = run_coroutine(
                self._handler.async_save(epath.Path(target / STATE), args=arguments)
            )
        except Exception as caught:  # noqa: BLE001 - told to the other processes, which have begun
            error = caught
        else:
            self._begin(begun)
        about = (step, target, run, futures, error)
        self._thread = writing_thread(partial(self._commit, *about), f"checkpoint {step}")
        self._thread.start()
        return True

    def _begin(self, begun: Callable[[], None]) -> None:
        """Call `begun`; if it raises an error, note that Orbax's write is abandoned."""
        earlier, self._has_abandoned_work = self._has_abandoned_work, True
        begun()
        self._has_abandoned_work = earlier

    def _forget_deleted(self) -> None:
        """Update the list of steps if someone has deleted checkpoints from the disk."""
        gone = [step for step in self._steps if not (self.directory / str(step)).is_dir()]
        gone = json.loads(self._exchange.gather(json.dumps(gone))[0])
        self._steps = [step for step in self._steps if step not in gone]
        if gone := [step for step in gone if step not in self._half_removed]:
            self._warn(
                f"{counted(len(gone), 'checkpoint')} of this run, up to step {max(gone):,}, "
                f"{'was' if len(gone) == 1 else 'were'} deleted from {self.directory}; the run "
                "continues, and saves the next checkpoint."
            )

    def _refuse_strangers(self) -> None:
        """Raise an error if a new checkpoint belongs to another run or has a wrong name."""
        if self._owner is None or jax.process_index() or not self.directory.is_dir():
            return
        for step in sorted({*saved_steps(self.directory)} - {*self._steps}):
            place = self.directory / str(step)
            check_checkpoint(place, record_in(place / RECORD), step, self._owner)

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is committed or has failed."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread, outcome = None, self._outcome
        if isinstance(outcome, BaseException):
            self._has_abandoned_work = True
            raise outcome
        self._report(outcome)

    def close(self) -> None:
        """Wait for the current write, and release Orbax's resources."""
        try:
            if not is_left_alone(self._thread):
                self.wait()
        finally:
            if "_handler" in vars(self):  # otherwise it was never needed
                self._handler.close()
            if self._has_abandoned_work or self.saving:
                outlast_abandoned_work()
            else:
                self._hook.remove(self)

    def _not_written(self, step: int, reason: str) -> str:
        newest = f"The newest checkpoint is of step {self._steps[-1]}" if self._steps else ""
        return (
            f"The checkpoint of step {step} could not be written to {self.directory}: {reason}. "
            f"{newest or 'There is no checkpoint yet'}."
        )

    def _report(self, sentence: str | None) -> None:
        if sentence and not self._is_failing:
            self._warn(sentence)
        self._is_failing = sentence is not None
        self._has_abandoned_work |= self._is_failing

    def _commit(self, *about: Any) -> None:
        """Run `_commit_on_all` in the background thread; store its result or error for `wait`."""
        try:
            self._outcome = self._commit_on_all(*about)
        except BaseException as defect:  # noqa: BLE001 - raised by `wait`
            self._outcome = defect

    def _commit_on_all(
        self,
        step: int,
        target: Path,
        run: dict[str, Any],
        futures: list[Any],
        error: Exception | None,
    ) -> str | None:
        """Commit a checkpoint, after every process has written its share of the arrays.

        Returns:
            A sentence about an error of the operating system, the same in every process; None after
            success.
        """
        part = WrittenPart(error=error) if error else write_part(target, futures)
        reason, hashes = merge_parts(part, self._exchange.gather(part.message()), step)
        try:
            reason = reason or self._exchange.on_first(
                lambda: self._finish(step, target, run, hashes)
            )
            if reason:  # another run may have taken the directory
                self._exchange.on_first(self.before_commit)
        except UserError:  # another run has taken the directory
            discard(target)
            raise
        if reason:
            # The next save removes files that Orbax still writes after this removal.
            self._exchange.on_first(lambda: discard(target))
            return self._not_written(step, reason)
        self.written = (*self.written[-1:], *filter(None, [part.written]))
        steps = [*self._steps, step]
        kept = kept_steps(steps, self._keep_last, self._keep_every)
        old = [other for other in steps if other not in kept]
        reason = self._exchange.on_first(lambda: rotate(self.directory, old, self.damaged))
        self._steps, self._half_removed = steps if reason else kept, set(old) if reason else set()
        return reason and (
            f"A checkpoint from before step {step} could not be removed from {self.directory}: "
            f"{reason}."
        )

    def _finish(self, step: int, target: Path, run: dict[str, Any], hashes: dict[str, str]) -> None:
        """Merge the files of all processes, and commit the checkpoint."""
        try:
            self._handler.finalize(epath.Path(target / STATE))
        except Exception as error:
            if (lost := deleted(target)) is None:
                raise
            raise lost from error
        self.before_commit()
        provenance = self.provenance and partial(self.provenance, step)
        give_name(target, self.directory / str(step), run, hashes, provenance)

    # -------------------------------------------------------------------------------------- reading

    def newest(self) -> int | None:
        """The step of the newest intact checkpoint; None if there is no checkpoint.

        All files of each candidate are verified, and none are changed. Newer, damaged checkpoints
        are reported by `warn` and recorded in `damaged`.

        Raises:
            UserError: All checkpoints are damaged.
        """
        for step in reversed(self._steps):
            if (reason := self.damaged.get(step) or self._damage(step)) is None:
                return step
            if step not in self.damaged:
                self.damaged[step] = reason
                if step != self._steps[0]:
                    self._warn(f"{self.directory / str(step)} is damaged and is skipped: {reason}.")
        if not self._steps:
            return None
        each = "; ".join(f"{step}: {reason}" for step, reason in sorted(self.damaged.items()))
        raise UserError(
            f"{self.directory} has no intact checkpoint ({each}), and nothing was changed. Restore "
            "a good copy, or start again in another directory or with --overwrite."
        )

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restore the state and the run record of `step`.

        Args:
            like: Shapes, dtypes and shardings of the state to return.

        Raises:
            UserError: The checkpoint is missing, damaged, or of another model.
        """
        if step not in self._steps:
            own = ", ".join(map(str, self._steps)) or "none"
            raise UserError(
                f"{self.directory} has no checkpoint of step {step}. Saved steps: {own}."
            )
        place = self.directory / str(step)
        if reason := self._damage(step):
            raise UserError(f"{place} is damaged: {reason}. {OTHER}")
        record = self.record(step)
        try:
            return read_state(self._handler, place, like), record
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            # The files are intact, but another version of Orbax may have written them.
            self._has_abandoned_work = True
            reason = refusal(error) or brief(error)
            raise UserError(f"{place} cannot be restored: {reason}. {OTHER}") from error

    def record(self, step: int) -> dict[str, Any]:
        """Read the run record of `step`; only this file is verified.

        Raises:
            UserError: The record is damaged, or belongs to another run or step.
        """
        place = self.directory / str(step)
        record = read_record(place)
        check_checkpoint(place, record, step, self._owner)
        return record

    def delete_after(self, step: int) -> None:
        """Remove the checkpoints after `step`, because the run resumes from `step`.

        Damaged checkpoints are renamed instead.

        Raises:
            UserError: A checkpoint cannot be removed.
        """
        self.wait()
        later = [other for other in self._steps if other > step]
        if reason := self._exchange.on_first(lambda: remove(self.directory, later, self.damaged)):
            raise UserError(
                f"{self.directory}: checkpoints after step {step} cannot be removed: {reason}. "
                "Remove them, and run the same command again."
            )
        self._steps = [other for other in self._steps if other <= step]
        self._verified -= set(later)  # the resumed run will save these steps again
        self.damaged = {other: reason for other, reason in self.damaged.items() if other <= step}

    def _damage(self, step: int) -> str | None:
        """Verify a checkpoint, and return its first fault or None, the same in every process.

        Each process verifies a share of the files.
        """
        if step in self._verified:
            return None
        found = damage(self.directory / str(step), jax.process_index(), jax.process_count())
        reason = next(filter(None, self._exchange.gather(found or "")), None)
        if reason is None:
            self._verified.add(step)
        return reason
