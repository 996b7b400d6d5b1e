"""Compare a run, a checkpoint or a model with its records, by computing all hashes again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from consyn_jax.config import RunConfig
from consyn_jax.errors import UserError
from consyn_jax.files import all_irregular, open_regular, read_whole, refuse_strays
from consyn_jax.flags import flags
from consyn_jax.training.checkpointing.checkpoint_files import (
    CHECKSUMS,
    DAMAGED,
    LARGEST_CHECKSUMS,
    PROVENANCE,
    STATE,
    UNFINISHED,
    damage,
    is_hollow,
    step_of,
)
from consyn_jax.training.checkpointing.ownership import (
    RUN_JSON,
    RunRecord,
    check_checkpoint,
    record_in,
)
from consyn_jax.training.logging.metrics import FILE_NAME
from consyn_jax.training.provenance.code_files import code_digests, combined, library_versions
from consyn_jax.training.provenance.data_check import check_data
from consyn_jax.training.provenance.findings import Findings
from consyn_jax.training.provenance.identity_check import check_identity
from consyn_jax.training.provenance.run_facts import LARGEST, digests_of, read_facts
from consyn_jax.training.run.directory import (
    CHECKPOINTS,
    CONFIG,
    ENTRIES,
    PER_START_FLAGS,
    TOKENIZER,
)
from consyn_jax.training.run.model_manifest import (
    MANIFEST,
    added,
    disagreements,
    has_manifest,
    weights_digests,
)

MODELS = ("best", "final")
# Entries of a run that are read, and whose checks report links and pipes themselves.
READ = (CONFIG, PROVENANCE, RUN_JSON, FILE_NAME, TOKENIZER, CHECKPOINTS, *MODELS)
# Facts that all starts of a run share; its stores and files may move between starts.
LASTING: dict[str, tuple[str, ...]] = {
    "run": (),
    "data": ("digest", "validation_digest", "sequences_per_step", "order", "seed", "weights"),
    "tokenizer": ("digest",),
    "initial_weights": (),
}


@dataclass(frozen=True)
class Saved:
    """A kind of saved weights: the checkpoints of a run, or exported models.

    Attributes:
        sums: Name of the file with the checksums of all other files.
        faults: Function that finds files that differ from their checksums.
        added: Function that finds files without a checksum.
        weights: Function that returns the checksum of each weight file, by the file's name.
    """

    sums: str
    faults: Callable[[Path], Iterable[str]]
    added: Callable[[Path], Iterable[str]]
    weights: Callable[[Path], dict[str, str]]


def _state_sums(place: Path) -> dict[str, str]:
    lines = read_whole(place / CHECKSUMS, LARGEST_CHECKSUMS).decode().splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    return {name: digest for name, digest in sums.items() if name.startswith(f"{STATE}/")}


def _damages(place: Path) -> list[str]:
    return list(filter(None, [damage(place)]))  # `damage` also reports files without a checksum


CHECKPOINT = Saved(CHECKSUMS, _damages, lambda place: (), _state_sums)
MODEL = Saved(MANIFEST, disagreements, added, weights_digests)


def verify_directory(place: Path) -> Findings:
    """Compare a run, one of its checkpoints, or an exported model with its records.

    A part that cannot be read becomes one finding, and the other parts are still compared. A link,
    a pipe or a device becomes a finding, too, so it is not read.

    Raises:
        UserError: The directory is neither a run, nor a checkpoint, nor a model.
    """
    found = Findings()
    if any(os.path.lexists(place / name) for name in (CONFIG, CHECKPOINTS)):
        facts = _facts(place, found)
        _check_run(place, facts, found)
    elif os.path.lexists(place / CHECKSUMS):
        facts = _check_checkpoint(place, None, None, found)
    elif has_manifest(place) or os.path.lexists(place / PROVENANCE):
        facts = _check_saved(MODEL, place, None, found)
    else:
        raise UserError(
            f"--verify {place} is neither a run, nor a checkpoint, nor an exported model. Name a "
            "run directory, its best/ or final/, or a directory in its checkpoints/."
        )
    if facts is None:
        found.unchecked.append(
            f"code, data, configuration: not compared, as {place} has no readable {PROVENANCE}"
        )
        return found
    _check_code(facts, found)
    check_data(facts["data"], found)
    initial = facts["initial_weights"]
    with found.checking("initial weights", Path(initial["from"])):
        _check_initial_weights(initial, found)
    return found


def _facts(place: Path, found: Findings) -> dict[str, Any] | None:
    with found.checking("record", place / PROVENANCE):
        return read_facts(place)
    return None


# --------------------------------------------------------------------------------- weights and runs


def _check_run(place: Path, facts: dict[str, Any] | None, found: Findings) -> None:
    owner = check_identity(place, facts, found)
    for name in ENTRIES:
        if name not in READ:
            # Weights & Biases creates links in its directory.
            for path, kind in all_irregular(place / name, inside=name != "wandb"):
                found.differs.append(f"record: {path} is {kind}, so it is not read")
    if facts is not None and found.is_regular("configuration", place / CONFIG):
        with found.checking("configuration", place / CONFIG):
            _check_configuration(place / CONFIG, facts["configuration"], found)
    if facts is not None and found.is_regular("tokenizer", place / TOKENIZER):
        with found.checking("tokenizer", place / TOKENIZER):
            _check_tokenizer(place / TOKENIZER, facts["tokenizer"]["files"], found)
    if found.is_regular("weights", place / CHECKPOINTS):
        with found.checking("weights", place / CHECKPOINTS):
            _check_checkpoints(place / CHECKPOINTS, facts, owner, found)
    if facts is None and not os.path.lexists(place / PROVENANCE):
        records = (f"{CHECKPOINTS}/*/{PROVENANCE}", *(f"{name}/{PROVENANCE}" for name in MODELS))
        if any(next(place.glob(pattern), None) for pattern in records):
            found.differs.append(f"record: {place / PROVENANCE} is missing")
    for name in MODELS:
        if os.path.lexists(place / name) and found.is_regular("weights", place / name):
            _check_saved(MODEL, place / name, facts, found)


def _check_checkpoints(
    place: Path, facts: dict[str, Any] | None, owner: RunRecord | None, found: Findings
) -> None:
    """Check all checkpoints of a run, with their names and identities."""
    entries = sorted(place.iterdir()) if os.path.lexists(place) else []
    if not any(step_of(entry.name) is not None for entry in entries):
        found.unchecked.append(f"weights: {place} has no checkpoint")
    for entry in sorted(entries, key=lambda path: (step_of(path.name) or 0, path.name)):
        step = step_of(entry.name)
        is_left = any(part in entry.name for part in (UNFINISHED, DAMAGED))
        if not found.is_regular("weights", entry) or is_left or entry.name.startswith("."):
            continue
        if step is None or not entry.is_dir():
            found.differs.append(f"weights: {entry} is not a checkpoint of a step")
            continue
        _check_checkpoint(entry, facts, owner, found)


def _check_checkpoint(
    place: Path, facts: dict[str, Any] | None, owner: RunRecord | None, found: Findings
) -> dict[str, Any] | None:
    """Check one checkpoint, with its name and identity, and return its record."""
    before = len(found.differs)
    named = place if step_of(place.name) is not None else place.resolve()
    with found.checking("weights", place):
        step, record = step_of(named.name), record_in(named / RUN_JSON)
        if step is not None and record:
            check_checkpoint(named, record, step, owner)
    return _check_saved(CHECKPOINT, place, facts, found, before)


def _check_tokenizer(place: Path, expected: dict[str, str], found: Findings) -> None:
    stray = dict(all_irregular(place))
    stray |= {f: "a large sparse file" for f in place.rglob("*") if f not in stray and is_hollow(f)}
    found.differs += [f"tokenizer: {path} is {stray[path]}, so it is not read" for path in stray]
    now = digests_of(place, leave_out=stray) if place.exists() else {}
    faults = [
        f"{place / name} {_how(name in expected, name in now)}"
        for name in {*expected, *now}
        if expected.get(name) != now.get(name) and place / name not in stray
    ]
    found.files("tokenizer", faults, len(expected), "file")


def _check_saved(
    kind: Saved,
    place: Path,
    facts: dict[str, Any] | None,
    found: Findings,
    before: int | None = None,
) -> dict[str, Any] | None:
    """Check a checkpoint or a model, and return its record.

    Args:
        facts: Record of the run, for comparison; None if there is none.
        before: Number of differences that were found before the first check of this checkpoint; by
            default, the number at the start of this function.
    """
    own, before = None, len(found.differs) if before is None else before
    with found.checking("weights", place):
        if kind is MODEL and not os.path.lexists(place / MANIFEST):
            if os.path.lexists(place / PROVENANCE):  # the two files were written together
                found.differs.append(f"weights: {place / MANIFEST} is missing")
            else:
                found.unchecked.append(f"weights: {place} has no {MANIFEST}")
            return _facts(place, found)
        found.differs += [f"weights: {place / reason}" for reason in kind.added(place)]
        if reasons := list(kind.faults(place)):
            found.files("weights", (str(place / reason) for reason in reasons), 0, "file")
            is_of_record = any(reason.startswith(PROVENANCE) for reason in reasons)
            return None if is_of_record else _facts(place, found)
        own = _facts(place, found)
        if own is not None:
            _compare_record(place, own, combined(kind.weights(place)), facts, found)
            if len(found.differs) == before:
                found.agrees.append(f"weights: {place}")
        else:
            found.unchecked.append(
                f"weights: {place} agrees with its {kind.sums}, but has no {PROVENANCE}"
            )
    return own


def _compare_record(
    place: Path,
    own: dict[str, Any],
    weights: str,
    facts: dict[str, Any] | None,
    found: Findings,
) -> None:
    """Compare the record of a checkpoint or a model with its weights, and with the run's record."""
    if own.get("weights", {}).get("digest") != weights:
        found.differs.append(f"weights: {place / PROVENANCE} describes other weights")
    if facts is not None:
        # A record of an earlier start need agree only in the facts that all starts share.
        if own["starts"] != facts["starts"]:
            own, facts = _lasting(own), _lasting(facts)
        found.differs += [
            f"record: {place / PROVENANCE} and the run's record differ in {key.replace('_', ' ')}"
            for key in facts
            if own.get(key) != facts[key]
        ]


