"""One run, one directory: may this run use it, does it go on, and what does it say of itself."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from consyn_jax.config import RunConfig, UserError, flags, flat

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
ENTRIES = (CONFIG, "metrics.jsonl", "tokenizer", CHECKPOINTS, "best", "final", "logs", "profile", "report.html", "loss.png", "wandb")
DERIVED = "derived"  # in config.yaml: what follows from the flags and the data; two runs that differ there are different runs

DOCUMENT_END = "...\n"  # what YAML puts behind a lone scalar

DERIVED_NAMES = {
    "data": "the training data",
    "validation": "the validation data",
    "tokenizer": "the tokenizer",
    "sequences_per_step": "batch_size x gradient_accumulation_steps",
    "total_steps": "the number of steps",
    "vocab_size": "the vocabulary",
}


@dataclass(frozen=True)
class RunDirectory:
    """A directory that this run may write to.

    Attributes:
        holds_run: a run of the same mathematics is in it, begun earlier.
    """

    path: Path
    holds_run: bool

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.path / CHECKPOINTS

    def write_config(self, config: RunConfig, origins: dict[str, str], derived: dict[str, Any]) -> None:
        """Write config.yaml: every value with its origin; `consyn-train --config` reads it back."""
        (self.path / CONFIG).write_text(describe(config, origins) + yaml.safe_dump({DERIVED: derived}, sort_keys=True), encoding="utf-8")


def open_run_directory(config: RunConfig, derived: dict[str, Any], *, write: bool = True) -> RunDirectory:
    """The run directory of `config`, made if need be.

    Args:
        derived: what the flags and the data come to, see `DERIVED_NAMES`.
        write: this process may create and delete.

    Raises:
        UserError: it holds another run, or cannot be written.
    """
    path = Path(config.saving.output)
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"--output {path} is a file. Name a directory.")
        if config.saving.overwrite and write:
            _delete_run(path)
        if write:
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {path} cannot be used: {error.strerror}.") from error
    holds_run = (path / CONFIG).is_file()
    if not holds_run and (path / "metrics.jsonl").exists():
        raise UserError(f"--output {path} holds a metrics.jsonl without a {CONFIG}, so it is not a run of ours. Name another directory.")
    if holds_run:
        if config.saving.resume == "never":
            raise UserError(f"--output {path} already holds a run. Name another directory, go on with --resume auto, or delete it with --overwrite.")
        differences = compare(path / CONFIG, config, derived)
        if differences:
            raise UserError(
                f"--output {path} holds another run: {'; '.join(differences)}. "
                f"Name another directory, take the old values back, or delete that run with --overwrite."
            )
    elif config.saving.resume.isdigit():
        raise UserError(f"--resume {config.saving.resume}: {path} holds no run to go on from.")
    return RunDirectory(path, holds_run)


def compare(file: Path, config: RunConfig, derived: dict[str, Any]) -> list[str]:
    """What differs, in words, between the run that `file` describes and this one; only what changes the mathematics counts."""
    try:
        old = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}), so nobody can say what run this is. Name another --output.") from error
    if not isinstance(old, dict) or not isinstance(old.get(DERIVED), dict):
        raise UserError(f"{file} is not the configuration of a run. Name another --output.")
    new = flat(config)
    differences = [
        f"{'' if name == 'derived' else '--'}{name} was {old.get(name)} and is {new[name]}"
        for name, f in flags().items()
        if f.math and name in old and old[name] != new[name]
    ]
    for key, words in DERIVED_NAMES.items():
        before, now = old[DERIVED].get(key), derived.get(key)
        if before != now and not (key == "total_steps" and differences):
            short = isinstance(now, str) or isinstance(before, str)
            differences.append(f"{words} changed" if short else f"{words} was {before} and is {now}")
    return differences


def describe(config: RunConfig, origins: dict[str, str]) -> str:
    """The resolved run as YAML, grouped, each line with the origin of its value."""
    lines: list[str] = []
    group = ""
    for name, f in flags().items():
        if f.group != group:
            lines += ([""] if lines else []) + [f"# {f.group}"]
            group = f.group
        value = getattr(getattr(config, f.group), name)
        shown = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True, allow_unicode=True, width=10**6)
        text = f"{name}: {shown.removesuffix(DOCUMENT_END).rstrip()}"
        lines.append(f"{text:<40} # {origins[name]}")
    return "\n".join(lines) + "\n\n"


def read_config_file(path: Path) -> dict[str, Any]:
    """The settings in a `--config` file.

    Raises:
        UserError: no such file, not YAML, or no flat mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        at = getattr(error, "problem_mark", None)
        raise UserError(f"--config {path}{f':{at.line + 1}' if at else ''} is not YAML: {getattr(error, 'problem', None) or type(error).__name__}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"--config {path} must be a list of `setting: value` lines, with the names of the flags.")
    content.pop(DERIVED, None)
    return content


def _delete_run(path: Path) -> None:
    if not (path / CONFIG).is_file():
        return
    for entry in ENTRIES:
        target = path / entry
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
