"""Gather the facts that are recorded when a run starts or resumes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from consyn_jax.config import RunConfig
from consyn_jax.data.loader import Order
from consyn_jax.errors import UserError
from consyn_jax.flags import flat
from consyn_jax.training.checkpointing.checkpoint_files import STATE
from consyn_jax.training.provenance.data_record import record_order
from consyn_jax.training.provenance.run_facts import (
    RunFacts,
    digests_of,
    read_facts,
    record_code,
    record_start,
)
from consyn_jax.training.run.directory import CHECKPOINTS, TOKENIZER, RunDirectory

NO_RECORD = "a version that kept no record"


def begin_facts(
    directory: RunDirectory,
    run: RunConfig,
    derived: dict[str, Any],
    order: Order | None,
    mesh: dict[str, int],
    devices: Sequence[Any],
    step: int,
) -> RunFacts:
    """Gather the provenance of a run, once its config.yaml and its tokenizer are written.

    Args:
        order: Order of the training sequences; None if the data cannot be read by position.
        devices: All devices of the run.
        step: Step from which the run starts or resumes.

    Raises:
        UserError: A token store, or the record of an earlier start, cannot be read.
    """
    code = record_code()
    tokenizer = directory.path / TOKENIZER
    start = record_start(step, code["digest"], mesh, devices)
    own = directory.record
    start["identity"] = {"start": own.start, "unsigned_until": own.unsigned_until}
    initial_weights, starts = _history(directory.path, run, derived, step)
    facts = {
        "run": directory.record.run,
        "code": code,
        "data": {
            "digest": derived["data"],
            "validation_digest": derived["validation"],
            "sequences_per_step": derived["sequences_per_step"],
            **record_order(order),
        },
        "tokenizer": {
            "digest": derived["tokenizer"],
            "files": digests_of(tokenizer) if tokenizer.is_dir() else {},
        },
        "initial_weights": initial_weights,
        "configuration": {
            "digest": directory.config_digest,
            "total_steps": derived["total_steps"],
            "values": {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in flat(run).items()
            },
        },
        "starts": [*starts, start],
    }
    return RunFacts(facts)


def _initial_weights(run: RunConfig, derived: dict[str, Any]) -> dict[str, Any]:
    """Describe the weights before the run's first step."""
    step = run.optimizer.decay_from
    if step is not None:
        origin = Path(run.saving.output).resolve() / CHECKPOINTS / str(step)
        found = read_facts(origin) or {}
        weights = found.get("weights", {"digest": None})
        return {"from": str(origin), "run": found.get("run"), "step": step, **weights}
    if derived.get("weights") is None:
        return {"from": f"seed {run.budget.seed}", "digest": None}
    source = run.model.checkpoint or "a model in Python"
    if Path(source).is_dir():  # the record may be read from another working directory
        source = str(Path(source).resolve())
    return {"from": source, "digest": derived["weights"]}


def _history(
    path: Path, run: RunConfig, derived: dict[str, Any], step: int
) -> tuple[dict[str, Any], list[Any]]:
    """Return the records of the initial weights and of each start or resumption before `step`.

    A resumed run copies the record of the weights, because the files of the weights may have moved.
    """
    branches = run.optimizer.decay_from == step
    place = (Path(run.saving.output) if branches else path) / CHECKPOINTS / str(step)
    if not (place / STATE).is_dir():
        return _initial_weights(run, derived), []
    try:
        found = read_facts(place)
    except UserError:  # the file is damaged, which the restore of the checkpoint reports
        found = None
    if found is None:
        return _initial_weights(run, derived), [{"step": 0, "code": None, "by": NO_RECORD}]
    return _initial_weights(run, derived) if branches else found["initial_weights"], found["starts"]
