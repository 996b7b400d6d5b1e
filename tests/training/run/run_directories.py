"""Run directories for the tests of this folder."""

from pathlib import Path
from typing import Any

from consyn_jax.config import RunConfig
from consyn_jax.resolve import resolve
from consyn_jax.training.run.opening import open_run_directory

DERIVED = {
    "data": "abc",
    "validation": None,
    "tokenizer": "def",
    "sequences_per_step": 8,
    "total_steps": 100,
    "vocab_size": 259,
}


def run(output: Path, **flags: Any) -> tuple[RunConfig, dict[str, str]]:
    return resolve({"model": "haiku", "output": str(output), **flags})


def holds_run(config: RunConfig, derived: dict[str, Any] = DERIVED, *, write: bool = True) -> bool:
    """Open the directory of `config` and let it go."""
    directory = open_run_directory(config, derived, write=write)
    directory.close()
    return directory.holds_run


def begin(output: Path, **flags: Any) -> None:
    """A run that has saved step 3."""
    config, origins = run(output, **flags)
    directory = open_run_directory(config, DERIVED)
    directory.write_config(config, origins, DERIVED)
    (directory.checkpoints / "3").mkdir(parents=True)
    directory.close()
