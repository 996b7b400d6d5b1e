"""`consyn-train --verify`: compare a run or a model with its records."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from consyn_jax.cli.proof.documents_page import write_out
from consyn_jax.config import RunConfig
from consyn_jax.errors import Differs, counted, in_line


def verify(config: RunConfig) -> None:
    """Compare a run or a model with its records, and print a line for each part of a record.

    The line says that the part differs, was not checked, or agrees.

    Raises:
        UserError: `--verify` names neither a run nor a model.
        Differs: a part of the record differs.
    """
    from consyn_jax.training.provenance.verification import verify_directory

    assert config.proof.verify is not None
    place = Path(config.proof.verify)
    found = verify_directory(place)
    parts = asdict(found)
    words = {"differs": "differs", "unchecked": "not checked", "agrees": "agrees"}
    if config.proof.json:
        write_out([json.dumps(parts, ensure_ascii=False)])
    else:
        write_out(f"{words[part]:<12} {in_line(line)}" for part in words for line in parts[part])
    if found.differs:
        raise Differs(
            f"{place} differs from its records in {counted(len(found.differs), 'place')}."
        )
