"""`provenance.json`: hashes of all inputs of a run, a checkpoint or a model.

The file is written to the run directory at every start, and to every checkpoint and model, whose
checksums include it. It is not a signature: anyone who can write to the directory can forge it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from consyn_jax.errors import UserError, parse_fault
from consyn_jax.files import open_regular
from consyn_jax.training.checkpointing.checkpoint_files import PROVENANCE, is_hollow
from consyn_jax.training.provenance.code_files import (
    code_digests,
    combined,
    commit,
    library_versions,
)

FORMAT = 1
LARGEST = 1 << 26  # maximum size of a provenance.json, in bytes
TEXT_OR_NONE, WHOLE_OR_NONE = (str, type(None)), (int, type(None))
_SOURCE = {
    "item": str,
    "length": int,
    "bos_id": WHOLE_OR_NONE,
    "pad_id": int,
    "packing": str,
    "on_long": TEXT_OR_NONE,
    "split?": str,
    "stores?": [{"directory": str, "fingerprint": str, "sources_sha256": TEXT_OR_NONE}],
    "files?": [{"path": str, "sha256": str, "tokens": [int]}],
    "vocab_size?": int,
    "eos_id?": int,
}
# Types of the values that are read from provenance.json.
SHAPE = {
    "run": str,
    "code": {"digest": str, "files": dict},
    "data": {
        "digest": TEXT_OR_NONE,
        "order": str,
        "sequences_per_step": int,
        "seed?": int,
        "weights?": (list, type(None)),
        "sources?": [_SOURCE],
    },
    "tokenizer": {"digest": TEXT_OR_NONE, "files": dict},
    "initial_weights": {"from": str, "digest": TEXT_OR_NONE},
    "configuration": {"digest": str, "total_steps": int, "values": dict},
    "starts": [
        {"step": int, "code": TEXT_OR_NONE, "versions?": dict, "mesh?": dict, "identity?": dict}
    ],
    "weights?": {"digest": TEXT_OR_NONE},
}
FLAGS_OF_COMPILERS = (
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "JAX_ENABLE_X64",
    "JAX_DEFAULT_MATMUL_PRECISION",
)


@dataclass(frozen=True)
class RunFacts:
    """The facts about a run that are known when it starts.

    Attributes:
        facts: Content of provenance.json, without the step and the hashes of the weights.
    """

    facts: dict[str, Any] = field(default_factory=dict)

    def text(self, **about: Any) -> str:
        """Compose the content of provenance.json.

        Args:
            about: Further values: the step, and the hashes of the weights.
        """
        return json.dumps({"format": FORMAT, **about, **self.facts}, indent=1) + "\n"

    def made_with(self) -> list[tuple[str, str]]:
        """Make two rows (name, value): software versions and commit at the run's latest start."""
        return made_with(self.facts)

    def of_checkpoint(self, step: int, files: Mapping[str, str]) -> str:
        """Compose the provenance.json of a checkpoint.

        Args:
            files: Name of each file of the state -> XXH3-128 hash.
        """
        weights = {"digest": combined(dict(files)), "of": "the XXH3-128 of each file of state/"}
        return self.text(step=step, weights=weights)

    def of_model(self, step: int, files: Mapping[str, str]) -> str:
        """Compose the provenance.json of a model.

        Args:
            files: Name of each file of weights -> SHA-256.
        """
        return self.text(step=step, weights={"digest": combined(dict(files)), "files": dict(files)})


def record_code() -> dict[str, Any]:
    """Describe the running code: its version, its commit if known, and the hash of each file."""
    digests = code_digests()
    versions = library_versions()
    return {
        "version": versions["consyn_jax"],
        "commit": commit(),
        "digest": combined(digests),
        "files": digests,
    }


def record_start(step: int, code: str, mesh: Mapping[str, int], devices: Sequence[Any]) -> Any:
    """Describe one start of a run: its first step, code and devices.

    Args:
        code: Hash of the code.
        devices: All devices of the run.
    """
    first = devices[0]
    return {
        "step": step,
        "code": code,
        "versions": library_versions(),
        "platform": first.platform,
        "device_kind": first.device_kind,
        "platform_version": str(getattr(first.client, "platform_version", "")),
        "num_devices": len(devices),
        "num_processes": len({device.process_index for device in devices}),
        "mesh": dict(mesh),
        "compiler_flags": {
            name: os.environ[name] for name in FLAGS_OF_COMPILERS if name in os.environ
        },
    }


def made_with(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Make two rows (name, value): software versions and commit at a run's latest start."""
    versions = facts["starts"][-1].get("versions") or {} if facts["starts"] else {}
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [("versions", said), ("commit", str(facts["code"].get("commit") or "unknown"))]


def digests_of(directory: Path, leave_out: Collection[Path] = ()) -> dict[str, str]:
    """Return the SHA-256 of each file in a directory, by relative path.

    Hidden files are left out. So are large sparse files, which no run writes.
    """
    found = {}
    for file in sorted(directory.rglob("*")):
        is_left_out = file.name.startswith(".") or file in leave_out
        if not is_left_out and file.is_file() and not is_hollow(file):
            with open(file, "rb", opener=open_regular) as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            found[file.relative_to(directory).as_posix()] = digest
    return found


def read_facts(directory: Path) -> dict[str, Any] | None:
    """Read the provenance.json of a run, a checkpoint or a model; None if there is none.

    Raises:
        UserError: The file is damaged or cannot be read.
    """
    place = directory / PROVENANCE
    try:
        with open(place, "rb", opener=open_regular) as opened:
            facts = json.loads(opened.read(LARGEST))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(
            f"{place} cannot be read: {error.strerror}. Check its permissions."
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{place} is damaged: it {parse_fault(error)}. Restore it from a copy."
        ) from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise UserError(f"{place} has a format that this version does not know. Restore a copy.")
    if fault := _fault(facts, SHAPE, ""):
        raise UserError(f"{place} is damaged: {fault}. Restore it from a copy.")
    return facts


def _fault(value: Any, shape: Any, name: str) -> str:
    """Describe where a JSON value differs from the expected shape; "" if it does not.

    Args:
        shape: A type; a tuple of types; a dictionary from keys to shapes, where "?" marks an
            optional key; or a list with the shape of all items.
    """
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{name} is not an object"
        for key, inner in shape.items():
            plain = key.removesuffix("?")
            if plain not in value and plain != key:
                continue
            if fault := _fault(value.get(plain), inner, f"{name}.{plain}".lstrip(".")):
                return fault
        return ""
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{name} is not a list"
        faults = (_fault(item, shape[0], f"{name}[{i}]") for i, item in enumerate(value))
        return next(filter(None, faults), "")
    return "" if isinstance(value, shape) else f"{name} is {value!r:.40}"
