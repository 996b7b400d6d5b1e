"""The identity of a run, which distinguishes its files from those of another run.

It is random, so that two runs of the same configuration differ. It is in `run.json`, in every
checkpoint, in the lock and in the `start` events of metrics.jsonl.
"""

from __future__ import annotations

import json
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
    """The content of a run directory's `run.json`.

    Attributes:
        run: the identity, the same for all starts of a run.
        start: random identity of the newest start of the command.
        unsigned_until: for a run that an older version began, its newest step when it got its
            identity; checkpoints up to this step carry no identity. -1 for all other runs.
    """

    run: str
    start: str
    unsigned_until: int = -1

    @classmethod
    def new(cls, unsigned_until: int = -1) -> RunRecord:
        """A new identity."""
        return cls(secrets.token_hex(16), secrets.token_hex(16), unsigned_until)

    def started_again(self) -> RunRecord:
        """The same run, started once more."""
        return replace(self, start=secrets.token_hex(16))

    def owns(self, run: object, step: int) -> bool:
        """Whether a file of `step` with this identity, which may be None, belongs to the run."""
        return run == self.run or (run is None and step <= self.unsigned_until)

    def write(self, directory: Path) -> None:
        """Write run.json, flushed to the disk.

        Raises:
            OSError: the file cannot be written.
        """
        write_whole(directory / RUN_JSON, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, directory: Path) -> RunRecord | None:
        """Read the run.json of a directory; None if there is none.

        Raises:
            UserError: it is damaged or cannot be read.
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
                f"{file} is damaged, so the owner of these checkpoints is unknown. Put a copy "
                "back, or delete the file: the run then has the identity in its newest checkpoint."
            ) from error

    @classmethod
    def from_json(cls, values: Any) -> RunRecord:
        """Rebuild the record from the JSON of `dataclasses.asdict`.

        Raises:
            TypeError: the content is not a record.
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
    """An identity as messages show it.

    >>> short("0123456789abcdef"), short(None)
    ('01234567', 'none')
    """
    return str(run)[:SHOWN] if isinstance(run, str) else "none"


def check_owner(place: Path, run: object, step: int, own: RunRecord) -> None:
    """Check that the checkpoint in `place` belongs to this run.

    Args:
        run: the identity in it; None if it has none.

    Raises:
        UserError: it belongs to another run.
    """
    if not own.owns(run, step):
        raise UserError(
            f"{place} is a checkpoint of another run (its identity is {short(run)}, and that of "
            f"the run in {place.parent.parent} is {short(own.run)}). Move it elsewhere and run the "
            "same command again, or resume from another one with --resume STEP."
        )


def check_step(place: Path, record: Mapping[str, Any]) -> None:
    """Check that a checkpoint has the name of the step in its run record.

    Raises:
        UserError: it was renamed.
    """
    recorded = record.get("step", place.name)
    if str(recorded) != place.name:
        raise UserError(
            f"{place} has the name of step {place.name} and holds the state of step "
            f"{recorded!s:.20}. Give the directory the name of its step again."
        )


def check_checkpoint(
    place: Path, record: Mapping[str, Any], step: int, own: RunRecord | None
) -> None:
    """Check that a checkpoint is of this run, and of the step of its name.

    Args:
        record: its run record.
        own: the run that it must belong to; None accepts any run.

    Raises:
        UserError: it is of another run, or of another step.
    """
    if own is not None:
        check_owner(place, record.get("run"), step, own)
    check_step(place, record)


def check_log(path: Path, lines: Iterable[dict[str, Any]], own: RunRecord) -> None:
    """Check that the starts in metrics.jsonl are those of this run.

    Raises:
        UserError: one belongs to another run.
    """
    for line in lines:
        if line.get("event") in ("start", "resume") and not own.owns(line.get("run"), line["step"]):
            raise UserError(
                f"{path} is the log of another run (its identity is {short(line.get('run'))}, and "
                f"that of the run in {path.parent} is {short(own.run)}). Put this run's log back, "
                "or delete the file to continue with an empty log."
            )


def record_in(file: Path) -> dict[str, Any]:
    """The run record of a checkpoint, without a look at its checksum; empty if unreadable."""
    try:
        with open(file, "rb", opener=open_regular) as opened:
            values = json.loads(opened.read(LARGEST_RECORD))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
