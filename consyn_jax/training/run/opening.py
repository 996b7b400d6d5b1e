"""Check the run directory before the data is read, and check it again under the lock."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from consyn_jax.config import RunConfig
from consyn_jax.distributed.process_group import ProcessGroup, current_process_group
from consyn_jax.errors import UserError, leave_out_overwrite
from consyn_jax.files import make_directory, restore_replaced
from consyn_jax.integers import natural
from consyn_jax.training.checkpointing.checkpoint_files import misnamed, saved_steps
from consyn_jax.training.checkpointing.ownership import RUN_JSON, RunRecord, record_in
from consyn_jax.training.run.directory import (
    CHECKPOINTS,
    CONFIG,
    ENTRIES,
    TRIAL_RECORD,
    RunDirectory,
    delete_run,
    found_study,
    refuse_links,
    run_path,
)
from consyn_jax.training.run.identity import (
    check_schedule,
    differences,
    read_run_config,
    recorded_schedule,
)
from consyn_jax.training.run.lock import RunLock, read_holder

SHARED_S = 20.0  # longest time until other hosts see a new file


def open_run_directory(
    config: RunConfig,
    derived: dict[str, Any],
    *,
    write: bool = True,
    fetch: Callable[[Path], None] = lambda path: None,
    is_trial: bool = False,
) -> RunDirectory:
    """Open the run directory of `config`, and create it if necessary.

    In a run of several processes, all of them wait until process 0 has locked the directory.

    Args:
        derived, is_trial: The same as for `check_output`.
        write: Whether this process may create and delete files.
        fetch: Called with the path of the locked directory; it may copy a run into the directory.

    Raises:
        UserError: The directory has another run, is in use, is not writable, or is not shared.
    """
    path, process_group = run_path(config), current_process_group()
    if process_group is not None and not write:
        return _opened_by_first(config, process_group)
    holds_run = check_output(config, derived, is_trial=is_trial)
    if not write:
        return RunDirectory(path, holds_run, RunRecord.read(path) or RunRecord.new())
    lock = None
    try:
        make_directory(path)
        lock = RunLock(path)
        restore_replaced(path, ENTRIES)
        fetch(path)
        holds_run = check_output(config, derived, is_trial=is_trial)  # the result may have changed
        if config.saving.overwrite:
            _overwrite(path)
        is_adopted = holds_run and not (path / RUN_JSON).exists()
        record = _record(path, holds_run)
        lock.sign(record.run)
    except (OSError, UserError) as error:
        if lock is not None:
            lock.release()
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"--output {path} cannot be used: {error.strerror}. Name a writable directory."
        ) from error
    if process_group is not None:
        process_group.gather(json.dumps([holds_run, lock.holder, dataclasses.asdict(record)]))
    place = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    return RunDirectory(path, holds_run, record, lock, is_adopted, place=place)


def _overwrite(path: Path) -> None:
    delete_run(path)
    leave_out_overwrite()


def _record(path: Path, holds_run: bool) -> RunRecord:
    """Return the identity of the run that starts, or is resumed, in a directory."""
    if not holds_run:
        return RunRecord.new()
    if (found := RunRecord.read(path)) is not None:
        return found.started_again()
    newest = max(_saved_steps(path), default=0)
    run = record_in(path / CHECKPOINTS / str(newest) / RUN_JSON).get("run")
    new = RunRecord.new(newest)
    return dataclasses.replace(new, run=run, unsigned_until=-1) if isinstance(run, str) else new


def _opened_by_first(config: RunConfig, process_group: ProcessGroup) -> RunDirectory:
    """Wait until this process sees the lock of process 0, and return the run directory."""
    path = run_path(config)
    holds_run, holder, record = json.loads(process_group.gather("")[0])
    if config.saving.overwrite:
        leave_out_overwrite()
    deadline = time.monotonic() + SHARED_S
    while read_holder(path) != holder:
        if time.monotonic() > deadline:
            raise UserError(
                f"--output {path} is not the same directory here as in process 0. Name a directory "
                "on a file system that all hosts share."
            )
        time.sleep(0.2)
    return RunDirectory(path, holds_run, RunRecord.from_json(record))


def check_output(
    config: RunConfig, derived: dict[str, Any] | None = None, *, is_trial: bool = False
) -> bool:
    """Check that this run may use --output; return whether it resumes a run in that directory.

    Args:
        derived: Values that follow from flags and data, see `identity.DERIVED_NAMES`. If it is
            None, because the data is not known yet, only flags are compared.
        is_trial: Whether the run is a trial of a study. Only such a run may resume a trial.

    Raises:
        UserError: The directory has another run, or cannot be written.
    """
    saving, path = config.saving, run_path(config)
    check_writable(path)
    _refuse_study(path, is_trial)
    if not saving.overwrite:  # --overwrite deletes links and does not follow them
        refuse_links(path)
    if config.optimizer.decay_from is not None:
        refuse_links(Path(saving.output))
        _check_decay_origin(config, derived)
    old = read_run_config(path / CONFIG) if (path / CONFIG).is_file() else None
    if old is None:
        _refuse_remains(path)
    if saving.overwrite:
        _check_overwrite(config, path)
        return False
    steps, requested = _saved_steps(path), natural(saving.resume)
    if requested is not None and requested not in steps:
        raise UserError(f"--resume {requested}: {_no_checkpoint(path, steps)}")
    # An existing run without a checkpoint or model has nothing to lose, so a different run may
    # replace it.
    if old is None or not (steps or (path / "best").exists() or (path / "final").exists()):
        return False
    if saving.resume == "never":
        raise UserError(
            f"--output {path} already holds a run. Name another directory, continue the run with "
            "--resume auto, or delete the run with --overwrite."
        )
    if changes := differences(old, config, derived):
        raise UserError(
            f"--output {path} holds another run: {'; '.join(changes)}. Name another directory, use "
            "the old values, or delete that run with --overwrite."
        )
    if derived is not None and steps:
        check_schedule(old, config, derived, steps[-1] if requested is None else requested)
    return True


def _refuse_study(path: Path, is_trial: bool) -> None:
    if (study := found_study(path)) is not None:
        raise UserError(
            f"--output {path} contains {study}, but a run needs its own directory. Name another "
            "--output."
        )
    if not is_trial and (path / TRIAL_RECORD).exists():  # the study reads the trial's log
        raise UserError(
            f"--output {path} has a trial of a study, which only consyn-tune continues. Name "
            "another --output."
        )


def _refuse_remains(path: Path) -> None:
    has_log = (path / "metrics.jsonl").exists()
    if has_log or _saved_steps(path):
        found = "a metrics.jsonl" if has_log else CHECKPOINTS
        raise UserError(
            f"--output {path} holds {found} without a {CONFIG}, so it is not a consyn-train run. "
            "Name another directory."
        )


def check_writable(path: Path) -> None:
    """Check that --output can be created and written, without creating anything.

    Raises:
        UserError: The path is a file or inside a file, may not be written, or has a name that this
            locale cannot encode.
    """
    _check_name(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"--output {path} is a file. Name a directory.")
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise UserError(
            f"--output {path} cannot be made: {there} is a file. Name another directory."
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(
            f"--output {path} cannot be written: no permission for {there}. Name another directory."
        )


def _check_name(path: Path) -> None:
    """Refuse a name that this locale cannot encode, because JAX and Orbax cannot use it."""
    try:
        os.fsencode(path).decode("utf-8")
        str(path).encode("utf-8")
    except UnicodeError as error:
        shown = str(path).encode("utf-8", "backslashreplace").decode()
        raise UserError(
            f"--output {shown} has characters that this locale cannot write "
            f"({sys.getfilesystemencoding()}). Set PYTHONUTF8=1, or name another directory."
        ) from error


def _check_decay_origin(config: RunConfig, derived: dict[str, Any] | None) -> None:
    """Check that the run in --output can be decayed from the step in --decay_from.

    That run must have the same flags as this run, a checkpoint at the step, and its peak learning
    rate at the step.
    """
    path, step = Path(config.saving.output), config.optimizer.decay_from
    assert step is not None
    if not (path / CONFIG).is_file():
        raise UserError(
            f"--decay_from {step} continues a run, but --output {path} has none. Repeat the flags "
            "of the run to decay, including its --output."
        )
    old, steps = read_run_config(path / CONFIG), _saved_steps(path)
    if step not in steps:
        raise UserError(f"--decay_from {step}: {_no_checkpoint(path, steps)}")
    undecayed = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, decay_from=None)
    )
    if changes := differences(old, undecayed, derived):
        raise UserError(
            f"--decay_from {step}: --output {path} has another run: {'; '.join(changes)}. Repeat "
            "the flags with which that run was started."
        )
    schedule, total = recorded_schedule(old)
    peak = max(float(schedule(s)) for s in range(0, total, max(1, total // 1000)))
    if float(schedule(step)) < 0.999 * peak:
        raise UserError(
            f"--decay_from {step}: at this step the learning rate of the run in {path} is not at "
            f"its peak of {peak:g}. Choose another step with a checkpoint: {steps}."
        )


def _check_overwrite(config: RunConfig, path: Path) -> None:
    """Check that --overwrite does not delete an input of the new run."""
    model, data = config.model, config.data
    inputs: dict[str, tuple[str | None, ...]] = {
        "checkpoint": (model.checkpoint,),
        "model": (model.model,),
        "data": data.data,
        "validation": data.validation,
        "tokenizer": (data.tokenizer,),
    }
    doomed = [(path / entry).resolve() for entry in ENTRIES]
    for flag, values in inputs.items():
        for value in values:
            if value is not None and any(
                Path(value).resolve().is_relative_to(entry) for entry in doomed
            ):
                raise UserError(
                    f"--overwrite would delete --{flag} {value}, which is in --output {path}. Name "
                    "another directory for the new run."
                )


def _saved_steps(path: Path) -> list[int]:
    try:
        if (other := misnamed(path / CHECKPOINTS)) is not None:
            raise UserError(
                f"{other} is not a valid name for a checkpoint: the name must be a step of at most "
                "15 digits, without leading zeros. Rename the directory, or move it elsewhere."
            )
        return saved_steps(path / CHECKPOINTS)
    except OSError as error:
        raise UserError(
            f"{path / CHECKPOINTS} cannot be read: {error.strerror}. Name another --output."
        ) from error


def _no_checkpoint(path: Path, steps: list[int]) -> str:
    known = ", ".join(map(str, steps)) or "none"
    return f"{path / CHECKPOINTS} has no checkpoint of that step. Saved steps: {known}."
