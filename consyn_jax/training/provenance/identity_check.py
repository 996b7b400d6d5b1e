"""Compare the identities of a run in run.json, in provenance.json and in the log."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from consyn_jax.training.checkpointing.checkpoint_files import (
    PROVENANCE,
    is_hollow,
    saved_steps,
)
from consyn_jax.training.checkpointing.ownership import (
    RUN_JSON,
    RunRecord,
    check_log,
    record_in,
    short,
)
from consyn_jax.training.logging.metrics import FILE_NAME, read_metrics
from consyn_jax.training.provenance.findings import Findings
from consyn_jax.training.run.directory import CHECKPOINTS


def check_identity(place: Path, facts: dict[str, Any] | None, found: Findings) -> RunRecord | None:
    """Compare the identities in run.json, in provenance.json and in the log's start events.

    Args:
        facts: Record of the run; None if it is missing or cannot be read.

    Returns:
        The identity that checkpoints must have: from provenance.json if that file exists, otherwise
        from run.json; None if unknown.
    """
    before, owner = len(found.differs), _owner(place, facts, found)
    if owner is None:
        found.unchecked.append(f"identity: {place} has no {RUN_JSON} that can be read")
        return None
    with found.checking("identity", place / FILE_NAME):
        _check_log(place, owner, found)
    if len(found.differs) == before:
        found.agrees.append(f"identity: {place / RUN_JSON}")
    return owner


def _check_log(place: Path, owner: RunRecord, found: Findings) -> None:
    """Check the start events in the log, and whether the log reaches the newest checkpoint."""
    log = place / FILE_NAME
    newest = _newest(place / CHECKPOINTS)
    if not os.path.lexists(log):
        kind = found.differs if newest else found.unchecked
        kind.append(f"identity: {log} does not exist")
        return
    if log.is_file() and is_hollow(log):
        found.differs.append(f"identity: {log} is a large sparse file, so it is not read")
        return
    lines = read_metrics(log)
    check_log(log, lines, owner)
    if owner.unsigned_until < 0 and not any(line.get("event") == "start" for line in lines):
        found.differs.append(f"identity: {log} has no start event of the run")
    ends = max((line["step"] for line in lines), default=0)
    if ends < newest:
        found.differs.append(
            f"identity: {log} ends at step {ends:,}, but the newest checkpoint is of step "
            f"{newest:,}"
        )


def _newest(checkpoints: Path) -> int:
    """Return the largest step in the run.json of any checkpoint; 0 if there is none.

    The steps in directory names are not used, because a directory can be renamed.
    """
    if checkpoints.is_symlink() or not checkpoints.is_dir():
        return 0
    places = (checkpoints / str(step) for step in saved_steps(checkpoints))
    records = (record_in(place / RUN_JSON) for place in places if not place.is_symlink())
    steps = (record.get("step") for record in records)
    return max((step for step in steps if isinstance(step, int)), default=0)


def _owner(place: Path, facts: dict[str, Any] | None, found: Findings) -> RunRecord | None:
    record = None
    file = place / RUN_JSON
    with found.checking("identity", file):
        record = RunRecord.read(place)
    if facts is None:
        return record
    run, start = facts["run"], facts["starts"][-1] if facts["starts"] else {}
    if record is None:
        if not os.path.lexists(file):
            found.differs.append(f"identity: {file} is missing")
        return RunRecord(run, "")
    if record.run != run:
        found.differs.append(
            f"identity: {file} is of run {short(record.run)}, but {PROVENANCE} is of run "
            f"{short(run)}"
        )
    else:
        found.differs += [
            f"identity: {file} has another {name} than {PROVENANCE}"
            for name, value in start.get("identity", {}).items()
            if getattr(record, name, None) != value
        ]
    return replace(record, run=run)
