"""The identity of a study, recorded in its directory, its storage and all its trial directories.

An interrupted trial continues from its directory, and the result of a finished trial is read from
its directory. The identity prevents a study from using the trial directories of another study.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from consyn_jax.errors import UserError, listed, parse_fault
from consyn_jax.files import make_directory, read_whole, write_whole
from consyn_jax.training.run.directory import STUDY_RECORD, TRIAL_RECORD
from consyn_jax.tuning.study_directory import JOURNAL, STUDY, TRIALS_DIRECTORY

LARGEST = 1 << 20  # bytes
ANEW = "Name another --output, or delete that study with --overwrite."


@dataclass(frozen=True)
class StudyRecord:
    """The file `STUDY_RECORD` in the directory of a study.

    Attributes:
        study: identity of the study.
        storage: `public_url` of its database; "" for the journal.
    """

    study: str
    storage: str


def check_study(output: Path, storage: str | None) -> None:
    """Check, before any slow work, that a directory contains no files of another study.

    Raises:
        UserError: the study uses another storage, or a trial belongs to another study.
    """
    found = trial_directories(output)  # listed first: other processes write the record first
    record, given = _record(output), public_url(storage)
    if record is not None and record.storage != given:
        raise UserError(
            f"--output {output} has a study in {_place(output, record.storage)}, but the storage "
            f"given is {_place(output, given)}. Use the same --storage as before, or name another "
            "--output."
        )
    _check_identities(output, found, None if record is None else record.study)


def identify(output: Path, storage: str | None, stored: str | None, has_trials: bool) -> str:
    """Return the identity of the study in a directory; write it if the study is new.

    Only one process at a time may call this.

    Args:
        stored: identity in the storage; None if there is none.
        has_trials: whether the storage has trials of this study.

    Raises:
        UserError: the storage and the directory have different studies.
        OSError: the directory cannot be written.
    """
    check_study(output, storage)
    known = _record(output)
    record = known or StudyRecord(secrets.token_hex(8), public_url(storage))
    is_other = stored is not None and (known is None or stored != known.study)
    where = _place(output, record.storage)
    if is_other or (stored is None and has_trials):
        raise UserError(f"{where} has a study that was not begun in --output {output}. {ANEW}")
    if stored is None and (found := trial_directories(output)):
        raise UserError(
            f"--output {output} has {listed(found)} of a study that is no longer in {where}. {ANEW}"
        )
    write_whole(output / STUDY_RECORD, json.dumps(asdict(record)) + "\n")
    return record.study


def trial_directories(output: Path) -> list[Path]:
    """The non-empty trial directories, in the order of the trials' numbers."""
    place = output / TRIALS_DIRECTORY
    names = [p for p in place.iterdir() if re.fullmatch(r"\d+", p.name)] if place.is_dir() else []
    found = [path for path in names if path.is_dir() and _is_used(path)]
    return sorted(found, key=lambda path: int(path.name))


def check_values(found: Sequence[Path], values: Sequence[Mapping[str, Any]]) -> None:
    """Check that each trial directory records the same values as the storage.

    Args:
        found: trial directories, listed before `values` were read.
        values: values of each trial in the storage.

    Raises:
        UserError: the values differ, or a trial is not in the storage.
    """
    for path in found:
        number = int(path.name)
        if number >= len(values):
            raise UserError(f"{path} belongs to a trial that the study does not have. {ANEW}")
        _compare(path, values[number])


def mark_trial(path: Path, study: str, values: Mapping[str, Any]) -> None:
    """Record the study and the values of a trial in its directory.

    If the directory has a record already, check that it is the same.

    Raises:
        UserError: the directory records another study or other values, or cannot be written.
    """
    try:
        if not (path / TRIAL_RECORD).exists() and not (path.is_dir() and _is_used(path)):
            make_directory(path)
            write_whole(path / TRIAL_RECORD, json.dumps({"study": study, "values": values}) + "\n")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}. Free some space, or name another "
            "--output."
        ) from error
    _check_identities(path.parent.parent, [path], study)
    _compare(path, values)


def _check_identities(output: Path, found: Sequence[Path], study: str | None) -> None:
    others = [path for path in found if _read(path / TRIAL_RECORD).get("study", "") != study]
    if others:
        raise UserError(
            f"--output {output} has trials of another study: {listed(others)}. Name another "
            "--output, or delete them with --overwrite."
        )


def _compare(path: Path, values: Mapping[str, Any]) -> None:
    old, new = _read(path / TRIAL_RECORD).get("values"), json.loads(json.dumps(dict(values)))
    if old != new:
        raise UserError(
            f"{path} has a trial with {_told(old)}, but trial {path.name} of the study has "
            f"{_told(new)}. {ANEW}"
        )


def _told(values: Any) -> str:
    if not isinstance(values, dict):
        return "unknown values"
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _is_used(directory: Path) -> bool:
    # A kill may leave a temporary file, whose name begins with a dot.
    return any(not path.name.startswith(".") for path in directory.iterdir())


def _record(output: Path) -> StudyRecord | None:
    file = output / STUDY_RECORD
    found = _read(file)
    if not found:
        return None
    study, storage = found.get("study"), found.get("storage")
    if not isinstance(study, str) or not isinstance(storage, str):
        raise UserError(f"{file} is damaged: it does not name a study and a storage. {ANEW}")
    return StudyRecord(study, public_url(storage))  # an earlier version wrote the query


def _read(file: Path) -> dict[str, Any]:
    """Read the record of a study or of a trial; return {} if there is none."""
    try:
        found = json.loads(read_whole(file, LARGEST))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UserError(f"{file} cannot be used: {error.strerror}. {ANEW}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} {parse_fault(error)}. {ANEW}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} is damaged: it is not a JSON object. {ANEW}")
    return found


def public_url(storage: str | None) -> str:
    """Remove user, password and query from a storage's URL, for files and messages; "" for None.

    If there is an @ after the first question mark, only the scheme is kept, because it is unclear
    which part is secret.

    >>> public_url("postgresql://me:a/b@db/studies?password=x"), public_url("sqlite:///a@b.db")
    ('postgresql://db/studies', 'sqlite:///a@b.db')
    """
    scheme, slashes, rest = (storage or "").partition("//")
    rest, _, query = rest.partition("?")
    if not rest.startswith("/"):  # otherwise it is a path, without a user
        rest = "" if "@" in query else rest.rpartition("@")[2]
    return scheme.partition("?")[0] + slashes + rest


def _place(output: Path, storage: str) -> str:
    return storage or str(output / STUDY / JOURNAL)
