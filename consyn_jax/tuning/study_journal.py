"""Open and check a study's journal, the file of Optuna's trials; the file may be untrusted."""

from __future__ import annotations

import json
import math
import os
import stat
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from consyn_jax.errors import UserError, brief
from consyn_jax.files import all_irregular, open_regular, read_whole, remove
from consyn_jax.tuning.search_space import Dimension
from consyn_jax.tuning.study_directory import JOURNAL, STUDY, TRIALS_DIRECTORY
from consyn_jax.tuning.study_results import OUTCOME, OUTCOMES, STEP, STEPS

LOCK = JOURNAL + ".lock"  # Optuna's lock file, a link to the journal
LEFT_S = 1.0  # a lock that is not a link to the journal counts as left over after this time
REPLACE = "Replace it with a good copy, or delete the study with --overwrite."


def refuse_links(output: Path) -> None:
    """Refuse a study directory with links (except Optuna's lock) or special files.

    Raises:
        UserError: there is a link, a pipe or a device; the message names it.
    """
    for name in (STUDY, TRIALS_DIRECTORY):
        for path, kind in all_irregular(output / name):
            if not path.name.startswith(LOCK):
                raise UserError(
                    f"{path} is {kind}, but a study must contain only files and directories. "
                    "Remove it, or give another --output."
                )


def open_journal(optuna: Any, directory: Path) -> Any:
    """Open Optuna's storage in a journal file.

    Raises:
        UserError: the file is not a journal, or cannot be used.
    """
    path = directory / JOURNAL
    # An absolute path, because Optuna's lock is a symbolic link to this path.
    file = str(directory.resolve() / JOURNAL)
    journal = optuna.storages.journal
    try:
        _remove_left_lock(directory / LOCK, file)
        lock = journal.JournalFileSymlinkLock(file)
        cut_torn_line(path, lock)
        return optuna.storages.JournalStorage(journal.JournalFileBackend(file, lock_obj=lock))
    except OSError as error:
        raise UserError(
            f"{path} cannot be used: {error.strerror or error}. Name another --output."
        ) from error
    except Exception as error:  # Optuna checks no line that it reads
        raise UserError(f"{path} is damaged ({brief(error)}). {REPLACE}") from error


def _remove_left_lock(lock: Path, file: str) -> None:
    """Remove a leftover lock file: a lock that is not a link to the journal.

    Optuna would wait forever for such a lock. It is left if a process is killed and the directory
    is then moved. A lock that disappears within `LEFT_S` seconds is not removed: it may belong to a
    process that uses another path to the directory.
    """
    before = None
    for seconds in (LEFT_S, 0.0):
        with suppress(OSError):
            found = lock.lstat()
            if stat.S_ISLNK(found.st_mode) and str(lock.readlink()) == file:
                return
            if before is not None and os.path.samestat(before, found):
                remove(lock)
                return
            before = found
            time.sleep(seconds)


def cut_torn_line(file: Path, lock: Any) -> None:
    """Cut off an incomplete last line of a journal; a full disk leaves such a line.

    Optuna ignores an incomplete last line, but refuses the journal once another line follows it.

    Args:
        lock: Optuna's lock, which a process holds while it writes a line.

    Raises:
        OSError: the file cannot be read, is a link, or has more bytes than a journal can have.
        ValueError, RecursionError: the last line is complete but not JSON.
    """
    if not os.path.lexists(file):
        return
    lock.acquire()
    try:
        content = read_whole(file)
        end = content.rfind(b"\n") + 1
        descriptor = open_regular(file, os.O_RDWR)  # refuses links, which lead to another file
        try:
            if end < len(content):
                os.ftruncate(descriptor, end)
        finally:
            os.close(descriptor)
        if end:
            json.loads(content[: end - 1].rpartition(b"\n")[2])
    finally:
        lock.release()


def check_trials(trials: Sequence[Any], space: Sequence[Dimension], place: str) -> None:
    """Check trials that were read from a storage, because Optuna accepts any values.

    Args:
        trials: Optuna's trial objects.
        place: name of the storage, for the message.

    Raises:
        UserError: a trial has values that a study never writes.
    """
    by_name = {dimension.name: dimension for dimension in space}
    for trial in trials:
        if fault := _fault(trial, by_name):
            raise UserError(f"{place} is damaged: trial {trial.number} has {fault}. {REPLACE}")


def _fault(trial: Any, space: Mapping[str, Dimension]) -> str:
    attrs, curve = trial.user_attrs, trial.intermediate_values
    values = [] if trial.values is None else trial.values
    checks = {
        "parameters of another search": all(
            name in space and _is_of(value, space[name]) for name, value in trial.params.items()
        ),
        "parameters that no sampler drew": "fixed_params" not in trial.system_attrs,
        "no value, or several": len(values) == 1 or (not values and trial.state.name != "COMPLETE"),
        "a value that is not a number": all(map(_is_number, [*values, *curve.values()])),
        "evaluations without a number": all(type(key) is int and key >= 0 for key in curve),
        f"no number as its {STEP} or {STEPS}": all(
            type(attrs.get(name, 0)) is int and attrs.get(name, 0) >= 0 for name in (STEP, STEPS)
        ),
        "an unknown outcome": attrs.get(OUTCOME, OUTCOMES[0]) in OUTCOMES,
    }
    return next((fault for fault, is_right in checks.items() if not is_right), "")


def _is_of(value: Any, dimension: Dimension) -> bool:
    if dimension.choices:
        return any(json.dumps(value) == json.dumps(choice) for choice in dimension.choices)
    return _is_number(value) and bool(dimension.low <= value <= dimension.high)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
