"""Compare a run or a model with its records by recomputing every digest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from consyn_jax.config import RunConfig
from consyn_jax.errors import UserError
from consyn_jax.files import refuse_strays
from consyn_jax.flags import flags
from consyn_jax.training.checkpointing.checkpoint_files import (
    CHECKSUMS,
    PROVENANCE,
    STATE,
    damage,
    saved_steps,
)
from consyn_jax.training.provenance.code_files import code_digests, combined, library_versions
from consyn_jax.training.provenance.data_check import check_data
from consyn_jax.training.provenance.findings import Findings
from consyn_jax.training.provenance.run_facts import digests_of, read_facts
from consyn_jax.training.run.directory import CHECKPOINTS, CONFIG, PER_START_FLAGS, TOKENIZER
from consyn_jax.training.run.model_manifest import (
    MANIFEST,
    disagreement,
    has_manifest,
    weights_digests,
)

MODELS = ("best", "final")
# Patterns of the files that are read. A link among them that leads out is refused.
READ = ("*", "best/*", "final/*", f"{TOKENIZER}/*", f"{CHECKPOINTS}/**/*")
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
        sums: name of the file with the checksums of all others.
        fault: find the first disagreement of a directory with that file.
        weights: read the checksums of the files of weights, by name.
    """

    sums: str
    fault: Callable[[Path], str | None]
    weights: Callable[[Path], dict[str, str]]


def _state_sums(place: Path) -> dict[str, str]:
    lines = (place / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    return {name: digest for name, digest in sums.items() if name.startswith(f"{STATE}/")}


CHECKPOINT = Saved(CHECKSUMS, damage, _state_sums)
MODEL = Saved(MANIFEST, disagreement, weights_digests)


def verify_directory(place: Path) -> Findings:
    """Compare a run, or an exported model, with its records.

    A part that cannot be read becomes one line, and the other parts are still compared.

    Raises:
        UserError: the directory is neither, or has a link that leads out of it.
    """
    found = Findings()
    for pattern in READ:
        try:
            refuse_strays(place, (pattern,))
        except OSError as error:
            found.unreadable("record", place, error)
    if (place / CONFIG).exists() or (place / CHECKPOINTS).exists():
        facts = _facts(place, found)
        _check_run(place, facts, found)
    elif has_manifest(place) or (place / PROVENANCE).exists():
        facts = _check_saved(MODEL, place, None, found)
    else:
        raise UserError(
            f"--verify {place} is neither a run nor a model that a run has exported. Name a run "
            "directory, or its best/ or final/."
        )
    if facts is None:
        found.unchecked.append(
            f"code, data, configuration: {place} has no {PROVENANCE} that can be read"
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
    if facts is not None:
        with found.checking("configuration", place / CONFIG):
            _check_configuration(place / CONFIG, facts["configuration"], found)
        with found.checking("tokenizer", place / TOKENIZER):
            _check_tokenizer(place / TOKENIZER, facts["tokenizer"]["files"], found)
    saved: list[tuple[Saved, Path]] = []
    with found.checking("weights", place / CHECKPOINTS):
        steps = saved_steps(place / CHECKPOINTS)
        saved = [(CHECKPOINT, place / CHECKPOINTS / str(step)) for step in steps]
    saved += [(MODEL, place / name) for name in MODELS if (place / name).exists()]
    for kind, directory in saved:
        _check_saved(kind, directory, facts, found)


def _check_tokenizer(place: Path, expected: dict[str, str], found: Findings) -> None:
    now = digests_of(place) if place.exists() else {}
    faults = [
        f"{place / name} {_how(name in expected, name in now)}"
        for name in {*expected, *now}
        if expected.get(name) != now.get(name)
    ]
    found.files("tokenizer", faults, len(expected), "file")


def _check_saved(
    kind: Saved, place: Path, facts: dict[str, Any] | None, found: Findings
) -> dict[str, Any] | None:
    """Check a checkpoint or a model, and return its record.

    Args:
        facts: the record of the run, which it is compared with.
    """
    own = None
    with found.checking("weights", place):
        if kind is MODEL and not has_manifest(place):
            found.unchecked.append(f"weights: {place} has no {MANIFEST}")
            return _facts(place, found)
        if reason := kind.fault(place):
            found.differs.append(f"weights: {place / reason}")
            return None if reason.startswith(PROVENANCE) else _facts(place, found)
        own = _facts(place, found)
        if own is not None:
            _compare_record(place, own, combined(kind.weights(place)), facts, found)
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
    """Compare the record in a checkpoint or a model with its weights and with the run's record."""
    before = len(found.differs)
    if own.get("weights", {}).get("digest") != weights:
        found.differs.append(f"weights: {place / PROVENANCE} is about other weights")
    if facts is not None:
        # A record of an earlier start agrees only in the facts that all starts share.
        if own["starts"] != facts["starts"]:
            own, facts = _lasting(own), _lasting(facts)
        found.differs += [
            f"record: {place / PROVENANCE} and that of the run differ in {key.replace('_', ' ')}"
            for key in facts
            if own.get(key) != facts[key]
        ]
    if len(found.differs) == before:
        found.agrees.append(f"weights: {place}")


def _lasting(facts: dict[str, Any]) -> dict[str, Any]:
    """The part of a record that all starts of the run share."""
    return {
        key: {name: facts[key].get(name) for name in names} if names else facts.get(key)
        for key, names in LASTING.items()
    }


def _check_initial_weights(recorded: dict[str, Any], found: Findings) -> None:
    origin, digest = Path(recorded["from"]), recorded["digest"]
    if digest is None:
        found.unchecked.append(f"initial weights: they follow from {recorded['from']} and the code")
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
        found.unchecked.append(f"initial weights: {recorded['from']}: not there any more")


def _note_initial(is_same: bool, origin: Path, found: Findings) -> None:
    if is_same:
        found.agrees.append(f"initial weights: {origin}")
    else:
        found.differs.append(f"initial weights: those in {origin} are not those of the run")


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# --------------------------------------------------------------------------- configuration and code


def _check_configuration(file: Path, recorded: dict[str, Any], found: Findings) -> None:
    content = file.read_bytes()
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
        f"configuration: {file} has {name} {now.get(name)!r:.60}, and the run had "
        f"{values[name]!r:.60}"
        for name in changed
    ]
    if not changed:
        found.differs.append(
            f"configuration: {file} has the run's values for all flags, but is another text"
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
        found.unchecked.append(f"code: that of the {len(earlier) - 1} earlier versions of the run")


def _how(was_there: bool, is_there: bool) -> str:
    if was_there and is_there:
        return "is not what it was"
    return "is missing" if was_there else "is new"