def _lasting(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a record that is the same for all starts of the run."""
    return {
        key: {name: facts[key].get(name) for name in names} if names else facts.get(key)
        for key, names in LASTING.items()
    }


def _check_initial_weights(recorded: dict[str, Any], found: Findings) -> None:
    origin, digest = Path(recorded["from"]), recorded["digest"]
    if digest is None:
        found.unchecked.append(f"initial weights: from {recorded['from']}, without a recorded hash")
    elif "step" in recorded and (origin / PROVENANCE).is_file():
        own = read_facts(origin) or {}
        is_same = own.get("weights", {}).get("digest") == digest
        _note_initial(is_same, origin, found)
    elif origin.exists():
        refuse_strays(origin, ("*.safetensors",))
        hashes = [_sha256(file) for file in sorted(origin.glob("*.safetensors"))]
        now = hashlib.sha256(" ".join(hashes).encode()).hexdigest()
        _note_initial(now == digest, origin, found)
    else:
        found.unchecked.append(f"initial weights: {recorded['from']} cannot be read here")


def _note_initial(is_same: bool, origin: Path, found: Findings) -> None:
    if is_same:
        found.agrees.append(f"initial weights: {origin}")
    else:
        found.differs.append(f"initial weights: {origin} differs from the recorded weights")


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# --------------------------------------------------------------------------- configuration and code


def _check_configuration(file: Path, recorded: dict[str, Any], found: Findings) -> None:
    with open(file, "rb", opener=open_regular) as opened:
        content = opened.read(LARGEST)
    if hashlib.sha256(content).hexdigest() == recorded["digest"]:
        found.agrees.append(f"configuration: {file}")
        return
    try:
        now = yaml.safe_load(content.decode("utf-8", "replace"))
    except (yaml.YAMLError, ValueError, RecursionError):
        now = None
    if not isinstance(now, dict):
        found.differs.append(f"configuration: {file} is damaged")
        return
    values, known = recorded["values"], flags(RunConfig)
    lasting = [name for name in values if name not in PER_START_FLAGS and name in known]
    changed = [name for name in lasting if now.get(name) != values[name]]
    found.differs += [
        f"configuration: {file} has {name} {now.get(name)!r:.60}, but the run had "
        f"{values[name]!r:.60}"
        for name in changed
    ]
    if not changed:
        found.differs.append(
            f"configuration: {file} has the same flags as the run, but its text has changed"
        )


def _check_code(facts: dict[str, Any], found: Findings) -> None:
    then, now = facts["code"]["files"], code_digests()
    faults = [
        f"consyn_jax/{name} {_how(name in then, name in now)}"
        for name in {*then, *now}
        if then.get(name) != now.get(name)
    ]
    found.files("code", faults, len(now), "file")
    start = facts["starts"][-1] if facts["starts"] else {}
    versions = library_versions()
    found.differs += [
        f"library: {name} is {versions.get(name, 'missing')}, and was {version}"
        for name, version in start.get("versions", {}).items()
        if versions.get(name) != version
    ]
    earlier = {known["code"] for known in facts["starts"] if known["code"]}
    if len(earlier) > 1:
        found.unchecked.append(f"code: {len(earlier) - 1} earlier versions that the run used")


def _how(was_there: bool, is_there: bool) -> str:
    if was_there and is_there:
        return "has changed"
    return "is missing" if was_there else "is new"
