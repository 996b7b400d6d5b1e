"""The identity of a run, which distinguishes its files from the files of other runs.

The identity is random, because two runs may have the same configuration. It is stored in
`run.json`, in every checkpoint, in the lock file, and in the `start` events of metrics.jsonl.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from consyn_jax.errors import UserError
from consyn_jax.files import open_regular, write_whole

RUN_JSON = "run.json"
LARGEST = 1 << 16  # bytes
LARGEST_RECORD = 1 << 26  # bytes of the run record of a checkpoint
SHOWN = 8  # digits of an identity in messages


@dataclass(frozen=True)
class RunRecord:
    """The content of `run.json` in a run directory.

    Attributes:
        run: Random identity of the run, the same each time the run is started or resumed.
        start: Random identity of the newest start of the run.
        unsigned_until: Newest step without an identity in its checkpoint, for a run that an older
            version of this package started; -1 for all other runs.
    """

    run: str
    start: str
    unsigned_until: int = -1

    @classmethod
    def new(cls, unsigned_until: int = -1) -> RunRecord:
        """Create the record of a new run, with random identities."""
        return cls(secrets.token_hex(16), secrets.token_hex(16), unsigned_until)

    def started_again(self) -> RunRecord:
        """Return the record of the same run with a new `start`."""
        return replace(self, start=secrets.token_hex(16))

    def owns(self, run: object, step: int) -> bool:
        """Whether a file belongs to this run.

        Args:
            run: Identity in the file; None if the file has none.
            step: Training step to which the file belongs.
        """
        return run == self.run or (run is None and step <= self.unsigned_until)

    def write(self, directory: Path) -> None:
        """Write run.json to a directory, and flush it to the disk.

        Raises:
            OSError: The file cannot be written.
        """
        write_whole(directory / RUN_JSON, self._content)

    @functools.cached_property
    def _content(self) -> bytes:
        return (json.dumps(asdict(self), indent=1) + "\n").encode()

    def is_in(self, path: str) -> bool:
        """Whether a file is this record, byte for byte, as `write` writes it.

        This is called before each line of the log, so for speed the file is not parsed.

        Raises:
            OSError: The file cannot be read.
        """
        descriptor = open_regular(path, os.O_RDONLY)
        try:
            return os.read(descriptor, LARGEST) == self._content
        finally:
            os.close(descriptor)

    @classmethod
    def read(cls, directory: Path) -> RunRecord | None:
        """Read the run.json of a directory; None if there is none.

        Raises:
            UserError: The file is damaged or cannot be read.
        """
        file = directory / RUN_JSON
        try:
            with open(file, "rb", opener=open_regular) as opened:
                values = json.loads(opened.read(LARGEST))
            return cls.from_json(values)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(
                f"{file} cannot be read: {error.strerror}. Name another --output."
            ) from error
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(
                f"{file} is damaged, so the run that owns these checkpoints is unknown. Restore "
                "the file from a copy, or delete it; the run then takes its identity from its "
                "newest checkpoint."
            ) from error

    @classmethod
    def from_json(cls, values: Any) -> RunRecord:
        """Build the record from the parsed content of run.json.

        Raises:
            TypeError: The content is not a run record.
        """
        record = cls(**values)
        is_valid = (
            isinstance(record.run, str)
            and isinstance(record.start, str)
            and isinstance(record.unsigned_until, int)
        )
        if not is_valid or not record.run:
            raise TypeError("not a run record")
        return record


def short(run: object) -> str:
    """Shorten an identity for messages.

    >>> short("0123456789abcdef"), short(None)
    ('01234567', 'none')
    """
    return str(run)[:SHOWN] if isinstance(run, str) else "none"


def check_owner(place: Path, run: object, step: int, own: RunRecord) -> None:
    """Check that the checkpoint in `place` belongs to the run `own`.

    Args:
        run: Identity in the checkpoint; None if it has none.

    Raises:
        UserError: The checkpoint belongs to another run.
    """
    if not own.owns(run, step):
        raise UserError(
            f"{place} is a checkpoint of another run (with identity {short(run)}; the run in "
            f"{place.parent.parent} has identity {short(own.run)}). Move the checkpoint elsewhere "
            "and run the same command again, or resume from another checkpoint with --resume STEP."
        )


def check_step(place: Path, record: Mapping[str, Any]) -> None:
    """Check that a checkpoint's directory has the name of the step in the run record.

    Raises:
        UserError: The directory was renamed.
    """
    recorded = record.get("step", place.name)
    if str(recorded) != place.name:
        raise UserError(
            f"{place} has the name of step {place.name}, but contains the state of step "
            f"{recorded!s:.20}. Rename the directory to its step."
        )


def check_checkpoint(
    place: Path, record: Mapping[str, Any], step: int, own: RunRecord | None
) -> None:
    """Check that a checkpoint belongs to the run, and that its directory has the name of its step.

    Args:
        record: Run record of the checkpoint.
        own: The run to which the checkpoint must belong; None if any run is accepted.

    Raises:
        UserError: The checkpoint belongs to another run, or has the name of another step.
    """
    if own is not None:
        check_owner(place, record.get("run"), step, own)
    check_step(place, record)


def check_log(path: Path, lines: Iterable[dict[str, Any]], own: RunRecord) -> None:
    """Check that all start events in metrics.jsonl have the identity of the run `own`.

    Raises:
        UserError: A start event belongs to another run.
    """
    for line in lines:
        if line.get("event") in ("start", "resume") and not own.owns(line.get("run"), line["step"]):
            raise UserError(
                f"{path} is the log of another run (with identity {short(line.get('run'))}; the "
                f"run in {path.parent} has identity {short(own.run)}). Restore this run's log, or "
                "delete the file to continue with an empty log."
            )


def record_in(file: Path) -> dict[str, Any]:
    """Read the run record of a checkpoint without verifying its checksum; empty if unreadable."""
    try:
        with open(file, "rb", opener=open_regular) as opened:
            values = json.loads(opened.read(LARGEST_RECORD))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
