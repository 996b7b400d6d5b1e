"""Checkpoints of the whole training state: asynchronous, atomic, verified, rotated, restored onto whatever mesh the run has now.

Orbax writes and reads the arrays. What makes a directory of its files a checkpoint is here; docs/design/checkpoints.md has the reasons.
"""

from __future__ import annotations

import errno
import itertools
import json
import shutil
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from etils import epath  # type: ignore[import-untyped]

from consyn_jax.config import UserError
from consyn_jax.training.checkpoint_files import CHECKSUMS, damage, digest, files, flush, saved_steps
from consyn_jax.training.orbax_writes import lower_priority, refusal, run_coroutine, without_abandoned_work, write_at_low_priority
from consyn_jax.training.step import TrainState

RECORD, STATE = "run.json", "state"  # what a checkpoint consists of, beside its checksums
UNFINISHED = ".orbax-checkpoint-tmp"  # behind the step, and before the number of the attempt: being written, or being removed
DAMAGED = ".damaged"  # behind the step: set aside
SPARE_BYTES = 1 << 20  # of a checkpoint, beside its arrays
AGREE_MS = 6 * 3600 * 1000  # the slowest write that other processes wait for; of one that died, JAX tells them


class Checkpoints:
    """The checkpoints of one run, as `directory/STEP/`. Every process of the run calls every method, in the same order.

    What the operating system refuses while a checkpoint is written (no space, no permission, a broken disk) does not end the run: `warn` is
    told in a sentence, once until one succeeds again, and `steps` does not have it. Any other error of the background thread is raised by
    the next `save`, `wait` or `close`.

    Args:
        keep_last: how many of the newest stay.
        keep_every: checkpoints whose step is a multiple of it stay, too.
        warn: is told, in the thread that calls a method, of checkpoints that could not be written or are damaged.

    Raises:
        UserError: the directory cannot be read.
    """

    def __init__(self, directory: Path, keep_last: int = 3, keep_every: int | None = None, warn: Callable[[str], None] = warnings.warn) -> None:
        self.directory = directory.absolute()
        self.damaged: dict[int, str] = {}
        """By step, what is wrong with those that `newest` passed over, until `delete_after` sets them aside."""
        self._keep_last, self._keep_every, self._warn = keep_last, keep_every, warn
        self._whole: set[int] = set()  # of the steps there are, those whose files have been verified
        self._failing = self._abandoned = False  # the last save failed; what Orbax had begun may still be under way
        self._attempts = 0
        self._thread: threading.Thread | None = None
        self._outcome: str | BaseException | None = None  # of the thread: what went wrong
        self._agreements = _Agreements()
        self._unraisable, sys.unraisablehook = sys.unraisablehook, without_abandoned_work(sys.unraisablehook)
        found: list[int] = []
        if reason := self._first(lambda: found.extend(saved_steps(self.directory))):
            raise UserError(f"{self.directory} cannot be read: {reason}.")
        self._steps: list[int] = json.loads(self._agreements.all(json.dumps(found))[0])  # one view, whatever file systems cache

    @cached_property
    def _handler(self) -> Any:
        import orbax.checkpoint as ocp  # a second, of which a new run has no need before its first checkpoint

        # Random numbers hardly compress: level 1 takes ten times the processor time for 7 % of the size.
        return ocp.PyTreeCheckpointHandler(use_compression=False)

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, ascending; without one that is still being written."""
        return list(self._steps)

    # ------------------------------------------------------------------------------------------------------------------ writing

    def save(self, step: int, state: TrainState, run: dict[str, Any]) -> bool:
        """Begin to save; returns once the state is copied and writing goes on in the background.

        Args:
            run: what else the run needs to go on, as JSON: tokens trained, selection, tracker ids.

        Returns:
            Whether it was begun, or is there. Not when there is too little space, or the directory cannot be written.
        """
        self.wait()
        if step in self._steps:  # a signal came behind it
            return True
        assert step > max(self._steps, default=-1), f"there is a checkpoint of step {self._steps[-1]}"
        # Of an attempt that failed, writes may still be under way, so each has a place of its own.
        self._attempts += 1
        target, size = self.directory / f"{step}{UNFINISHED}-{self._attempts}", sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        if reason := self._first(lambda: _prepare(target, size + SPARE_BYTES)):
            self._complain(self._not_written(step, reason))
            return False
        import orbax.checkpoint as ocp

        futures, error = [], None
        try:
            futures = run_coroutine(self._handler.async_save(epath.Path(target / STATE), args=ocp.args.PyTreeSave(state)))
        except Exception as caught:  # noqa: BLE001 - told to the other processes, which have begun
            error = caught
        self._thread = threading.Thread(target=self._commit, args=(step, target, run, futures, error), name=f"checkpoint {step}")
        self._thread.start()
        return True

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Return when the checkpoint that was begun is on disk, or has failed."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread, outcome = None, self._outcome
        if isinstance(outcome, BaseException):
            raise outcome
        self._complain(outcome)

    def close(self) -> None:
        """Wait, and let go of what Orbax holds."""
        try:
            self.wait()
        finally:
            if "_handler" in vars(self):  # else it was never needed
                self._handler.close()
            if not self._abandoned:
                sys.unraisablehook = self._unraisable

    def _not_written(self, step: int, reason: str) -> str:
        newest = f"The newest is that of step {self._steps[-1]}" if self._steps else "There is none yet"
        return f"The checkpoint of step {step} could not be written to {self.directory}: {reason}. {newest}."

    def _complain(self, sentence: str | None) -> None:
        if sentence and not self._failing:
            self._warn(sentence)
        self._failing = sentence is not None
        self._abandoned |= self._failing

    def _commit(self, *about: Any) -> None:
        """The background thread: wait for the arrays, and make a checkpoint of them once every process has written its own."""
        try:
            self._outcome = self._commit_everywhere(*about)
        except BaseException as defect:  # noqa: BLE001 - raised by `wait`
            self._outcome = defect

    def _commit_everywhere(self, step: int, target: Path, run: dict[str, Any], futures: list[Any], error: Exception | None) -> str | None:
        """What went wrong, in every process the same; None for nothing."""
        own = f"{STATE}/ocdbt.process_{jax.process_index()}/"
        digests: dict[str, str] = {}
        try:
            write_at_low_priority(futures)
            if error is None:
                names = [name for name in files(target) if name.startswith(own)]
                with ThreadPoolExecutor(1, CHECKSUMS, lower_priority) as reader:  # it hardly ever holds the interpreter's lock
                    digests = dict(zip(names, reader.map(lambda name: digest(target / name, flush=True), names), strict=True))
        except Exception as caught:  # noqa: BLE001 - told to the other processes, which wait for this one
            error = caught
        said = [json.loads(text) for text in self._agreements.all(json.dumps([refusal(error), error and repr(error), digests]))]
        if defects := [f"process {number}: {text}" for number, (refused, text, _) in enumerate(said) if text and not refused]:
            raise error if error and not refusal(error) else RuntimeError(f"the checkpoint of step {step} failed in {'; '.join(defects)}")
        written = {name: digest for *_, part in said for name, digest in part.items()}
        reason = next((refused for refused, *_ in said if refused), None) or self._first(lambda: self._finish(step, target, run, written))
        if reason:
            self._first(lambda: shutil.rmtree(target, ignore_errors=True))  # what comes after, the next save removes
            return self._not_written(step, reason)
        steps = [*self._steps, step]
        kept = _kept(steps, self._keep_last, self._keep_every)

        def rotate() -> None:
            flush(self.directory)  # the new name is on the disk before an old one goes
            self._remove([old for old in steps if old not in kept])

        reason = self._first(rotate)
        self._steps = steps if reason else kept
        return reason and f"An older checkpoint than that of step {step} could not be removed from {self.directory}: {reason}."

    def _finish(self, step: int, target: Path, run: dict[str, Any], written: dict[str, str]) -> None:
        """Merge what the processes wrote, and give it the checkpoint's name: from then on it is one."""
        self._handler.finalize(epath.Path(target / STATE))
        (target / RECORD).write_text(json.dumps(run))
        digests = {name: written.get(name) or digest(target / name, flush=True) for name in files(target)}
        (target / CHECKSUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()), encoding="utf-8")
        digest(target / CHECKSUMS, flush=True)
        for directory in [*(path for path in target.rglob("*") if path.is_dir()), target]:
            flush(directory)
        target.rename(self.directory / str(step))

    # ------------------------------------------------------------------------------------------------------------------ reading

    def newest(self) -> int | None:
        """The step of the newest checkpoint that is whole, or None when there is no checkpoint. Reads its files; changes nothing.

        Each damaged one that is newer is named to `warn` and in `damaged`.

        Raises:
            UserError: all are damaged.
        """
        for step in reversed(self._steps):
            if (reason := self.damaged.get(step) or self._damage(step)) is None:
                return step
            if step not in self.damaged:
                self.damaged[step] = reason
                if step != self._steps[0]:
                    self._warn(f"{self.directory / str(step)} is damaged and passed over: {reason}.")
        if not self._steps:
            return None
        each = "; ".join(f"{step}: {reason}" for step, reason in sorted(self.damaged.items()))
        raise UserError(
            f"{self.directory} has no checkpoint that is whole ({each}). Nothing was changed. "
            f"Bring a good copy back, or begin anew in another directory or with --overwrite."
        )

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """State and run record of `step`.

        Args:
            like: shapes, dtypes and shardings that the state shall have.

        Raises:
            UserError: no such checkpoint, damaged, or of another model.
        """
        if step not in self._steps:
            known = ", ".join(map(str, self._steps)) or "none"
            raise UserError(f"{self.directory} has no checkpoint of step {step}; there are: {known}.")
        place = self.directory / str(step)
        if reason := self._damage(step):
            raise UserError(f"{place} is damaged: {reason}. Go on from another one with --resume STEP.")
        import orbax.checkpoint as ocp

        state = epath.Path(place / STATE)
        try:
            _check_model(place, self._handler.metadata(state).tree, like)
            arguments = ocp.args.PyTreeRestore(item=like, restore_args=ocp.checkpoint_utils.construct_restore_args(like))
            return self._handler.restore(state, args=arguments), self.record(step)
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            # Its files are as they were written. But whoever wrote them may have been another version of Orbax, or a stranger.
            self._abandoned = True
            reason = refusal(error) or " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(f"{place} cannot be restored: {reason}.") from error

    def record(self, step: int) -> dict[str, Any]:
        """The run record of `step` without its state, verified by itself.

        Raises:
            UserError: it is damaged.
        """
        place = self.directory / str(step)
        if reason := damage(place, only=RECORD):
            raise UserError(f"{place} is damaged: {reason}. Go on from another one with --resume STEP.")
        try:
            record = json.loads((place / RECORD).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{place / RECORD} cannot be read: {type(error).__name__}. Go on from another one with --resume STEP.") from error
        if not isinstance(record, dict):
            raise UserError(f"{place / RECORD} is no record of a run. Go on from another one with --resume STEP.")
        return record

    def delete_after(self, step: int) -> None:
        """Remove the checkpoints later than `step`: a run that goes on from an earlier one takes another way. Damaged ones are set aside.

        Raises:
            UserError: they cannot be removed.
        """
        self.wait()
        later = [other for other in self._steps if other > step]
        if reason := self._first(lambda: self._remove(later)):
            raise UserError(f"{self.directory}: checkpoints later than step {step} cannot be removed: {reason}.")
        self._steps = [other for other in self._steps if other <= step]
        self._whole -= set(later)  # there will be others of these steps
        self.damaged = {other: reason for other, reason in self.damaged.items() if other <= step}

    def _damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint, in every process the same. Each verifies a part of the files."""
        if step in self._whole:
            return None
        found = damage(self.directory / str(step), jax.process_index(), jax.process_count())
        reason = next(filter(None, self._agreements.all(found or "")), None)
        if reason is None:
            self._whole.add(step)
        return reason

    # ------------------------------------------------------------------------------------------------------------ the directory

    def _remove(self, steps: list[int]) -> None:
        """Take checkpoints away: damaged ones get another name. A kill in between leaves no half of one under a step's name."""
        for step in steps:
            place = self.directory / str(step)
            if step in self.damaged:
                number = next(n for n in itertools.count(1) if not place.with_name(f"{step}{DAMAGED}-{n}").exists())
                place.rename(place.with_name(f"{step}{DAMAGED}-{number}"))
            elif place.exists():
                shutil.rmtree(place.rename(place.with_name(f"{step}{UNFINISHED}")))

    def _first(self, work: Callable[[], None]) -> str | None:
        """Do `work` in the first process; what the operating system refused there, if anything, in every process."""
        reason = None
        if jax.process_index() == 0:
            try:
                work()
            except Exception as error:
                reason = refusal(error)
                if reason is None:
                    raise
        return self._agreements.all(reason or "")[0] or None


class _Agreements:
    """What the processes of a run tell each other, through the service that started them: no device takes part, so any thread may ask."""

    def __init__(self) -> None:
        self._prefix, self._count = f"consyn_jax/checkpoints/{next(_OBJECTS)}", 0

    def all(self, own: str) -> list[str]:
        """What every process says, by process. All must ask, equally often."""
        if jax.process_count() == 1:
            return [own]
        import orbax.checkpoint as ocp

        client, me = ocp.multihost.get_jax_distributed_client(), jax.process_index()
        client.key_value_set(f"{self._prefix}/{self._count}/{me}", own)
        said = [client.blocking_key_value_get(f"{self._prefix}/{self._count}/{number}", AGREE_MS) for number in range(jax.process_count())]
        if self._count:  # every process has said this one, so every process has read the one before
            client.key_value_delete(f"{self._prefix}/{self._count - 1}/{me}")
        self._count += 1
        return said


_OBJECTS = itertools.count()


def _kept(steps: list[int], last: int, every: int | None) -> list[int]:
    """Of ascending steps, those that stay."""
    return [step for step in steps if step in steps[-last:] or (every and step % every == 0)]


def _prepare(target: Path, size: int) -> None:
    """An empty directory to write to, on a disk with room for `size` bytes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f"*{UNFINISHED}*"):  # by a save or a removal that was cut off
        shutil.rmtree(left, ignore_errors=True)
    free = shutil.disk_usage(target.parent).free
    if free < size:
        raise OSError(errno.ENOSPC, f"it needs {size / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free")
    (target / STATE).mkdir(parents=True)


def _check_model(place: Path, there: Any, like: TrainState) -> None:
    """Raise UserError where the arrays of a checkpoint are not those of `like`."""
    import orbax.checkpoint as ocp

    old, new = (
        {name: f"{leaf.dtype} {list(leaf.shape)}" for name, leaf in ocp.tree.to_flat_dict(tree, sep="/").items()}
        for tree in (ocp.tree.serialize_tree(state, keep_empty_nodes=True) for state in (there, like))
    )
    names = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
    if names:
        first = "; ".join(f"{name} is {old.get(name, 'nothing')} there and {new.get(name, 'nothing')} here" for name in names[:3])
        raise UserError(f"{place} is of another model: {first}{' and so on' if names[3:] else ''}.")
