"""The models of a run: its exports, its checkpoints, and their architecture and tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from consyn_jax.config import PRESETS, RunConfig, architecture
from consyn_jax.config_file import DERIVED
from consyn_jax.errors import UserError
from consyn_jax.flags import flags
from consyn_jax.model.pretrained.config_json import (
    from_hf_config,
    read_config,
    with_generation_config,
)
from consyn_jax.model.pretrained.peft_files import Base
from consyn_jax.model.pretrained.weights import find_model
from consyn_jax.model_config import NO_LORA, FileFormat, LoraOptions, ModelConfig
from consyn_jax.resolve import resolve
from consyn_jax.tokenization import BPETokenizer, own_tokenizer
from consyn_jax.training.checkpointing.checkpoint_files import saved_steps, step_of
from consyn_jax.training.run.directory import CHECKPOINTS, CONFIG
from consyn_jax.training.run.identity import ARCHITECTURE, GENERATION, read_run_config
from consyn_jax.training.run.model_files import holds_model

EXPORTS = ("final", "best")  # in order of preference
MODEL = "config.json"  # marks a directory as a model
ORBAX = "orbax"  # in a model directory, instead of safetensors
# Glob patterns of the files that are read in a run.
RUN_FILES = (
    CONFIG,
    "*.json",
    *EXPORTS,
    "tokenizer",
    "tokenizer/*",
    CHECKPOINTS,
    "checkpoints/**/*",
)
# Suffixes of files that users may take for a model, with a description of each.
OTHER_KINDS = {
    ".gguf": "a GGUF file, which consyn-convert writes but no command reads",
    ".safetensors": "a file of weights without its configuration",
    ".bin": "a pickle, which is never opened",
    ".pt": "a pickle, which is never opened",
    ".pth": "a pickle, which is never opened",
}


def is_run(path: Path) -> bool:
    """Whether a directory is a run of `consyn-train`."""
    return path.is_dir() and (path / CONFIG).is_file() and not (path / MODEL).is_file()


def checkpoint_run(path: Path) -> Path | None:
    """The run of a path RUN/checkpoints/STEP; None if the path is not a checkpoint."""
    place = path.resolve()
    is_step = step_of(place.name) is not None and place.parent.name == CHECKPOINTS
    if not is_step or not (place.parent.parent / CONFIG).is_file():
        return None
    # Return the run as the user wrote it; if the user wrote "." or a link, resolve it.
    return path.parent.parent if path.parts[-2:] == place.parts[-2:] else place.parent.parent


def run_steps(run: Path) -> list[int]:
    """The steps of a run's checkpoints, ascending.

    Raises:
        UserError: the directory of checkpoints cannot be read.
    """
    try:
        return saved_steps(run / CHECKPOINTS)
    except OSError as error:
        raise UserError(
            f"{run / CHECKPOINTS} cannot be read: {error.strerror}. Check the path."
        ) from error


def choose_in_run(run: Path, step: int | None) -> Path | int:
    """Choose a model of a run: the directory of an export, or the step of a checkpoint.

    Raises:
        UserError: there is no model, or no checkpoint of the given step.
    """
    steps = run_steps(run)
    if step is not None:
        if step not in steps:
            known = ", ".join(map(str, steps)) or "none"
            raise UserError(
                f"{run} has no checkpoint of step {step}. Its checkpoints are: {known}."
            )
        return step
    for name in EXPORTS:
        if holds_model(run / name):
            return run / name
    if not steps:
        raise UserError(
            f"{run} is a run that has saved nothing yet: no {EXPORTS[0]}/, no {EXPORTS[1]}/ and no "
            "checkpoint. Wait for its first save."
        )
    return steps[-1]


def check_kind(path: Path) -> None:
    """Refuse a path that is neither a model directory nor a run.

    Raises:
        UserError: the path is something else; the message says what.
    """
    models = f"Give the directory of a model with its {MODEL}, or of a run"
    if not path.is_dir():
        what = OTHER_KINDS.get(path.suffix, "a file")
        raise UserError(f"{path} is {what}. {models}.")
    if path.name == CHECKPOINTS and (path.parent / CONFIG).is_file():
        raise UserError(
            f"{path} contains the checkpoints of a run. Give {path.parent}, with --step to "
            "choose a checkpoint."
        )
    if not holds_model(path):
        raise UserError(
            f"{path} is not a model: it has neither a {MODEL} nor the {CONFIG} of a run. {models}."
        )


def run_tokenizer(run: Path) -> BPETokenizer | None:
    """The tokenizer that a run has saved; None if the run had only token ids."""
    directory = run / "tokenizer"
    return own_tokenizer(directory) if directory.is_dir() else None


def run_architecture(run: Path, tokenizer: BPETokenizer | None) -> ModelConfig:
    """Read the architecture of a run from its config.yaml or from its exported model.

    Raises:
        UserError: config.yaml is damaged, or names a model that no longer exists.
    """
    old = read_run_config(run / CONFIG)
    known = old[DERIVED].get(ARCHITECTURE)
    if isinstance(known, dict):
        config = from_hf_config(known, str(run / CONFIG))
        generation = old[DERIVED].get(GENERATION)
        if generation is None:
            return config
        return with_generation_config(config, generation, f"generation_config in {run / CONFIG}")
    # Runs of older versions do not record the architecture.
    for name in EXPORTS:
        if (run / name / MODEL).is_file():
            return read_config(run / name)
    return _by_flags(run, old, tokenizer)


def run_adapter(run: Path) -> tuple[LoraOptions, Base] | None:
    """Read a run's adapter options and base model; None if the run trains all weights.

    Raises:
        UserError: config.yaml is damaged.
    """
    old = read_run_config(run / CONFIG)
    given = {name: old[name] for name in vars(NO_LORA) if name in old}
    if given.get("lora_rank") is None:
        return None
    tree = resolve({}, {**given, "checkpoint": old.get("checkpoint")}, file_name=CONFIG)[0]
    sha256 = old[DERIVED].get("weights") if tree.model.checkpoint is not None else None
    return tree.lora, Base(tree.model.checkpoint, sha256)


def _by_flags(run: Path, old: dict[str, Any], tokenizer: BPETokenizer | None) -> ModelConfig:
    """The architecture that the flags in config.yaml describe."""
    known = flags(RunConfig)
    given = {name: value for name, value in old.items() if name in known}
    config, _ = resolve({}, given, file_name=CONFIG)
    options = config.model
    base = None
    if options.model not in PRESETS:
        try:
            base = read_config(
                find_model(options.model)
                if not Path(options.model).exists()
                else Path(options.model)
            )
        except UserError as error:
            raise UserError(
                f"{run} takes its architecture from {options.model}, which cannot be read: {error}"
            ) from error
    shape = architecture(options, base, vocab_size=old[DERIVED]["vocab_size"])
    shape = replace(shape, files=FileFormat(shape.files.model_type, config=shape.files.config))
    if tokenizer is None or tokenizer.eos_token_id in shape.eos_token_ids:
        return shape
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "pad")}
    return replace(shape, **ids, eos_token_id=tokenizer.eos_token_id, generation_config=None)
